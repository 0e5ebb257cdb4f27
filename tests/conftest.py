"""What all tests share."""

import gc
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from jax.experimental.compilation_cache import compilation_cache

from dlm_jax.models.config import ModelConfig, Rope
from dlm_jax.models.weights import Params, map_table

# What makes XLA compile quickly for a CPU: few of LLVM's passes, no fusions by way of MLIR, a program in one piece.
QUICKLY = {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
           "XLA_FLAGS": "--xla_backend_extra_options=xla_cpu_disable_new_fusion_emitters "
                        "--xla_cpu_parallel_codegen_split_count=1"}


def pytest_configure(config: pytest.Config) -> None:
    """Most of the time of the tests goes into compiling little programs that run once, here and in processes: QUICKLY
    it is two thirds less. Looking for garbage among what tracing makes less often saves a tenth. Processes can be
    interrupted also where a shell's background cannot."""
    gc.set_threshold(100_000, 50, 50)
    os.environ |= QUICKLY
    jax.config.update("jax_disable_most_optimizations", True)
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="module")
def optimized() -> Iterator[None]:
    """In a module that asks what the compiler makes of a program, or that computes long, LLVM does all it can."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("JAX_DISABLE_MOST_OPTIMIZATIONS")
        jax.config.update("jax_disable_most_optimizations", False)
        yield
    jax.config.update("jax_disable_most_optimizations", True)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """The tests of `make kernels` run where they are asked for."""
    if config.getoption("markexpr") != "kernels":
        items[:] = [item for item in items if "kernels" not in item.keywords]


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real data beside the repository; a test that needs it is skipped where it is absent."""
    folder = Path(__file__).resolve().parents[2] / "shared" / "data"
    if not folder.is_dir():
        pytest.skip(f"needs the real data of {folder}")
    return folder


FAMILIES = {
    "gpt2": {"rope": None, "norm": "layer", "mlp": "gelu", "qkv_bias": True, "output_bias": True, "mlp_bias": True,
             "kv_heads": 4},
    "llama": {"tied_head": False},
    "qwen2": {"qkv_bias": True},
    "qwen3": {"qk_norm": True},
}


@pytest.fixture(scope="session")
def random_model() -> Callable[..., tuple[ModelConfig, Params]]:
    """Makes (config, parameters) of a tiny model of a family; fields of the config can be changed.

    Nothing in the parameters is left at zero or one, so that a place that is read wrongly shows.
    """
    def make(family: str = "qwen2", seed: int = 0, **changes: Any) -> tuple[ModelConfig, Params]:
        fields = {"vocab_size": 31, "width": 16, "depth": 2, "heads": 4, "kv_heads": 2, "head_dim": 6, "mlp_width": 20,
                  "max_length": 64, "rope": Rope(), "norm": "rms", "norm_eps": 1e-5, "mlp": "swiglu"}
        config = ModelConfig(family=family, **fields | FAMILIES[family] | changes)
        random = np.random.default_rng(seed)
        return config, map_table(config, lambda _, w: np.float32(w.constant) + random.normal(
            0, 0.3, w.shape).astype(np.float32))

    return make


WORDS = "the of cat dog sat ran on under a mat hill and then it was all quiet again".split()


@pytest.fixture(scope="session")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text file of 60 little documents."""
    random = np.random.default_rng(0)
    documents = [" ".join(random.choice(WORDS, 25)) + ".\n" for _ in range(60)]
    file = tmp_path_factory.mktemp("texts") / "texts.txt"
    file.write_text("<|endoftext|>\n".join(documents))
    return file


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory, random_model: Callable, texts: Path) -> Path:
    """A Hugging Face directory: a random tiny LLaMA of context 64 with a byte-level tokenizer made for `texts`."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    from dlm_jax.convert.hf_export import write_hf
    from dlm_jax.models.bundle import Bundle
    from dlm_jax.models.card import Card
    directory = tmp_path_factory.mktemp("base")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train([str(texts)], trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<s>", "</s>"], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    tokenizer.save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text(
        '{"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}')
    config, params = random_model("llama", vocab_size=tokenizer.get_vocab_size())
    write_hf(directory, Bundle(config, params, Card(bos_token_id=0, eos_token_id=1)))
    return directory


@pytest.fixture(scope="session")
def prepared(tmp_path_factory: pytest.TempPathFactory, base: Path, texts: Path) -> Path:
    """`texts` as records of 16 tokens of the tokenizer of `base`."""
    from dlm_jax.data.prepare import prepare
    from dlm_jax.data.text import read_documents
    from dlm_jax.data.tokenizer import Tokenizer
    directory = tmp_path_factory.mktemp("prepared") / "records"
    prepare(read_documents([texts]), Tokenizer.load(base), 16, directory)
    return directory


@pytest.fixture(scope="session")
def tiny_run(base: Path, prepared: Path) -> list[str]:
    """What overrides `configs/tiny.py` to a run of 30 steps from `base` that takes seconds."""
    return [f"model.base={base}", f"data.train={prepared}", f"data.validation={prepared}", "data.validation_records=8",
            "train.steps=30", "train.batch=4", "optimizer.warmup=2", "recipe.anneal_steps=8", "log.every=1",
            "checkpoint.every=5", "evaluate.every=15", "evaluate.samples=1"]


@pytest.fixture(scope="session")
def tiny_config() -> Path:
    """The config file that `tiny_run` overrides."""
    return Path(__file__).resolve().parents[1] / "configs" / "tiny.py"


@pytest.fixture(scope="session")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where processes share what they compile."""
    return tmp_path_factory.mktemp("compiled")


@pytest.fixture(scope="module")
def compiled_once(compiled: Path) -> Iterator[None]:
    """In a module that runs the same little program many times, here and in processes, it is compiled once."""
    settings = {"jax_compilation_cache_dir": str(compiled), "jax_persistent_cache_min_compile_time_secs": 0}
    before = {name: getattr(jax.config, name) for name in settings}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in settings.items():
            patch.setenv(name.upper(), str(value))
            jax.config.update(name, value)
        yield
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()
