"""The runs that `claims.py` compares: small conversions of one base, and the measures of each."""

import dataclasses
import functools
import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from dlm_jax.adapt import adapt
from dlm_jax.attention.visibility import training_rule
from dlm_jax.config import load_config
from dlm_jax.diffusion.cross_entropy import cross_entropy
from dlm_jax.diffusion.noise import NoisyBatch, add_noise
from dlm_jax.diffusion.recipe import Recipe
from dlm_jax.diffusion.recipes import RECIPES
from dlm_jax.evaluation.log_likelihood import AR, denoising_recipe, likelihood
from dlm_jax.files import write_text
from dlm_jax.language_model import LanguageModel, load
from dlm_jax.models.config import ModelConfig
from dlm_jax.models.lora import Lora
from dlm_jax.models.transformer import unembed
from dlm_jax.models.weights import Params, flatten
from dlm_jax.objective.loss import target_hidden

CONFIG = Path(__file__).parent.parent / "configs" / "tiny_stories.py"
BLOCK, LENGTH, GRID, PER_FORWARD = 16, 128, (4, 8, 16, 32), (1, 2, 4)
EVERYTHING = "embeddings,norms,head"  # trained in full beside the adapters, as Efficient-DLM does
Rows = list[tuple[np.ndarray, np.ndarray]]  # (tokens, segments), int [n] each


@dataclasses.dataclass(frozen=True)
class Setup:
    """One conversion: a recipe, started from the base or from scratch, on the text or on the base's own samples."""

    recipe: Recipe
    init: str = "base"  # or 'scratch': random weights
    lora: Lora = Lora()
    data: str = "train"  # or 'own': sampled from the base


def one(alignment: str = "shifted", **fields) -> Recipe:
    return Recipe("one", 1, alignment, **fields)  # type: ignore[arg-type]


def two(alignment: str = "same_position", block_size: int = BLOCK, **fields) -> Recipe:
    return Recipe("two", 2, alignment, block_size=block_size, **fields)  # type: ignore[arg-type]


def late(half_life: float, **fields) -> Recipe:
    return two(corruption="position_dependent", half_life=half_life, **fields)


CAUSAL = {"clean_half": "token_causal"}
HYBRID = {**CAUSAL, "ar_weight": 1 / 0.3}
GROWN = {"block_schedule": "1x25,2x25,4x25,8x25"}
SETUPS = {
    "one shifted": Setup(one()),
    "one shifted annealed": Setup(one(anneal_steps=25)),
    "one shifted look-ahead": Setup(one(anneal_steps=25, annealing="look_ahead")),
    "one shifted scratch": Setup(one(), init="scratch"),
    "one same": Setup(one("same_position")),
    "noisy blocks": Setup(one("same_position", block_size=BLOCK)),
    "two same": Setup(two()),
    "two same scratch": Setup(two(), init="scratch"),
    "two shifted": Setup(two("shifted")),
    **{f"two same block {size}": Setup(two(block_size=size)) for size in GRID if size != BLOCK},
    "exact": Setup(two(corruption="exact_count")),
    **{f"late {half_life}": Setup(late(half_life)) for half_life in (0.25, 0.1, 0.05)},
    "exact m/k": Setup(two(corruption="exact_count", loss_weight="inverse_count")),
    "complementary": Setup(two(corruption="exact_count", loss_weight="inverse_count", complementary=True)),
    "lora 16": Setup(two(), lora=Lora(16, modules_to_save=EVERYTHING)),
    "lora 64": Setup(two(), lora=Lora(64, alpha=128, modules_to_save=EVERYTHING)),
    "masked, batch": Setup(two(normalizer="masked")),
    "masked, each": Setup(two(normalizer="masked_each")),
    "token-causal": Setup(two(**CAUSAL)),
    "token-causal AR": Setup(two(**HYBRID)),
    "token-causal AR late": Setup(late(0.1, **HYBRID)),
    "token-causal AR grown": Setup(two(**GROWN, **HYBRID)),
    "token-causal shifted": Setup(two("shifted", **CAUSAL)),
    "token-causal AR shifted": Setup(two("shifted", **HYBRID)),
    "token-causal AR 1 shifted": Setup(two("shifted", **CAUSAL, ar_weight=1.0)),
    "own text": Setup(two(), data="own"),
    "hybrid_shifted": Setup(RECIPES["hybrid_shifted"]),
    "hybrid_shifted grown": Setup(dataclasses.replace(RECIPES["hybrid_shifted"], **GROWN)),
}


def measured(name: str, seed: int, a) -> dict:
    """The measures of a setup, read from its file or else by a run of a minute or two that writes the file."""
    file = a.workdir / "runs" / f"{name.replace(' ', '_').replace('/', '')}-{a.steps}-{seed}.json"
    if file.exists():
        return json.loads(file.read_text())
    setup, run = SETUPS[name], file.with_suffix("")
    config = load_config(CONFIG, [
        f"model.base={a.base}", f"model.init={setup.init}", f"data.train={a.workdir / setup.data}",
        f"data.validation={a.workdir / 'validation'}", f"data.validation_records={a.records}", f"train.steps={a.steps}",
        f"train.seed={seed}", "log.every=1", f"evaluate.every={a.steps}", "evaluate.mc_samples=1",
        f"checkpoint.every={min(100, a.steps)}"])
    adapt(dataclasses.replace(config, recipe=setup.recipe, lora=setup.lora), run)
    norms = [json.loads(line)["gradient_norm"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    found = {**measure(load(run), load(a.base).with_mask(), a.rows), "first_norms": float(np.mean(norms[:10]))}
    write_text(file, json.dumps(found))
    shutil.rmtree(run)
    return found


def measure(lm: LanguageModel, base: LanguageModel, rows: Rows) -> dict:
    """Every measure the claims need. Losses are nats per token, always under the same noise."""
    found = {"ar_nll": nats(lm, AR, rows), **drift(lm, base)}
    if not lm.spec.is_diffusion:
        return found
    own = denoising_recipe(lm.spec)
    found["nelbo"] = nats(lm, own, rows)
    found["position"] = position_slope(lm, own, rows)
    if own.streams == 2:
        found |= {f"nelbo_{size}": nats(lm, dataclasses.replace(own, block_size=size), rows) for size in GRID}
        found |= {f"parallel_{k}": parallel_nll(lm, own, rows[:64], k) for k in PER_FORWARD}
    return found


def nats(lm: LanguageModel, recipe: Recipe, rows: Rows) -> float:
    """-log p of the rows, or its bound: nats per token."""
    samples = 1 if recipe.corruption == "none" else 4
    return float(likelihood(lm.params, lm.config, recipe, lm.spec.mask_token_id, rows, samples))


def drift(lm: LanguageModel, base: LanguageModel) -> dict[str, float]:
    """Mean absolute change of the attention weights and of the MLP weights."""
    after, before = flatten(lm.params), flatten(base.params)
    return {f"drift_{part}": float(np.mean([np.abs(after[path] - before[path]).mean() for path in after
                                            if path.startswith(f"layers.{part}.") and path.endswith("weight")]))
            for part in ("attention", "mlp")}


def token_losses(lm: LanguageModel, batch: NoisyBatch, recipe: Recipe) -> tuple[np.ndarray, np.ndarray]:
    """-log p of each token, and the largest log-probability at its position: float [b, n] each."""
    mask_id = lm.spec.mask_token_id
    return jax.device_get(losses_and_confidence(lm.params, batch, mask_id, recipe=recipe, config=lm.config))


@functools.partial(jax.jit, static_argnames=("recipe", "config"))
def losses_and_confidence(params: Params, batch: NoisyBatch, mask_id: int, *, recipe: Recipe,
                          config: ModelConfig) -> tuple[jax.Array, jax.Array]:
    rule = training_rule(recipe, batch.tokens.shape[1], jnp.int32(0), 0)
    logits = unembed(params, target_hidden(params, batch, rule, mask_id, recipe, config), config)
    return cross_entropy(logits, batch.tokens), jax.nn.log_softmax(logits).max(-1)


def position_slope(lm: LanguageModel, recipe: Recipe, rows: Rows) -> float:
    """Extra nats per masked token in the last quarter of a block of 16 over its first quarter; the same positions are
    compared where there is one stream."""
    tokens, segments = (np.stack(x) for x in zip(*rows))
    batch = add_noise(jax.random.key(1), tokens, segments, recipe)
    losses, _ = token_losses(lm, batch, recipe)
    offset_in_block = positions(segments) % BLOCK
    masked = np.asarray(batch.masked)
    return float(losses[masked & (offset_in_block >= 12)].mean() - losses[masked & (offset_in_block < 4)].mean())


def positions(segments: np.ndarray) -> np.ndarray:
    """Position of each token in its document: int [b, n]."""
    starts = np.pad(segments[:, 1:] != segments[:, :-1], ((0, 0), (1, 0)), constant_values=True)
    index = np.broadcast_to(np.arange(segments.shape[1]), segments.shape)
    return index - np.maximum.accumulate(np.where(starts, index, 0), axis=1)


def parallel_nll(lm: LanguageModel, recipe: Recipe, rows: Rows, per_forward: int) -> float:
    """-log p of true text decoded block by block, in nats per token. Each step commits the true tokens at the
    `per_forward` most confident positions of every block, conditioned on the true tokens of earlier steps; all blocks
    of a text share one forward pass.

    This is the cost of committing tokens together, blind to each other: measured without sampling and without a judge.
    """
    tokens, segments = (np.stack(x) for x in zip(*rows))
    batch = jax.device_get(add_noise(jax.random.key(0), tokens, segments, recipe))
    masked, total = batch.targets.copy(), 0.0
    block = np.cumsum(positions(segments) % recipe.block_size == 0, axis=1) + 1000 * np.arange(len(rows))[:, None]
    while masked.any():
        losses, confidence = token_losses(lm, dataclasses.replace(batch, masked=masked), recipe)
        order = np.lexsort((-np.where(masked, confidence, -np.inf).ravel(), block.ravel()))
        rank = np.empty(order.size, int)
        rank[order] = np.arange(order.size) - np.searchsorted(block.ravel()[order], block.ravel()[order])
        chosen = masked & (rank.reshape(masked.shape) < per_forward)
        total += losses[chosen].sum()
        masked &= ~chosen
    return float(total / batch.targets.sum())


def spread(values: Sequence[float]) -> tuple[float, float]:
    """Mean and standard deviation."""
    return float(np.mean(values)), float(np.std(values, ddof=1)) if len(values) > 1 else float("nan")
