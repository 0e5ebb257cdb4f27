"""The losses of the papers, written independently in PyTorch from their definitions, on transformers' own LLaMA.

They share with ours only the weights, the tokens, and which tokens are masked.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dlm_jax.attention.plan import dense_mask
from dlm_jax.attention.visibility import training_rule
from dlm_jax.convert.hf_export import write_hf
from dlm_jax.diffusion.noise import add_noise
from dlm_jax.diffusion.recipes import Recipe, recipe
from dlm_jax.models.bundle import Bundle
from dlm_jax.models.diffusion_spec import DiffusionSpec
from dlm_jax.objective.loss import loss_sums

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
MASK, B, N, BLOCK = 30, 3, 12, 4
TOKENS = np.random.default_rng(0).integers(0, MASK, (B, N))


@pytest.fixture(scope="module")
def model(random_model, tmp_path_factory):
    """Our model, and the same weights in transformers."""
    config, params = random_model("llama")
    directory = tmp_path_factory.mktemp("llama")
    write_hf(directory, Bundle(config, params, DiffusionSpec()))
    theirs = transformers.LlamaForCausalLM.from_pretrained(directory, attn_implementation="eager").eval()
    return config, params, theirs


def ours(model, chosen: Recipe, step: int):
    """(our loss per target, the noisy batch and the rule that it was computed with)."""
    config, params, _ = model
    batch = jax.jit(add_noise, static_argnames="recipe")(
        jax.random.key(7), TOKENS, np.ones_like(TOKENS), recipe=chosen, step=jnp.int32(step))
    rule = training_rule(chosen, N, jnp.int32(step), 5)
    sums = jax.jit(lambda p, b: loss_sums(p, b, rule, MASK, chosen, config))(params, batch)
    return float(sums.loss / sums.target_count), jax.device_get(batch), rule


def logits(theirs, tokens, visible, positions):
    """transformers' logits under a mask bool [n, n]."""
    added = torch.zeros(visible.shape).masked_fill(~torch.tensor(visible), torch.finfo(torch.float32).min)
    with torch.no_grad():
        return theirs(input_ids=torch.tensor(tokens), attention_mask=added[None, None].expand(len(tokens), -1, -1, -1),
                      position_ids=torch.tensor(positions)[None].expand(len(tokens), -1)).logits


@pytest.mark.parametrize("anneal_steps", [0, 6])
def test_the_diffullama_loss_is_that_of_its_authors_code(model, anneal_steps):
    """L = sum_b (1/t_b) sum_i M_bi CE_bi / sum_bi M_bi, M and CE of tokens 1.. from outputs 0.. (their trainer)."""
    chosen = dataclasses.replace(recipe("diffullama"), anneal_steps=anneal_steps, normalizer="masked")
    found, batch, rule = ours(model, chosen, step=2)
    visible = np.asarray(dense_mask(rule, N))[0]
    assert visible.all() == (anneal_steps == 0) and visible[np.tri(N, dtype=bool)].all()
    x_t = np.where(batch.masked, MASK, TOKENS)
    h = logits(model[2], x_t, visible, np.arange(N))
    ce = torch.nn.functional.cross_entropy(h[:, :-1].flatten(0, 1), torch.tensor(TOKENS[:, 1:]).flatten(),
                                           reduction="none").view(B, N - 1)
    m = torch.tensor(batch.masked[:, 1:])
    dsigma = 1 / torch.tensor(batch.t[:, :1])
    expected = (dsigma * ce * m).sum() / m.sum()
    assert found == pytest.approx(expected.item(), rel=1e-5)


def test_the_efficient_dlm_loss_is_that_of_its_paper(model):
    """L = mean over tokens of (1/t_b) times the sum over a block b's masked of -log p(x_i | noisy b, clean < b)."""
    chosen = dataclasses.replace(recipe("efficient_dlm"), block_size=BLOCK)
    found, batch, _ = ours(model, chosen, step=0)
    q, k = np.arange(2 * N)[:, None], np.arange(2 * N)[None]
    noisy_q, noisy_k, block_q, block_k = q < N, k < N, q % N // BLOCK, k % N // BLOCK
    visible = np.where(noisy_q, np.where(noisy_k, block_k == block_q, block_k < block_q),
                       ~noisy_k & (block_k <= block_q))
    doubled = np.concatenate([np.where(batch.masked, MASK, TOKENS), TOKENS], 1)
    h = logits(model[2], doubled, visible, np.arange(2 * N) % N)[:, :N]
    log_p = h.log_softmax(-1).gather(-1, torch.tensor(TOKENS)[..., None])[..., 0]
    total = 0.0
    for b in range(B):
        for block in range(N // BLOCK):
            here = slice(block * BLOCK, (block + 1) * BLOCK)
            assert len(set(batch.t[b, here])) == 1
            k_masked, maskable = batch.masked[b, here].sum(), BLOCK - (block == 0)
            assert k_masked == np.round(batch.t[b, block * BLOCK] * maskable)
            total -= (log_p[b, here][torch.tensor(batch.masked[b, here])] / batch.t[b, block * BLOCK]).sum().item()
    assert found == pytest.approx(total / (B * (N - 1)), rel=1e-5)


def test_the_loss_on_a_token_causal_clean_half_is_the_next_token_loss_of_the_base(model):
    """Nemotron-Labs-Diffusion: L_AR, from the same forward pass as the diffusion loss, is transformers' own loss of the
    base."""
    chosen = dataclasses.replace(recipe("nemotron"), block_size=BLOCK)
    both, _, _ = ours(model, chosen, step=0)
    alone, _, _ = ours(model, dataclasses.replace(chosen, ar_weight=0.0), step=0)
    with torch.no_grad():
        ar = model[2](input_ids=torch.tensor(TOKENS), labels=torch.tensor(TOKENS)).loss.item()
    assert both - alone == pytest.approx(chosen.ar_weight * ar, rel=1e-5)
