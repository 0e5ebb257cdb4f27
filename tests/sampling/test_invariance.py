"""A sample depends on its request, its number and the seed, and on nothing else."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from dlm_jax.sampling.engine import run
from dlm_jax.sampling.requests import continuation

BLOCKS = ("block_causal", "shifted", 4, "token_causal")
WAYS = {  # rule, alignment, block size, clean half; and settings: every selector and every cache
    "random": (BLOCKS, {"unmasking": "random", "temperature": 1.0}),
    "random cosine": (("bidirectional", "shifted", None, None), {"unmasking": "random:cosine", "temperature": 1.0}),
    "confidence": (BLOCKS, {"unmasking": "confidence:cosine", "temperature": 1.0}),
    "margin": (("bidirectional", "same_position", None, None), {"unmasking": "margin", "block": 8, "cache": "dual"}),
    "entropy": (("bidirectional", "shifted", None, None), {"unmasking": "entropy", "block": 8, "cache": "prefix"}),
    "threshold": (BLOCKS, {"unmasking": "threshold:0.3+remask:0.2+edit:0.6", "temperature": 1.0}),
    "factor": (("bidirectional", "shifted", None, None), {"unmasking": "factor:1", "block": 8, "cache": "dual"}),
    "entropy_bound": (("block_causal", "same_position", 4, "block_causal"),
                      {"unmasking": "entropy_bound:2", "temperature": 1.0}),
    "left_to_right": (("bidirectional", "same_position", None, None),
                      {"unmasking": "left_to_right", "temperature": 1.0, "min_p": 0.1}),
    "diffullama": (("bidirectional", "shifted", None, None),
                   {"unmasking": "diffullama_confidence", "temperature": 0.9}),
    "speculate": (BLOCKS, {"unmasking": "speculate", "temperature": 1.0}),
    "jacobi": (("causal", "shifted", None, None), {"unmasking": "jacobi:5", "temperature": 1.0}),
    "uncached": (("block_causal", "shifted", 4, "block_causal"), {"unmasking": "threshold:0.2", "cache": "none"}),
}


def outcome(samples):
    return [(sample.tokens, sample.commit_step, sample.nfe) for sample in samples]


FAST = {"confidence", "threshold", "factor", "speculate"}


@pytest.mark.parametrize("way", [way if way in FAST else pytest.param(way, marks=pytest.mark.slow) for way in WAYS])
def test_a_sequence_depends_neither_on_its_batch_nor_on_padding(toy, prompts, way):
    (rule, alignment, block, half), settings = WAYS[way]
    model = toy(rule, alignment, block, half=half or "block_causal", max_length=128)
    requests = [continuation(prompt, 9) for prompt in prompts]
    long = continuation([1] * 40, 30)  # doubles the canvas, so there is more padding on the right
    numbers = [5, 6, 7, 8]
    together = model.filled([*requests, long], numbers, **settings)
    turned = model.filled([requests[2], long, requests[0], requests[1]], [7, 8, 5, 6], **settings)
    assert outcome([turned[i] for i in (2, 3, 0, 1)]) == outcome(together)
    others = model.filled([requests[0], *[continuation([3] * 5, 12)] * 2, requests[1]], [5, 9, 9, 6], **settings)
    assert outcome([others[0], others[3]]) == outcome(together[:2])  # in a canvas of half the length


@pytest.mark.slow
@pytest.mark.parametrize("cache", ["prefix", "dual"])
def test_a_full_block_waits_for_its_prefill_however_long_its_batch_takes(toy, prompts, cache):
    model = toy("bidirectional", max_length=128)
    requests = [continuation(prompt, 20) for prompt in prompts]
    how = {"unmasking": "random", "temperature": 1.0, "block": 4, "steps": 3, "cache": cache}
    alone = [model.filled([request], [number], **how)[0] for number, request in enumerate(requests)]
    assert outcome(model.filled(requests, **how)) == outcome(alone)


def test_each_request_draws_by_its_own_number(toy):
    model = toy("bidirectional")
    requests = [continuation([1, 2], 10)] * 3
    first, second, third = (s.tokens for s in model.filled(requests, [4, 4, 5], unmasking="random", temperature=1.0))
    assert first == second != third


def test_an_empty_request_in_between_changes_nothing(toy, prompts):
    """Requests are lists, so they cannot carry padding; what precedes a request in the batch is another request."""
    model = toy("bidirectional", "same_position")
    alone = model.continued(prompts[:1], 9)[0]
    assert model.continued([prompts[0], [], prompts[1]], 9)[0].tokens == alone.tokens


@pytest.mark.slow
def test_a_hundred_requests_of_varied_lengths_compile_at_most_a_handful(toy):
    model = toy("block_causal", "same_position", 4, max_length=512, width=14)  # a model of its own
    before, random = run._cache_size(), np.random.default_rng(0)
    for number in range(100):
        prompt = [1] * int(random.integers(1, 330))
        model.filled([continuation(prompt, int(random.integers(1, 180)))], [number], unmasking="threshold:0",
                     steps=int(random.integers(1, 9)))
    assert run._cache_size() - before <= 8  # four lengths of canvas, each prefilled half or whole


SHARDED = """
import dataclasses, json, sys
import jax
sys.path.insert(0, {tests!r})
from dlm_jax.models.bundle import Bundle
from dlm_jax.convert.native import read_native
from dlm_jax.sampling.generation import generate
from dlm_jax.sampling.requests import continuation
from dlm_jax.sampling.settings import Settings
bundle = read_native({model!r})
requests = [continuation([1 + i, 2, 3][:1 + i % 3], 6 + i % 5) for i in range(10)]
out = {{}}
for name, settings in json.loads({settings!r}).items():
    rule, changes = settings
    spec = dataclasses.replace(bundle.spec, **changes)
    samples = generate(bundle.params, bundle.config, spec, requests, Settings(**rule))
    out[name] = [(s.tokens, s.commit_step, s.nfe) for s in samples]
print(json.dumps([jax.local_device_count(), out]))
"""


@pytest.mark.slow
def test_a_sequence_does_not_depend_on_the_number_of_devices(toy, tmp_path):
    from dlm_jax.convert.native import write_native
    from dlm_jax.models.bundle import Bundle
    model = toy("block_causal", "shifted", 4)
    (tmp_path / "model").mkdir()
    write_native(tmp_path / "model", Bundle(model.config, model.params, model.spec))
    settings = {
        "blocks": ({"unmasking": "random", "temperature": 1.0}, {}),
        "speculate": ({"unmasking": "speculate", "temperature": 1.0}, {"clean_half": "token_causal"}),
        "dual": ({"unmasking": "factor:1", "block": 4, "cache": "dual"}, {"rule": "bidirectional", "block_size": None}),
    }
    script = SHARDED.format(tests=str(Path(__file__).parent), model=str(tmp_path / "model"),
                            settings=json.dumps(settings))
    results = {}
    for count in (1, 4):
        environment = os.environ | {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(count)}
        done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-2000:]
        devices, results[count] = json.loads(done.stdout.splitlines()[-1])
        assert devices == count
    assert results[1] == results[4]


def test_counters_count_the_forward_passes(toy, prompts):
    seen = []
    model = toy("block_causal", "same_position", 4)
    samples = model.continued(prompts, 12, callback=seen.append, unmasking="threshold:0.5")
    assert samples[0].cost.batch_nfe == len(seen) == max(sample.nfe for sample in samples)
    assert samples[0].cost.tokens == 36 and samples[0].cost.seconds > 0 and samples[0].cost.peak_bytes > 1e6
    assert samples[0].cost.tokens_per_second == pytest.approx(36 / samples[0].cost.seconds)
    assert samples[1].tokens_per_forward == 12 / samples[1].nfe
    masked = [int(np.sum(trace.masked)) for trace in seen]
    assert masked == sorted(masked, reverse=True) and masked[-1] == 0
    assert dataclasses.replace(samples[0], cost=samples[1].cost) == samples[0]  # cost is not compared
