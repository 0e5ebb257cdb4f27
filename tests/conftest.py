"""Settings and fixtures shared by all tests."""

import gc
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ["DLM_JAX_CHECK_SHAPES"] = "1"  # before dlm_jax is imported: see dlm_jax/typing.py

import jax
import numpy as np
import pytest
from jax.experimental.compilation_cache import compilation_cache

from dlm_jax.models.config import ModelConfig, Rope
from dlm_jax.models.weights import Params, map_table

# Fast XLA compilation for a CPU: few LLVM passes, no MLIR fusion emitters, one module per program.
COMPILE_FAST = {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
                "XLA_FLAGS": "--xla_backend_extra_options=xla_cpu_disable_new_fusion_emitters "
                             "--xla_cpu_parallel_codegen_split_count=1"}


def pytest_configure(config: pytest.Config) -> None:
    """The tests spend most of their time compiling small programs that run once, here and in subprocesses; COMPILE_FAST
    saves two thirds of that. Collecting garbage less often, since tracing allocates a lot, saves another tenth. SIGINT
    is restored because shells ignore it in background jobs."""
    gc.set_threshold(100_000, 50, 50)
    os.environ |= COMPILE_FAST
    jax.config.update("jax_disable_most_optimizations", True)
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="module")
def optimized() -> Iterator[None]:
    """Full optimization, for modules that inspect compiled programs or compute for long."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("JAX_DISABLE_MOST_OPTIMIZATIONS")
        jax.config.update("jax_disable_most_optimizations", False)
        yield
    jax.config.update("jax_disable_most_optimizations", True)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """The tests of `make kernels` run only when selected by their marker."""
    if config.getoption("markexpr") != "kernels":
        items[:] = [item for item in items if "kernels" not in item.keywords]


def pytest_collection_finish(session: pytest.Session) -> None:
    """Exempts what the imports allocated from garbage collection, which then stays fast."""
    gc.freeze()


@pytest.fixture(scope="module", autouse=True)
def bounded_memory() -> Iterator[None]:
    """Drops compiled programs after each module: modules share few of them, and together they take gigabytes."""
    yield
    jax.clear_caches()
    gc.collect()


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real data beside the repository; tests that need it are skipped where it is missing."""
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
    """Makes (config, params) of a tiny model of a family; keyword arguments replace fields of the config.

    No parameter is left at zero or one, so that reading the wrong one shows.
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
    """A text file of 60 short documents."""
    random = np.random.default_rng(0)
    documents = [" ".join(random.choice(WORDS, 25)) + ".\n" for _ in range(60)]
    file = tmp_path_factory.mktemp("texts") / "texts.txt"
    file.write_text("<|endoftext|>\n".join(documents))
    return file


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory, random_model: Callable, texts: Path) -> Path:
    """A Hugging Face directory: a tiny random LLaMA of context 64 with a byte-level tokenizer trained on `texts`."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    from dlm_jax.convert.hf_export import write_hf
    from dlm_jax.models.bundle import Bundle
    from dlm_jax.models.diffusion_spec import DiffusionSpec
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
    write_hf(directory, Bundle(config, params, DiffusionSpec(bos_token_id=0, eos_token_id=1)))
    return directory


@pytest.fixture(scope="session")
def prepared(tmp_path_factory: pytest.TempPathFactory, base: Path, texts: Path) -> Path:
    """`texts` as records of 16 tokens, tokenized as `base` does."""
    from dlm_jax.data.prepare import prepare
    from dlm_jax.data.text import read_documents
    from dlm_jax.data.tokenizer import Tokenizer
    directory = tmp_path_factory.mktemp("prepared") / "records"
    prepare(read_documents([texts]), Tokenizer.load(base), 16, directory)
    return directory


@pytest.fixture(scope="session")
def tiny_run(base: Path, prepared: Path) -> list[str]:
    """Overrides that make `configs/tiny.py` a run of 30 steps from `base`, which takes seconds."""
    return [f"model.base={base}", f"data.train={prepared}", f"data.validation={prepared}", "data.validation_records=8",
            "train.steps=30", "train.global_batch_size=4", "optimizer.warmup_steps=2", "recipe.anneal_steps=8",
            "log.every=1", "checkpoint.every=5", "evaluate.every=15", "evaluate.mc_samples=1"]


@pytest.fixture(scope="session")
def tiny_config() -> Path:
    """The config file that `tiny_run` overrides."""
    return Path(__file__).resolve().parents[1] / "configs" / "tiny.py"


@pytest.fixture(scope="session")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A compilation cache that all processes of the tests share."""
    own = tmp_path_factory.getbasetemp()
    folder = (own.parent if "PYTEST_XDIST_WORKER" in os.environ else own) / "compiled"
    folder.mkdir(exist_ok=True)
    return folder


@pytest.fixture(scope="session", autouse=True)
def compiled_once_here(compiled: Path) -> None:
    """Uses that cache: modules, and the processes that run them, compile many programs alike."""
    jax.config.update("jax_compilation_cache_dir", str(compiled))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    compilation_cache.reset_cache()


@pytest.fixture(scope="module")
def compiled_once(compiled: Path) -> Iterator[None]:
    """Subprocesses use that cache too, for modules whose processes run the same small program many times."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JAX_COMPILATION_CACHE_DIR", str(compiled))
        patch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
        yield
