"""From requests to canvases, and from traces to samples."""

import dataclasses
import math
import time
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from dlm_jax.errors import UserError
from dlm_jax.models.card import Card
from dlm_jax.models.config import ModelConfig
from dlm_jax.models.weights import Params
from dlm_jax.sampling.engine import run
from dlm_jax.sampling.order import Order, Speculate, parse_order
from dlm_jax.sampling.requests import Request, check, check_left_to_right
from dlm_jax.sampling.sample import Cost, Sample, peak_bytes
from dlm_jax.sampling.settings import Settings
from dlm_jax.sampling.trace import Callback, Canvas, Sampler, Trace

PLACES = 64  # the shortest canvas; each longer one is twice as long, so that many lengths share few compilations


def generate(params: Params, config: ModelConfig, card: Card, requests: Sequence[Request], settings: Settings,
             numbers: Sequence[int] | None = None, callback: Callback | None = None) -> list[Sample]:
    """One sample a request. Request i draws from the key (seed, numbers[i]), by default its place in the list, and its
    sample does not depend on the others. callback: told of every step, with a `Trace` of numpy arrays.

    Raises `UserError` for a request the model cannot serve.
    """
    order, size, caching = order_for(card, settings), settings.size(card), settings.caching(card)
    for request in requests:
        check(request, config, card)
        if isinstance(order.selector, Speculate):
            check_left_to_right(request)
    if not requests:
        return []
    sampler = Sampler(*_numbers(requests, settings, card), settings.proposal(), order, caching, size, callback)
    mesh = None if callback else _mesh(len(sampler.end))
    folded = np.resize(range(len(requests)) if numbers is None else numbers, len(sampler.end))
    keys = jax.vmap(jax.random.fold_in, in_axes=(None, 0))(jax.random.key(settings.seed), folded)
    canvas = make_canvas(requests, config, sampler.size, len(keys))
    trace, seconds = timed(params, canvas, keys, sampler, config=config, card=_anonymous(card), mesh=mesh)
    samples = [_sample(trace, i, request, int(sampler.end[i])) for i, request in enumerate(requests)]
    cost = Cost(int(max(trace.passes)), sum(sample.new_tokens for sample in samples), seconds, peak_bytes())
    return [dataclasses.replace(sample, batch=cost) for sample in samples]


def order_for(card: Card, settings: Settings) -> Order:
    """The order in which a model fills: an autoregressive one knows only left to right."""
    order = parse_order(settings.order)
    if card.rule == "causal":
        return Order(Speculate())
    if isinstance(order.selector, Speculate) and card.clean_half != "token_causal":
        raise UserError("the order speculate needs a model whose clean half is token_causal; choose another order")
    return order


def timed(*arguments: Any, mesh: Mesh | None, **static: Any) -> tuple[Trace, float]:
    """`run`, with its result on the host, and the seconds it took without compilation."""
    if mesh is not None:
        share, whole = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in (mesh.axis_names, ()))
        arguments = jax.device_put(arguments[0], whole), *jax.device_put(arguments[1:], share)
    run.lower(*arguments, mesh=mesh, **static).compile()
    start = time.perf_counter()
    trace = jax.device_get(run(*arguments, mesh=mesh, **static))
    return trace, time.perf_counter() - start


def _anonymous(card: Card) -> Card:
    """What of a card matters to the engine, so that no name or end token compiles anything."""
    return Card(card.alignment, card.rule, card.block_size, card.mask_token_id, clean_half=card.clean_half)


def _mesh(batch: int) -> Mesh | None:
    """The devices of this host that share a batch, or None for one."""
    count = math.gcd(batch, jax.local_device_count())
    return Mesh(np.asarray(jax.local_devices()[:count]), ("batch",)) if count > 1 else None


def _numbers(requests: Sequence[Request], settings: Settings, card: Card) -> tuple[jax.Array, jax.Array]:
    """Steps and end token of each sequence, int [b], b the next power of two."""
    steps = [settings.steps_of(sum(request.masked), card) for request in requests]
    ends = [card.eos_token_id if request.stop and card.eos_token_id is not None else -1 for request in requests]
    spare = power_of_two(len(requests)) - len(requests)
    return jnp.asarray(steps + [1] * spare, jnp.int32), jnp.asarray(ends + [-1] * spare, jnp.int32)


def power_of_two(n: int) -> int:
    """The smallest power of two that is not below n."""
    return 1 << max(n - 1, 0).bit_length()


def canvas_length(tokens: int, context: int, size: int) -> int:
    """Places of the canvas for so many tokens: a power of two, or the context, in whole blocks."""
    unit = size or 1
    return -(-min(max(PLACES, power_of_two(tokens)), max(context, tokens)) // unit) * unit


def make_canvas(requests: Sequence[Request], config: ModelConfig, size: int, batch: int) -> Canvas:
    """The canvas of `batch` sequences, of which the requests are the first, for blocks of `size`."""
    n = canvas_length(max(len(request.tokens) for request in requests), config.max_length, size)
    tokens, segments = np.zeros((2, batch, n), np.int32)
    masked = np.zeros(tokens.shape, bool)
    for i, request in enumerate(requests):
        length = len(request.tokens)
        tokens[i, :length], masked[i, :length], segments[i, :length] = request.tokens, request.masked, 1
    return Canvas(jnp.asarray(tokens), jnp.asarray(masked), jnp.asarray(segments))


def _sample(trace: Trace, i: int, request: Request, eos_id: int) -> Sample:
    end = len(request.tokens)
    tokens, order = trace.tokens[i, :end], trace.order[i, :end]
    ends = np.flatnonzero((tokens == eos_id) & (order > 0))
    end = int(ends[0]) + 1 if ends.size else end
    return Sample(tokens[:end].tolist(), order[:end].tolist(), trace.confidence[i, :end].tolist(),
                  int(trace.forwards[i]))
