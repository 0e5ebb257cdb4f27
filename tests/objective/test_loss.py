"""The losses against an independent implementation in numpy, and the identities that relate the recipes.

The numpy implementation has no packing, no two streams and no padding: it runs one document at a time, and one noisy
block at a time after its clean past.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dlm_jax.attention.rules import Annealed, Bidirectional, BlockCausal, Causal
from dlm_jax.attention.visibility import training_rule
from dlm_jax.diffusion.cross_entropy import uncertainty
from dlm_jax.diffusion.noise import NoisyBatch, add_noise, no_sources, with_sources
from dlm_jax.diffusion.recipes import Recipe, recipe
from dlm_jax.models.transformer import empty_cache, forward_cached, unembed
from dlm_jax.objective.loss import loss_sums, target_hidden
from dlm_jax.segments import find_documents

MASK = 30
N = 9
SEGMENTS = np.array([[1] * 9, [1] * 4 + [2] * 3 + [0] * 2, [1] * 1 + [2] * 8])
AR = recipe("ar")
RECIPES = {
    "one_stream_shifted": Recipe("a", 1, "shifted"),
    "one_stream_same_position": Recipe("b", 1, "same_position"),
    "two_streams_same_position": Recipe("c", 2, "same_position", block_size=4),
    "two_streams_shifted": Recipe("d", 2, "shifted", block_size=4),
    "autoregressive": AR,
}

# Everything in one forward pass: pairs of masks, an AR loss on the clean half, a normalizer other than the tokens.
HYBRID = Recipe("hybrid", 2, "same_position", "exact_count", block_size=4, complementary=True,
                loss_weight="inverse_count", normalizer="masked", clean_half="token_causal", ar_weight=0.5)


# ------------------------------------------------------------------------------------- the independent implementation
def rms(x: np.ndarray, scale: np.ndarray) -> np.ndarray:
    return x / np.sqrt(np.mean(x**2, -1, keepdims=True) + 1e-5) * scale


def rope(x: np.ndarray) -> np.ndarray:
    """x [h, n, k], half-split rotary positions from 0."""
    half = x.shape[-1] // 2
    angles = np.arange(x.shape[1])[:, None] * 10_000.0 ** (-np.arange(half) / half)
    turned = (x[..., :half] + 1j * x[..., half:]) * np.exp(1j * angles)
    return np.concatenate([turned.real, turned.imag], -1)


def numpy_hidden(params: dict, tokens: np.ndarray, visible: np.ndarray) -> np.ndarray:
    """Hidden states [n, d] of one document of a Qwen2-like model in float64; visible: bool [n, n]."""
    params = jax.tree.map(lambda w: np.asarray(w, np.float64), params)
    x = params["embed"]["tokens"][tokens]
    for number in range(2):
        w = jax.tree.map(lambda a, number=number: a[number], params["layers"])
        y = rms(x, w["attention_norm"]["scale"])
        q, k, v = (np.einsum("nd,dhk->hnk", y, w["attention"][m]["weight"]) + w["attention"][m]["bias"][:, None]
                   for m in "qkv")
        k, v = np.repeat(rope(k), 2, axis=0), np.repeat(v, 2, axis=0)
        scores = np.where(visible, rope(q) @ k.swapaxes(1, 2) / np.sqrt(q.shape[-1]), -np.inf)
        p = np.exp(scores - scores.max(-1, keepdims=True))
        out = p / p.sum(-1, keepdims=True) @ v
        x = x + np.einsum("hnk,hkd->nd", out, w["attention"]["o"]["weight"])
        y = rms(x, w["mlp_norm"]["scale"])
        gate = y @ w["mlp"]["gate"]["weight"]
        x = x + (gate / (1 + np.exp(-gate)) * (y @ w["mlp"]["up"]["weight"])) @ w["mlp"]["down"]["weight"]
    return rms(x, params["final_norm"]["scale"])


def numpy_predictors(params: dict, clean: np.ndarray, noisy: np.ndarray, recipe: Recipe) -> np.ndarray:
    """The hidden state that predicts each token of one document: [n, d]."""
    n = len(clean)
    shifted = recipe.alignment == "shifted"
    if recipe.streams == 1:
        visible = np.tri(n, dtype=bool) if recipe.corruption == "none" else np.ones((n, n), bool)
        hidden = numpy_hidden(params, noisy, visible)
        return np.concatenate([np.zeros_like(hidden[:1]), hidden[:-1]]) if shifted else hidden
    out = np.zeros((n, params["embed"]["tokens"].shape[1]))
    for start in range(0, n, recipe.block_size):
        end = min(n, start + recipe.block_size)
        block = np.arange(end) // recipe.block_size
        # The document up to here, its last block noisy: nothing clean sees that block, which is the last.
        hidden = numpy_hidden(params, np.concatenate([clean[:start], noisy[start:end]]), block[:, None] >= block)
        if not shifted:
            out[start:end] = hidden[start:]
        else:
            out[start + 1:end] = hidden[start:end - 1]
            if start:
                out[start] = hidden[start - 1]
    return out


def numpy_log_p(params: dict, text: np.ndarray) -> np.ndarray:
    """log p(next token) after each token of one document, read left to right: [n, v]."""
    n = len(text)
    logits = numpy_hidden(params, text, np.tri(n, dtype=bool)) @ np.asarray(params["embed"]["tokens"], np.float64).T
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


def numpy_loss(params: dict, batch: NoisyBatch, recipe: Recipe) -> tuple[float, int]:
    """(sum of weighted losses, number of targets), one document at a time."""
    table = np.asarray(params["embed"]["tokens"], np.float64).T
    total, count = 0.0, 0
    for tokens, segments, masked, weight in zip(batch.tokens, batch.segments, batch.masked, batch.weight, strict=True):
        for document in set(segments.tolist()) - {0}:
            here = segments == document
            clean, hidden_here = tokens[here], masked[here]
            noisy = clean if recipe.corruption == "none" else np.where(hidden_here, MASK, clean)
            logits = numpy_predictors(params, clean, noisy, recipe) @ table
            log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
            losses = -log_p[np.arange(len(clean)), clean]
            total += np.sum(losses * weight[here])
            count += len(clean) - 1
    return total, count


# ------------------------------------------------------------------------------------------------------------- helpers
def noised(seed: int, recipe: Recipe, segments: np.ndarray = SEGMENTS, t: float | None = None) -> NoisyBatch:
    """A batch of random tokens, some of them the mask id, and its noise; t = 1 masks every target."""
    segments = np.asarray(segments)
    tokens = np.random.default_rng(seed).integers(0, MASK + 1, segments.shape)
    batch = jax.jit(add_noise, static_argnames="recipe")(jax.random.key(seed), tokens, segments, recipe=recipe)
    if t == 1:
        batch = dataclasses.replace(batch, masked=batch.targets, t=jnp.ones(segments.shape),
                                    weight=batch.targets.astype(np.float32))
    return jax.device_get(batch)


def rearranged(change, batch: NoisyBatch) -> NoisyBatch:
    """The batch with `change` applied to each array [b, n]; the new rows have no source."""
    changed = jax.tree.map(change, dataclasses.replace(batch, source=batch.segments))
    documents = find_documents(changed.segments.shape[1], jnp.asarray(changed.segments))
    return dataclasses.replace(changed, source=no_sources(changed.tokens), documents=documents)


def rule_of(recipe: Recipe, batch: NoisyBatch):
    return training_rule(recipe, batch.tokens.shape[1])


@functools.partial(jax.jit, static_argnames=("recipe", "config"))
def run_sums(params, batch, recipe, config):
    return loss_sums(params, batch, rule_of(recipe, batch), MASK, recipe, config)


@functools.partial(jax.jit, static_argnames=("recipe", "config"))
def run_predictors(params, batch, recipe, config):
    return target_hidden(params, batch, rule_of(recipe, batch), MASK, recipe, config)


def per_token(sums) -> float:
    return float(sums.loss / sums.target_count)


@pytest.fixture(scope="module")
def model(random_model):
    config, params = random_model("qwen2")
    return params, config


@pytest.fixture(scope="module")
def gradient_of(model):
    """recipe -> (params, batch) -> (gradients of the summed loss, sums)."""
    @functools.cache
    def make(recipe):
        def total(params, batch):
            sums = loss_sums(params, batch, rule_of(recipe, batch), MASK, recipe, model[1])
            return sums.loss, sums

        return jax.jit(jax.grad(total, has_aux=True))

    return make


@pytest.fixture(scope="module")
def gradient(gradient_of):
    """The same for two streams of blocks of 4."""
    return gradient_of(RECIPES["two_streams_same_position"])


def assert_trees_close(a, b, atol: float = 1e-4) -> None:
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=atol), a, b)


# --------------------------------------------------------------------------------------------------------------- tests
@pytest.mark.parametrize("name", RECIPES)
def test_the_loss_matches_an_independent_implementation(model, name):
    batch = noised(0, RECIPES[name])
    sums = run_sums(model[0], batch, recipe=RECIPES[name], config=model[1])
    total, count = numpy_loss(model[0], batch, RECIPES[name])
    assert int(sums.target_count) == count
    np.testing.assert_allclose(sums.loss, total, rtol=1e-5)
    np.testing.assert_allclose(sums.masked, batch.masked.sum())
    unweighted = dataclasses.replace(batch, weight=batch.masked.astype(np.float32))
    np.testing.assert_allclose(sums.masked_loss, numpy_loss(model[0], unweighted, RECIPES[name])[0], rtol=1e-5)


def test_shifted_blocks_of_one_fully_masked_are_next_token_training(model):
    ones = Recipe("ones", 2, "shifted", block_size=1)
    batch = noised(1, ones, t=1)
    ar = per_token(run_sums(model[0], batch, recipe=AR, config=model[1]))
    assert per_token(run_sums(model[0], batch, recipe=ones, config=model[1])) == pytest.approx(ar, rel=1e-5)


def test_a_recipe_that_masks_every_block_of_one_has_the_loss_of_the_base(model):
    """Only by its settings: one mask in every block, whose weight is then 1."""
    for clean_half in ("block_causal", "token_causal"):
        ones = Recipe("ones", 2, "shifted", "exact_count", block_size=1, min_one_mask=True, loss_weight="inverse_count",
                      clean_half=clean_half)
        batch = noised(1, ones)
        np.testing.assert_array_equal(batch.masked, batch.targets)
        ar = per_token(run_sums(model[0], noised(1, AR), recipe=AR, config=model[1]))
        assert per_token(run_sums(model[0], batch, recipe=ones, config=model[1])) == pytest.approx(ar, rel=1e-5)


def test_the_loss_of_a_source_is_that_of_its_records_alone(model):
    recipe = dataclasses.replace(HYBRID, complementary=True)
    batch, source = noised(3, recipe), np.array([1, 0, 1])
    rows = np.repeat(source, 2)  # a record becomes two rows
    sums = run_sums(model[0], with_sources(batch, jnp.asarray(source), 3), recipe=recipe, config=model[1])
    together = run_sums(model[0], batch, recipe=recipe, config=model[1])
    np.testing.assert_allclose([sums.loss, sums.masked_loss], [together.loss, together.masked_loss], rtol=1e-5)
    for number in (0, 1):
        own = jax.tree.map(lambda x, mine=rows == number: x[mine], batch)
        alone = run_sums(model[0], own, recipe=recipe, config=model[1])
        np.testing.assert_allclose(sums.by_source[number], [alone.masked_loss, alone.masked], rtol=1e-5)
    assert sums.by_source[2].tolist() == [0, 0]


@pytest.mark.slow
def test_the_hybrid_loss_interpolates_between_the_diffusion_loss_and_that_of_the_base(model):
    params, config = model
    batch = noised(12, HYBRID)

    @functools.partial(jax.jit, static_argnames="recipe")
    @functools.partial(jax.value_and_grad, has_aux=True)
    def loss(params, recipe):
        sums = loss_sums(params, batch, rule_of(recipe, batch), MASK, recipe, config)
        return sums.loss / sums.target_count, sums

    def at(alpha: float):
        return loss(params, recipe=dataclasses.replace(HYBRID, ar_weight=alpha))

    ar_batch = noised(12, AR)
    (ar, _), ar_gradient = jax.value_and_grad(lambda p: (lambda s: (s.loss / s.target_count, s))(
        loss_sums(p, ar_batch, Causal(), MASK, AR, config)), has_aux=True)(params)
    (alone, _), gradient = at(0.0)
    (both, sums), both_gradient = at(0.7)
    assert float(sums.ar_loss / sums.target_count) == pytest.approx(float(ar), rel=1e-5)
    assert float(both) == pytest.approx(float(alone) + 0.7 * float(ar), rel=1e-5)
    assert_trees_close(both_gradient, jax.tree.map(lambda g, a: g + 0.7 * a, gradient, ar_gradient))
    (large, _), large_gradient = at(1e5)
    assert float(large) / 1e5 == pytest.approx(float(ar), rel=1e-4)
    assert_trees_close(jax.tree.map(lambda g: g / 1e5, large_gradient), ar_gradient, atol=1e-3)


def test_the_divergence_from_the_base_is_between_next_token_distributions(model, random_model):
    params, config = model
    held = dataclasses.replace(HYBRID, ar_weight=0.0, kl_weight=2.0)
    batch = noised(13, held)
    teacher = random_model("qwen2", seed=1)[1]

    @jax.jit
    def sums(teacher):
        return loss_sums(params, batch, rule_of(held, batch), MASK, held, config, teacher)

    free = run_sums(params, batch, recipe=dataclasses.replace(held, kl_weight=0.0), config=config)
    itself, other = sums(params), sums(teacher)
    assert abs(float(itself.kl)) < 1e-3 and float(itself.loss) == pytest.approx(float(free.loss), rel=1e-5)
    expected = 0.0
    for tokens, segments in zip(batch.tokens, batch.segments, strict=True):
        for document in set(segments.tolist()) - {0}:
            text = tokens[segments == document]
            log_p, log_q = (numpy_log_p(each, text) for each in (teacher, params))
            expected += np.sum((np.exp(log_p) * (log_p - log_q))[:-1])
    assert float(other.kl) == pytest.approx(expected, rel=1e-4)
    assert float(other.loss) == pytest.approx(float(free.loss) + 2 * expected, rel=1e-4)


def test_certainty_forcing_adds_the_entropy_of_the_masked_tokens_that_are_right(model):
    params, config = model
    plain, forced = HYBRID, dataclasses.replace(HYBRID, certainty_weight=2.0)
    batch = noised(14, plain)
    hidden = target_hidden(params, batch, rule_of(plain, batch), MASK, plain, config)
    logits = unembed(params, hidden, config)
    # As if the model were right at every second masked token.
    tokens = jnp.where(batch.masked & (jnp.arange(N) % 2 == 0), jnp.argmax(logits, -1), batch.tokens)
    batch = dataclasses.replace(batch, tokens=tokens)
    hidden = target_hidden(params, batch, rule_of(plain, batch), MASK, plain, config)
    logits = unembed(params, hidden, config)
    expected = jnp.sum(batch.weight * jnp.where(batch.masked, uncertainty(logits, batch.tokens), 0))
    without, sums = (run_sums(params, batch, recipe=each, config=config) for each in (plain, forced))
    assert float(expected) > 0
    assert float(sums.loss) == pytest.approx(float(without.loss) + 2 * float(expected), rel=1e-5)
    assert float(sums.masked_loss) == pytest.approx(float(without.masked_loss), rel=1e-6)
    np.testing.assert_allclose(sums.by_source, without.by_source)


def test_one_block_of_the_full_length_equals_one_stream(model):
    one = RECIPES["one_stream_same_position"]
    one_block = Recipe("one_block", 2, "same_position", block_size=N)
    batch = noised(2, one)
    expected = run_sums(model[0], batch, recipe=one, config=model[1])
    found = run_sums(model[0], batch, recipe=one_block, config=model[1])
    assert per_token(found) == pytest.approx(per_token(expected), rel=1e-5)
    assert found.target_count == expected.target_count and found.masked == expected.masked


@pytest.mark.parametrize("clean_half, finished", [("block_causal", BlockCausal(2)), ("token_causal", Causal())])
def test_two_stream_training_equals_block_by_block_cached_decoding(model, clean_half, finished):
    params, config = model
    two = Recipe("pairs", 2, "same_position", block_size=2, clean_half=clean_half)
    batch = noised(3, two, segments=np.ones((2, 8), int))
    trained = run_predictors(params, batch, recipe=two, config=config)
    cached = jax.jit(functools.partial(forward_cached, params, config=config))
    noisy = np.where(batch.masked, MASK, batch.tokens)
    cache = empty_cache(config, 2, 8)
    for first in range(0, 8, 2):
        hidden, _ = cached(noisy[:, first:first + 2], cache, first, rule=BlockCausal(2))
        np.testing.assert_allclose(trained[:, first:first + 2], hidden, atol=1e-5)  # overwritten by the clean block
        _, cache = cached(batch.tokens[:, first:first + 2], cache, first, rule=finished)


def test_a_packed_document_is_trained_as_if_it_were_alone(model):
    two = RECIPES["two_streams_shifted"]
    batch = noised(4, two, segments=[[1] * 4 + [2] * 5])

    def and_alone(x: np.ndarray) -> np.ndarray:
        """The packed row, then each document at the start of a row of its own, padded with zeros."""
        return np.stack([x[0], np.pad(x[0, :4], (0, 5)), np.pad(x[0, 4:], (0, 4))])

    packed, first, second = run_predictors(model[0], rearranged(and_alone, batch), recipe=two, config=model[1])
    np.testing.assert_allclose(packed[1:4], first[1:4], atol=1e-5)  # from 1: a first token is not a target
    np.testing.assert_allclose(packed[5:], second[1:5], atol=1e-5)


@pytest.mark.parametrize("recipe", [RECIPES["two_streams_same_position"], HYBRID], ids=["plain", "hybrid"])
def test_sums_and_gradients_of_microbatches_add_up_to_those_of_the_batch(model, gradient_of, recipe):
    gradient, batch = gradient_of(recipe), noised(5, recipe)
    parts = [jax.tree.map(lambda x, row=row: x[row:row + 1], batch) for row in range(len(batch.tokens))]
    pieces = [gradient(model[0], part) for part in parts]
    assert_trees_close(jax.tree.map(lambda *x: sum(x), *pieces), gradient(model[0], batch), atol=1e-3)


@pytest.mark.parametrize("recipe", [RECIPES["two_streams_same_position"], HYBRID], ids=["plain", "hybrid"])
def test_rows_and_columns_of_padding_add_nothing(model, gradient_of, recipe):
    gradient, batch = gradient_of(recipe), noised(6, recipe)

    def padded(x: np.ndarray) -> np.ndarray:
        return np.pad(x, ((0, 2), (0, 3)))

    wide = rearranged(padded, batch)
    wide.tokens[wide.segments == 0] = 7
    assert_trees_close(gradient(model[0], wide), gradient(model[0], batch), atol=1e-3)


def test_a_batch_with_nothing_masked_has_no_loss_and_no_gradient(model, gradient):
    batch = noised(7, RECIPES["two_streams_same_position"])
    gradients, sums = gradient(model[0], dataclasses.replace(
        batch, masked=np.zeros_like(batch.masked), weight=np.zeros_like(batch.weight)))
    assert sums.loss == sums.masked_loss == sums.masked == 0 and sums.target_count > 0
    jax.tree.map(lambda g: np.testing.assert_array_equal(g, 0), gradients)


def test_a_genuine_mask_id_in_the_text_is_an_ordinary_token(model):
    one = RECIPES["one_stream_same_position"]
    batch = noised(8, one)
    tokens = np.where(batch.masked, batch.tokens, MASK)  # every token that stays is, by chance, the mask id
    key = jax.random.key(8)
    redrawn = jax.jit(add_noise, static_argnames="recipe")(key, tokens, batch.segments, recipe=one)
    np.testing.assert_array_equal(redrawn.masked, batch.masked)
    sums = run_sums(model[0], jax.device_get(redrawn), recipe=one, config=model[1])
    assert sums.masked == batch.masked.sum()
    np.testing.assert_allclose(sums.loss, numpy_loss(model[0], jax.device_get(redrawn), one)[0], rtol=1e-5)


@pytest.mark.parametrize("name", ["efficient_dlm", "bd3lm", "mdlm", "diffullama", "ar"])
def test_first_tokens_and_padding_are_never_masked_and_levels_stay_in_range(name):
    chosen = dataclasses.replace(recipe(name), block_size=4) if recipe(name).streams == 2 else recipe(name)
    segments = np.tile(SEGMENTS, (40, 1))
    batch = noised(9, chosen, segments=segments)
    first = np.concatenate([np.ones((len(segments), 1), bool), segments[:, 1:] != segments[:, :-1]], 1)
    np.testing.assert_array_equal(batch.targets, ~first & (segments > 0))
    assert not (batch.masked & ~batch.targets).any()
    assert (batch.t >= chosen.t_min).all() and (batch.t <= 1).all()
    if name == "ar":
        np.testing.assert_array_equal(batch.masked, batch.targets)
    else:
        assert abs(batch.masked.sum() / batch.targets.sum() - 0.5) < 0.1


def test_a_level_belongs_to_a_sequence_in_one_stream_and_to_a_block_in_two():
    one = noised(10, RECIPES["one_stream_shifted"]).t
    assert all(len(set(row)) == 1 for row in one) and len(np.unique(one)) == len(one)
    two = noised(10, RECIPES["two_streams_same_position"]).t
    assert [len(set(row)) for row in two] == [3, 3, 3]
    np.testing.assert_array_equal(two[1, :4], two[1, 0])  # the first document is one block; the second has its own
    assert two[1, 4] != two[1, 3]


def test_noise_is_a_function_of_its_key():
    two = RECIPES["two_streams_same_position"]
    draw = jax.jit(add_noise, static_argnames="recipe")
    tokens = np.zeros(SEGMENTS.shape, int)
    first, again, other = (draw(jax.random.key(k), tokens, SEGMENTS, recipe=two) for k in (0, 0, 1))
    jax.tree.map(np.testing.assert_array_equal, first, again)
    assert (first.t != other.t).any() and (first.masked != other.masked).any()


def test_the_weighted_loss_estimates_the_same_number_at_every_level(model):
    """With uniform masks, the mean of (masked / t) at a token is 1 for every t: the NELBO's weights."""
    batch = noised(11, RECIPES["one_stream_shifted"], segments=np.ones((20_000, 9), int))
    weights = (batch.masked / batch.t)[:, 1:]
    for low, high in ((0.05, 0.3), (0.3, 0.7), (0.7, 1.0)):
        inside = (batch.t[:, 0] > low) & (batch.t[:, 0] <= high)
        assert abs(weights[inside].mean() - 1) < 0.03


def test_the_rule_of_one_stream_opens_over_the_steps():
    assert training_rule(AR, N, jnp.int32(5), 0) == Causal()
    assert training_rule(recipe("mdlm"), N, jnp.int32(0), 0) == Bidirectional()
    ahead = dataclasses.replace(recipe("diffullama"), anneal_steps=10, annealing="look_ahead")
    assert [int(training_rule(ahead, 20, jnp.int32(step), 3).ahead) for step in (0, 4, 9, 50)] == [2, 10, 20, 20]
    annealing = dataclasses.replace(recipe("diffullama"), anneal_steps=10)
    rules = [training_rule(annealing, N, jnp.int32(step), 3) for step in (0, 4, 9, 50)]
    assert all(isinstance(rule, Annealed) for rule in rules)
    np.testing.assert_allclose([rule.probability for rule in rules], [0.1, 0.5, 1, 1])
    assert len({int(rule.seed) for rule in rules}) == 4  # the open edges are drawn anew at every step


def test_one_stream_in_blocks_sees_a_noisy_context_and_nothing_later():
    noisy = Recipe("noisy", 1, "same_position", block_size=4)
    assert training_rule(noisy, N, jnp.int32(0), 0) == BlockCausal(4) and noisy.rule == "block_causal"
    t = noised(10, noisy).t
    assert all(len(set(row)) == 1 for row in t)
