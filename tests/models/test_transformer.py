"""The transformer: which tokens affect which hidden states; caches, packing, remat and dtype change nothing."""

import functools
import itertools
import typing

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dlm_jax.attention.rules import Bidirectional, BlockCausal, BlockDiffusion, Causal
from dlm_jax.config import Remat
from dlm_jax.models.transformer import empty_cache, forward, forward_cached, unembed

N = 8
RULES = {"causal": Causal(), "block_causal": BlockCausal(3), "bidirectional": Bidirectional()}

run = jax.jit(forward, static_argnames=("config", "rule", "dtype", "remat"))
run_cached = jax.jit(forward_cached, static_argnames=("config", "rule"))


def draw_tokens(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 31, shape)


def changed(a: jax.Array, b: jax.Array) -> np.ndarray:
    """Which positions of [b, n, d] differ by more than rounding."""
    return np.abs(np.asarray(a) - np.asarray(b)).max(-1) > 1e-5


def in_pieces(config, params, tokens: np.ndarray, rule, cuts: tuple[int, ...]) -> np.ndarray:
    """Hidden states of the tokens, computed piece by piece between `cuts` through a cache."""
    cache, pieces = empty_cache(config, len(tokens), N), []
    for lo, hi in itertools.pairwise(cuts):
        piece, cache = run_cached(params, tokens[:, lo:hi], cache, lo, config=config, rule=rule)
        pieces.append(piece)
    return np.concatenate(pieces, 1)


@pytest.mark.parametrize("family", ("gpt2", "qwen3"))
def test_a_forward_pass_in_pieces_through_the_cache_equals_one_full_pass(random_model, family):
    config, params = random_model(family)
    tokens = draw_tokens(0, 2, N)
    hidden = run(params, tokens, config=config, rule=Causal())
    pieces = in_pieces(config, params, tokens, Causal(), (0, 1, 2, 5, 8))
    np.testing.assert_allclose(pieces, hidden, atol=1e-5)


def test_block_by_block_through_the_cache_equals_one_full_block_causal_pass(random_model):
    config, params = random_model()
    tokens = draw_tokens(1, 2, N)
    hidden = run(params, tokens, config=config, rule=BlockCausal(2))
    for cuts in ((0, 2, 4, 6, 8), (0, 4, 6, 8)):
        pieces = in_pieces(config, params, tokens, BlockCausal(2), cuts)
        np.testing.assert_allclose(pieces, hidden, atol=1e-5)


def test_rewriting_a_block_leaves_nothing_of_the_old_one(random_model):
    config, params = random_model()
    cached = functools.partial(run_cached, config=config, rule=BlockCausal(2))
    first, draft, final = draw_tokens(2, 3, 2, 2)
    _, cache = cached(params, first, empty_cache(config, 2, N), 0)
    _, drafted = cached(params, draft, cache, 2)
    jax.tree.map(np.testing.assert_array_equal, cached(params, final, drafted, 2), cached(params, final, cache, 2))


@pytest.mark.parametrize("name", RULES)
def test_a_token_changes_exactly_the_hidden_states_that_see_it(random_model, name):
    config, params = random_model()
    tokens = np.broadcast_to(draw_tokens(3, N), (N + 1, N)).copy()
    tokens[np.arange(N), np.arange(N)] += 1  # row i has token i changed, the last row none
    tokens %= 31
    hidden = run(params, tokens, config=config, rule=RULES[name])
    visible = {"causal": lambda q, k: k <= q, "block_causal": lambda q, k: k // 3 <= q // 3,
             "bidirectional": lambda q, k: True}[name]
    q, k = np.arange(N)[None, :], np.arange(N)[:, None]
    np.testing.assert_array_equal(changed(hidden[:N], hidden[N:]), np.broadcast_to(visible(q, k), (N, N)))


@pytest.mark.parametrize("family", ("gpt2", "qwen3"))
def test_other_rows_padding_and_other_documents_change_nothing(random_model, family):
    config, params = random_model(family)
    segments = np.array([[1] * 3 + [2] * 4 + [0], [1] * 6 + [0] * 2])
    tokens = draw_tokens(4, 2, N)
    others = draw_tokens(5, 2, N)
    kept = np.zeros((2, N), bool)
    kept[0, 3:7] = True  # document 2 of the first row; everything else is replaced
    replaced = np.where(kept, tokens, others)
    before, after = (run(params, t, config=config, rule=Bidirectional(), segments=segments) for t in (tokens, replaced))
    np.testing.assert_allclose(before[kept], after[kept], atol=1e-6, rtol=0)
    assert np.isfinite(before).all()


@pytest.mark.parametrize("name", [*RULES, "block_diffusion"])
def test_a_packed_document_has_the_hidden_states_that_it_has_alone(random_model, name):
    config, params = random_model()
    streams = 2 if name == "block_diffusion" else 1
    rule = RULES.get(name, BlockDiffusion(N, 3))
    halves = draw_tokens(6, streams, N)
    documents = [(0, 4), (4, 5), (5, 8)]
    # One row with the three packed, then one row for each of them, moved to the front and padded.
    rows, segments = [halves], [[1] * 4 + [2] + [3] * 3]
    for lo, hi in documents:
        rows.append(np.pad(halves[:, lo:hi], ((0, 0), (0, N - hi + lo))))
        segments.append([1] * (hi - lo) + [0] * (N - hi + lo))
    hidden = run(params, np.stack(rows).reshape(4, -1), config=config, rule=rule, segments=np.tile(segments, streams))
    hidden = np.asarray(hidden).reshape(4, streams, N, -1)
    for row, (lo, hi) in enumerate(documents, 1):
        np.testing.assert_allclose(hidden[0, :, lo:hi], hidden[row, :, :hi - lo], atol=1e-5)


def test_a_noisy_block_depends_only_on_itself_and_the_clean_past_through_all_layers(random_model):
    length, block = 6, 2
    config, params = random_model(depth=3)
    tokens = np.arange(2 * length)[None]  # each position has its own embedding row

    def outputs(table):
        changed = params | {"embed": params["embed"] | {"tokens": table}}
        hidden = forward(changed, tokens, config=config, rule=BlockDiffusion(length, block))
        return hidden[0, :length].reshape(length // block, block, -1).sum((1, 2))

    influence = np.abs(jax.jit(jax.jacrev(outputs))(params["embed"]["tokens"])).sum(-1)[:, :2 * length]
    number = np.arange(length) // block
    for k in range(length // block):
        np.testing.assert_array_equal(influence[k] > 0, np.concatenate([number == k, number < k]))


def test_remat_changes_no_gradient(random_model):
    config, params = random_model()
    tokens = draw_tokens(7, 1, 4)

    @functools.partial(jax.jit, static_argnames="remat")
    def gradient(params, remat):
        def total(params):
            return jnp.sum(jnp.sin(forward(params, tokens, config=config, rule=Causal(), remat=remat)))

        return jax.grad(total)(params)

    plain = gradient(params, "none")
    for remat in typing.get_args(Remat):
        found = gradient(params, remat)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5, rtol=1e-5), found, plain)


@pytest.mark.parametrize("family", ("gpt2", "qwen3"))
def test_bf16_is_close_to_fp32(random_model, family):
    config, params = random_model(family)
    tokens = draw_tokens(8, 2, N)
    exact, rounded = (run(params, tokens, config=config, rule=Causal(), dtype=d) for d in (jnp.float32, jnp.bfloat16))
    assert rounded.dtype == jnp.bfloat16
    error = np.asarray(rounded, np.float32) - exact
    assert np.sqrt(np.mean(error**2)) < 0.03 * np.sqrt(np.mean(np.square(exact)))


@pytest.mark.parametrize("family", ("llama", "qwen2"))
def test_logits_are_fp32_products_with_the_head_or_the_embedding(random_model, family):
    config, params = random_model(family)
    hidden = np.random.default_rng(9).standard_normal((1, 3, 16), np.float32)
    table = params["embed"]["tokens"].T if config.tied_head else params["head"]["weight"]
    np.testing.assert_allclose(unembed(params, hidden, config), hidden @ table, atol=1e-5)
    assert unembed(params, jnp.asarray(hidden, jnp.bfloat16), config).dtype == jnp.float32
