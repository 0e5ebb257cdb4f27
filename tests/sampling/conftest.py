"""Tiny random models, one for each way of denoising, and shortcuts to the sampler."""

import dataclasses

import numpy as np
import pytest

from dlm_jax.language_model import LanguageModel
from dlm_jax.models.diffusion_spec import DiffusionSpec
from dlm_jax.sampling.generation import generate
from dlm_jax.sampling.requests import Request
from dlm_jax.sampling.settings import Settings

MASK = 30  # the last of the random model's 31 ids


@dataclasses.dataclass(frozen=True)
class Toy(LanguageModel):
    """A model without a tokenizer, sampled in token ids."""

    def continued(self, prompts, new, **kwargs):
        """Samples of `new` tokens after each prompt."""
        return self.filled([Request([*p, *[0] * new], [False] * len(p) + [True] * new, stop=True) for p in prompts],
                           **kwargs)

    def filled(self, requests, numbers=None, callback=None, **settings):
        """One sample per request."""
        return generate(self.params, self.config, self.spec, requests, Settings(**settings), numbers, callback)


@pytest.fixture(scope="session")
def toy(random_model):
    """Makes a Toy from rule, alignment, block size, end token, clean half, and the arguments of `random_model`."""
    def make(rule, alignment="shifted", block=None, eos=None, half="block_causal", family="qwen2", **changes):
        config, params = random_model(family, **changes)
        mask_id = None if rule == "causal" else MASK
        spec = DiffusionSpec(alignment, rule, block, mask_id, eos_token_id=eos, clean_half=half)
        return Toy(config, params, spec, None)

    return make


@pytest.fixture(scope="session")
def prompts():
    """Three prompts of 3, 6 and 9 ids."""
    random = np.random.default_rng(0)
    return [random.integers(0, 30, n).tolist() for n in (3, 6, 9)]
