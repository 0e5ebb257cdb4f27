"""What a cached forward pass costs by how many positions it computes, at batch 1: the price of drafting ahead.

    python benchmarks/forward_width.py

Each model is a LLaMA with random weights; a pass reads a cache of 256 positions and ends with the logits. Prints
medians in milliseconds, and how many times those of one position, which autoregressive decoding takes per token.
"""

import argparse
import platform
import time
from datetime import date

import jax
import jax.numpy as jnp
import numpy as np
from train_step import processor

from dlm_jax.attention.rules import Causal
from dlm_jax.models.config import ModelConfig, Rope
from dlm_jax.models.transformer import empty_cache, forward_cached, unembed
from dlm_jax.models.weights import Params, init, parameter_count

CONTEXT = 256
SHAPES = ((128, 6), (192, 8), (256, 12), (384, 12))  # width and depth


def llama(width: int, depth: int) -> ModelConfig:
    """A model of this width and depth, shaped like the bundled base."""
    return ModelConfig("llama", vocab_size=2048, width=width, depth=depth, heads=width // 32, kv_heads=width // 64,
                       head_dim=32, mlp_width=width * 11 // 4, max_length=512, rope=Rope(), norm="rms", norm_eps=1e-5,
                       mlp="swiglu")


def milliseconds(params: Params, config: ModelConfig, width: int, passes: int, rounds: int) -> float:
    """The median time of one pass over `width` positions."""
    segments = jnp.ones((1, CONTEXT), jnp.int32)

    @jax.jit
    def run(params: Params, tokens: jax.Array) -> jax.Array:
        def one(i: jax.Array, carry: tuple) -> tuple:
            tokens, cache = carry
            first = (i % (CONTEXT - width))[None]
            hidden, cache = forward_cached(params, tokens, cache, first, config=config, rule=Causal(),
                                           segments=segments)
            top = jnp.max(unembed(params, hidden, config), -1)
            return jnp.where(top > 1e9, tokens + 1, tokens), cache  # so that XLA cannot remove a pass

        return jax.lax.fori_loop(0, passes, one, (tokens, empty_cache(config, 1, CONTEXT)))[0]

    tokens = jnp.ones((1, width), jnp.int32)
    run(params, tokens).block_until_ready()
    found = []
    for _ in range(rounds):
        start = time.perf_counter()
        run(params, tokens).block_until_ready()
        found.append(1000 * (time.perf_counter() - start) / passes)
    return float(np.median(found))


def main() -> None:
    """Measures and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--widths", type=int, nargs="+", default=(1, 16, 32, 80, 144))
    parser.add_argument("--models", type=int, default=len(SHAPES), help="how many, from the smallest")
    parser.add_argument("--passes", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=7)
    a = parser.parse_args()
    print(f"{date.today()}, {processor()}, Python {platform.python_version()}, jax {jax.__version__}")
    print("| parameters | " + " | ".join(f"{width}" for width in a.widths) + " |")
    print("|---" + "|---:" * len(a.widths) + "|")
    for shape in SHAPES[:a.models]:
        config = llama(*shape)
        params = init(config, jax.random.key(0))
        found = [milliseconds(params, config, width, a.passes, a.rounds) for width in a.widths]
        cells = [f"{x:.2f} ms ({x / found[0]:.1f}x)" for x in found]
        print(f"| {parameter_count(config) / 1e6:.1f}M | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
