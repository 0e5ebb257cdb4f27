"""Tiny random models that denoise in each way, and a short door to the sampler."""

import dataclasses

import numpy as np
import pytest

from dlm_jax.language_model import LanguageModel
from dlm_jax.models.card import Card
from dlm_jax.sampling.generate import Request, generate, selector
from dlm_jax.sampling.proposal import Proposal

MASK = 30  # the last of the random model's 31 ids


@dataclasses.dataclass(frozen=True)
class Toy(LanguageModel):
    """A model without a tokenizer, sampled by ids."""

    def continued(self, prompts, new, **kwargs):
        return self.filled([Request([*p, *[0] * new], [False] * len(p) + [True] * new, stop=True) for p in prompts],
                           **kwargs)

    def filled(self, requests, order="confidence", temperature=0.0, **kwargs):
        return generate(self.params, self.config, self.card, requests, proposal=Proposal(temperature),
                        select=selector(order), **kwargs)


@pytest.fixture(scope="session")
def toy(random_model):
    """Makes a Toy: rule, alignment, block size, end token, and what `random_model` takes."""
    def make(rule, alignment="shifted", block=None, eos=None, family="qwen2", **changes):
        config, params = random_model(family, **changes)
        card = Card(alignment, rule, block, None if rule == "causal" else MASK, eos_token_id=eos)
        return Toy(config, params, card, None)

    return make


@pytest.fixture(scope="session")
def prompts():
    """Three prompts of 3, 6 and 9 ids."""
    random = np.random.default_rng(0)
    return [random.integers(0, 30, n).tolist() for n in (3, 6, 9)]
