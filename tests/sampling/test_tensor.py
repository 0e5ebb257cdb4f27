"""A model whose weights are spread over devices writes the texts that it writes on one."""

import dataclasses
import json
import os
import subprocess
import sys

import pytest

from dlm_jax.errors import UserError
from dlm_jax.language_model import load

PROGRAM = """
import json, sys
from dlm_jax.language_model import load

tensor, fsdp = map(int, sys.argv[3:])
whole, spread = load(sys.argv[1]), load(sys.argv[1], tensor, fsdp)
shard = spread.params["layers"]["attention"]["q"]["weight"].addressable_shards[0].data
assert shard.shape[1:3] == (spread.config.width // fsdp, spread.config.heads // tensor)
prompts = ["the cat", "a dog sat", "under", "it was all"]
for settings in json.loads(sys.argv[2]):
    texts = [[(s.tokens, s.nfe) for s in lm.sample(prompts, max_tokens=12, **settings)] for lm in (whole, spread)]
    assert texts[0] == texts[1], (settings, texts)
try:
    spread.sample("the cat", max_tokens=4, callback=print)
except Exception as error:
    print(error)
"""


@pytest.fixture(scope="module")
def model(base, tmp_path_factory):
    """The directory of a block diffusion model."""
    lm = load(base).with_mask()
    spec = dataclasses.replace(lm.spec, rule="block_causal", block_size=4)
    directory = tmp_path_factory.mktemp("tensor") / "model"
    dataclasses.replace(lm, spec=spec).save(directory)
    return directory


@pytest.mark.parametrize("devices, tensor, fsdp", [(2, 2, 1), (4, 2, 1), (2, 1, 2), (4, 2, 2)])
def test_texts_are_those_of_one_device(model, devices, tensor, fsdp):
    ways = [{"unmasking": "threshold:0.5", "temperature": 0.8, "seed": 3}, {"unmasking": "confidence", "cache": "none"}]
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(devices)}
    done = subprocess.run([sys.executable, "-c", PROGRAM, str(model), json.dumps(ways), str(tensor), str(fsdp)],
                          env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "is spread over several; leave out tensor and fsdp" in done.stdout


def test_devices_that_do_not_come_out_even_are_an_error(model):
    with pytest.raises(UserError, match="fsdp 1 x tensor 3 does not divide the 1 devices"):
        load(model, tensor=3)


def test_a_model_spread_over_devices_has_the_likelihoods_of_one_device(model, tmp_path):
    text = tmp_path / "text.jsonl"
    text.write_text("".join(json.dumps({"text": "the cat sat on the mat " * n}) + "\n" for n in (1, 3)))
    found = []
    for flags in ([], ["--tensor", "2"], ["--fsdp", "2"]):
        command = ["eval", model, "--tasks", "nelbo,ar_nll", "--text", text, *flags, "--json"]
        done = subprocess.run([sys.executable, "-m", "dlm_jax", *map(str, command)], capture_output=True, text=True,
                              env=os.environ | {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "2"})
        assert done.returncode == 0, done.stderr[-2000:]
        found.append(json.loads(done.stdout.splitlines()[-1]))
    for spread in found[1:]:
        for task in ("nelbo", "ar_nll"):
            assert spread[task] == pytest.approx(found[0][task], rel=1e-5)


SERVED = """
import sys
from dlm_jax.language_model import load
from dlm_jax.sampling.lane import Job, Lane, lane_key
from dlm_jax.sampling.rows import admit, advance_rows
from dlm_jax.sampling.settings import Settings

def served(lm):
    texts = {}
    jobs = [Job(lm.continuation(prompt, 12), Settings(unmasking="threshold:0.5"), i, lambda job, progress:
                texts.update({job.number: progress.sample.tokens}), every_round=False)
            for i, prompt in enumerate(["the cat", "a dog sat", "under", "it was all"])]
    lane = Lane(lm.params, lm.config, lm.spec, jobs[0], lane_key(jobs[0], lm.config, lm.spec, 64).length, 2)
    compiled = []
    while jobs or lane.busy:
        while jobs and lane.free:
            lane.admit(jobs.pop(0))
        lane.advance(2)
        compiled.append(admit._cache_size() + advance_rows._cache_size())
    return texts, compiled

(alone, _), (spread, compiled) = served(load(sys.argv[1])), served(load(sys.argv[1], tensor=2))
assert alone == spread and len(spread) == 4, (alone, spread)
assert len(set(compiled)) == 1, compiled
"""


def test_a_model_spread_over_devices_is_served_without_compiling_twice(model):
    done = subprocess.run([sys.executable, "-c", SERVED, str(model)], capture_output=True, text=True,
                          env=os.environ | {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "2"})
    assert done.returncode == 0, done.stderr[-2000:]
