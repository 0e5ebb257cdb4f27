"""Planning sampling: the denoising loop through the real TPU compiler."""

import importlib.util

import pytest

from dlm_jax.aot import sampling
from dlm_jax.aot.estimate import time_spent
from dlm_jax.aot.program import Event, Loop
from dlm_jax.aot.sampling import aot_sampling, loops_over_layers
from dlm_jax.commands.main import main
from dlm_jax.config import load_config
from dlm_jax.errors import UserError

pytestmark = pytest.mark.usefixtures("optimized")
needs_compiler = pytest.mark.skipif(importlib.util.find_spec("libtpu") is None,
                                    reason="libtpu, the TPU compiler, is not installed: pip install 'dlm-jax[tpu]'")


@needs_compiler
def test_devices_that_share_a_model_each_hold_their_part_of_it(tiny_run):
    config = load_config("tiny", tiny_run)
    whole, shared, gathered = (aot_sampling(config, "v5e:2x2", batch=4, length=32, tensor=tensor, fsdp=fsdp)
                               for tensor, fsdp in ((1, 1), (2, 1), (1, 4)))
    assert whole.fits and shared.fits and gathered.arguments_gib < shared.arguments_gib < whole.arguments_gib
    assert shared.seconds_forward > shared.least_seconds_forward > 0
    assert shared.tokens_per_second == pytest.approx(4 / shared.seconds_forward)


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize("topology, tensor", [("v5e:2x4", 8), ("v6e:2x2", 4)])
def test_a_step_copies_neither_the_cache_nor_weights(topology, tensor, monkeypatch):
    """Of Qwen3-8B, where a copy of the cache in each layer would take longer than the products."""
    found = []
    monkeypatch.setattr(sampling, "seconds_forward", lambda program, depth, peak: found.append((program, depth, peak)))
    aot_sampling(load_config("efficient_dlm_8b", ["recipe.block_size=1"]), topology, 1, 1024, tensor)
    [(program, depth, peak)] = found
    _, step = max(loops_over_layers(program, depth), key=lambda found: found[0])
    spent, _ = time_spent(step.body, peak, lambda name: 0.0)
    assert spent["copies"] < 0.05 * sum(spent.values())


def test_a_step_of_denoising_is_the_innermost_loop_that_runs_through_the_layers():
    layers = Loop(3, (Event("products", "x", 5),))
    program = (Loop(1, (layers, Loop(8, ()), Loop(1, (Event("other", "y", 1), layers)))), Loop(3, ()))
    assert [nesting for nesting, _ in loops_over_layers(program, 3)] == [0, 1]


@pytest.mark.parametrize("changes, words", [
    ({"tensor": 3, "length": 32}, "does not divide the 2 key-value heads"),
    ({"length": 4096}, "is not between 2 and the model's")])
@needs_compiler
def test_what_cannot_be_planned_is_refused(tiny_run, changes, words):
    with pytest.raises(UserError, match=words):
        aot_sampling(load_config("tiny", tiny_run), "v5e:2x2", **changes)


@pytest.mark.parametrize("flags, words", [
    (["--tensor", "2"], "--tensor is for --task sample"), (["--task", "sample", "--search"], "for the training step")])
def test_flags_of_the_other_task_are_refused(flags, words, capsys):
    assert main(["aot", "--config", "tiny", "--topology", "v5e:2x2", *flags]) == 2
    assert words in capsys.readouterr().err
