"""Dataclasses that are pytrees: what jit and the checkpoints take their structure for."""

import dataclasses
import importlib
import itertools
import pkgutil

import jax
import numpy as np
import pytest

import dlm_jax
from dlm_jax import struct
from dlm_jax.attention.rules import Bidirectional, BlockCausal, Causal, CausalThenLastBlock


@struct.dataclass
class Point:
    x: np.ndarray
    name: str = struct.field(pytree_node=False)
    y: np.ndarray | float = 0.0


def test_classes_with_equal_fields_have_different_structures():
    """jit takes equal structures for the same program: a rule would run with the mask of another."""
    structures = [jax.tree.structure(rule) for rule in
                  (BlockCausal(4), CausalThenLastBlock(4), BlockCausal(8), Causal(), Bidirectional())]
    assert all(a != b for a, b in itertools.combinations(structures, 2))
    assert jax.tree.structure(BlockCausal(4)) == structures[0]


def test_no_class_is_registered_in_another_way():
    for module in pkgutil.walk_packages(dlm_jax.__path__, "dlm_jax."):
        if not module.name.endswith("__main__"):
            for value in vars(importlib.import_module(module.name)).values():
                assert not hasattr(value, "_flax_dataclass"), value


def test_trees_are_of_the_fields_that_are_not_static_and_keep_their_names():
    point = Point(np.arange(3), "a", 2.0)
    paths = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(point)]
    assert paths == [".x", ".y"]
    doubled = jax.tree.map(lambda x: 2 * x, point)
    assert doubled.name == "a" and doubled.y == 4.0 and doubled.x.tolist() == [0, 2, 4]
    assert jax.tree.structure(point) != jax.tree.structure(dataclasses.replace(point, name="b"))
    with pytest.raises(dataclasses.FrozenInstanceError):
        point.name = "b"
