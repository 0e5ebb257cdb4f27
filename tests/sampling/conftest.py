"""Tiny random models that denoise in each way, and a short door to the sampler."""

import dataclasses

import numpy as np
import pytest

from dlm_jax.language_model import LanguageModel
from dlm_jax.models.card import Card
from dlm_jax.sampling.generate import generate
from dlm_jax.sampling.requests import Request
from dlm_jax.sampling.settings import Settings

MASK = 30  # the last of the random model's 31 ids


@dataclasses.dataclass(frozen=True)
class Toy(LanguageModel):
    """A model without a tokenizer, sampled by ids."""

    def continued(self, prompts, new, **kwargs):
        return self.filled([Request([*p, *[0] * new], [False] * len(p) + [True] * new, stop=True) for p in prompts],
                           **kwargs)

    def filled(self, requests, numbers=None, callback=None, **settings):
        return generate(self.params, self.config, self.card, requests, Settings(**settings), numbers, callback)


@pytest.fixture(scope="session")
def toy(random_model):
    """Makes a Toy: rule, alignment, block size, end token, clean half, and what `random_model` takes."""
    def make(rule, alignment="shifted", block=None, eos=None, half="block_causal", family="qwen2", **changes):
        config, params = random_model(family, **changes)
        card = Card(alignment, rule, block, None if rule == "causal" else MASK, eos_token_id=eos, clean_half=half)
        return Toy(config, params, card, None)

    return make


@pytest.fixture(scope="session")
def prompts():
    """Three prompts of 3, 6 and 9 ids."""
    random = np.random.default_rng(0)
    return [random.integers(0, 30, n).tolist() for n in (3, 6, 9)]
