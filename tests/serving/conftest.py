"""A real server: a process of `dlm serve`, with a model that denoises in blocks and is autoregressive as well."""

import dataclasses
import runpy
from pathlib import Path

import pytest

from dlm_jax.language_model import load

HERE = Path(__file__).parent
SERVER = runpy.run_path(str(HERE / "server_process.py"))

TEMPLATE = ("{% for m in messages %}{% if m['role'] == 'developer' %}{{ raise_exception('no developers') }}{% endif %}"
            "# {{ m['role'] }}: {{ m['content'] }}\n{% endfor %}{% if add_generation_prompt %}# assistant:{% endif %}")


@pytest.fixture(scope="session")
def model_directory(tmp_path_factory):
    """The bundled base with a mask token, said to denoise in blocks of 8 after a token-causal text."""
    base = load("bundled").with_mask()
    spec = dataclasses.replace(base.spec, rule="block_causal", block_size=8, clean_half="token_causal")
    base.text_tokenizer().wrapped.chat_template = TEMPLATE
    directory = tmp_path_factory.mktemp("served") / "model"
    dataclasses.replace(base, spec=spec).save(directory)
    return directory


@pytest.fixture(scope="session")
def server(model_directory, tmp_path_factory):
    flags = "--rows", "4", "--unmasking", "threshold:0.5", "--max-tokens", "12"
    with SERVER["serving"](model_directory, tmp_path_factory.mktemp("server"), *flags) as running:
        yield running


@pytest.fixture(scope="session")
def start_server():
    """start_server(model directory, temporary directory, *flags): a context with a `Server`."""
    return SERVER["serving"]


@pytest.fixture(scope="session")
def server_at():
    """server_at(url): a `Server` that somebody else has started."""
    return lambda url: SERVER["Server"](url, None, "")


@pytest.fixture(scope="session")
def browse():
    """browse(url, profile directory): a context with a `Page`."""
    return runpy.run_path(str(HERE / "browser.py"))["browse"]
