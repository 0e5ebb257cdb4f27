"""llama.cpp's own programs fill the same text as we do, token by token. `make engines` builds them.

Its `llama-diffusion-cli` draws each token from what top-k leaves. With one token left it is greedy and equally sure of
every position, and then it commits from left to right; so that is the order here. Keys and values are kept in fp32.
"""

import json
import os
import re
import shutil
import subprocess

import pytest

pytest.importorskip("gguf", reason="needs gguf: pip install 'dlm-jax[gguf]'")

from dlm_jax.adapt import adapt
from dlm_jax.config import load_config
from dlm_jax.convert.gguf_export import FILE
from dlm_jax.language_model import load
from dlm_jax.sampling.requests import Request
from dlm_jax.sampling.settings import Settings

CANVAS = 64
EXACT = ["--top-k", "1", "--temp", "0", "-t", "1", "-s", "1", "-fa", "off", "-ctk", "f32", "-ctv", "f32"]
pytestmark = pytest.mark.slow


def program(name):
    """The path of a program of llama.cpp; skips where it has not been built."""
    path = shutil.which(name, path=os.environ.get("LLAMA_CPP", "") + os.pathsep + os.environ["PATH"])
    if path is None:
        pytest.skip(f"needs {name} of llama.cpp: `make engines` builds it")
    return path


@pytest.fixture(scope="module")
def prompts(shared):
    lines = (shared / "tinystories" / "tinystories_val.jsonl").read_text(encoding="utf-8").splitlines()[:20]
    return [" ".join(json.loads(line)["text"].split()[:4 + i % 5]) for i, line in enumerate(lines)]


@pytest.fixture(scope="module", params=("diffullama", "mdlm"))  # shifted, and at the same position
def adapted(request, shared, tmp_path_factory):
    """The stories model after a short adaptation, in one stream."""
    program("llama-diffusion-cli")
    run, stories = tmp_path_factory.mktemp("adapted") / "run", shared / "tinystories"
    adapt(load_config("tiny_stories", [
        f"recipe={request.param}", f"model.base={shared / 'stories260k'}", "train.steps=60", "evaluate.every=60",
        f"data.train={stories / 'tinystories_train_2316.jsonl'}", "data.validation_records=8",
        f"data.validation={stories / 'tinystories_val.jsonl'}"]), run)
    return load(run)


def request_of(lm, prompt):
    ids = lm.encode(prompt)
    return Request([*ids, *[0] * (CANVAS - len(ids))], [i >= len(ids) for i in range(CANVAS)], stop=False)


def ours(lm, prompt, steps):
    request = request_of(lm, prompt)
    sample = lm.fill([request], Settings(unmasking="left_to_right", steps=steps))[0]
    return lm.tokenizer.decode(sample.tokens[request.masked.index(True):])


def theirs(file, prompt, steps):
    command = [program("llama-diffusion-cli"), "-m", str(file), "-p", prompt, "-ub", str(CANVAS), "-b", str(CANVAS),
               "-c", str(CANVAS), "--diffusion-algorithm", "4", "--diffusion-steps", str(steps),
               "--diffusion-block-length", str(CANVAS), *EXACT]
    return run(command, r"total time: .*?\n[\d.]+ I \n(.*)\n")


def run(command, pattern):
    """What a program printed where the pattern says; its log may lose the end, and then it runs again."""
    for _ in range(10):
        done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=True)
        if found := re.search(pattern, done.stdout + done.stderr, re.DOTALL):
            return found[1]
    raise AssertionError(done.stdout[-500:] + done.stderr[-500:])


def test_llama_cpp_fills_the_same_text(adapted, prompts, tmp_path):
    adapted.export(tmp_path / "out", "float32", "gguf")
    for prompt in prompts:
        masks = sum(request_of(adapted, prompt).masked)
        for steps in (masks, masks // 3):
            assert theirs(tmp_path / "out" / FILE, prompt, steps) == ours(adapted, prompt, steps)


@pytest.mark.parametrize("dtype", ("float16", "q8_0"))
def test_fewer_bits_begin_the_same_text(adapted, prompts, tmp_path, dtype):
    """llama.cpp then multiplies in fewer bits as well, and one other token changes all that follow."""
    adapted.export(tmp_path / "out", dtype, "gguf")
    same = 0.0
    for prompt in prompts:
        masks = sum(request_of(adapted, prompt).masked)
        a, b = theirs(tmp_path / "out" / FILE, prompt, masks), ours(adapted, prompt, masks)
        same += len(os.path.commonprefix([a, b])) / max(len(a), len(b), 1)
    print(f"{dtype}: the first {same / len(prompts):.0%} of a text on average")
    assert same / len(prompts) > 0.3


def test_llama_cpp_continues_left_to_right_as_we_do(shared, prompts, tmp_path):
    base = load(shared / "stories260k")
    base.export(tmp_path / "out", "float32", "gguf")
    for prompt in prompts:
        command = [program("llama-completion"), "-m", str(tmp_path / "out" / FILE), "-p", prompt, "-n", "40", "-no-cnv",
                   *EXACT]
        expected = base.sample(prompt, max_tokens=40).text
        assert run(command, f"({re.escape(expected)})") == expected
