"""Trains the bundled autoregressive base model, on the sources of the Python standard library.

    python launch/train_base.py --workdir runs/base --out dlm_jax/assets/base

Trains a byte-level BPE tokenizer, then a small LLaMA with this library's own trainer (recipe `ar`), in about half an
hour on two CPU cores, and exports the model in bfloat16 as a Hugging Face directory. Rerun the command to resume an
interrupted run.
"""

import argparse
import json
import platform
from pathlib import Path

import jax
import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from dlm_jax.adapt import adapt
from dlm_jax.config import load_config
from dlm_jax.convert.hf_export import write_hf
from dlm_jax.data.text import python_stdlib_files, read_documents
from dlm_jax.files import new_directory
from dlm_jax.loading import load_bundle, load_tokenizer
from dlm_jax.models.bundle import Bundle
from dlm_jax.models.config import ModelConfig, Rope
from dlm_jax.models.diffusion_spec import DiffusionSpec
from dlm_jax.models.weights import init, parameter_count

SHAPE = ModelConfig("llama", vocab_size=2048, width=128, depth=6, heads=4, kv_heads=2, head_dim=32, mlp_width=352,
                    max_length=512, rope=Rope(), norm="rms", norm_eps=1e-5, mlp="swiglu")
SPEC = DiffusionSpec(bos_token_id=0, eos_token_id=1)
MODEL_CARD = """# The bundled base model of dlm-jax

A LLaMA of {parameters:,} parameters, trained left to right on the sources of Python {python}'s standard library
(licensed by the Python Software Foundation) for {steps} steps of 4,096 tokens, by `launch/train_base.py`. It reaches
{nll:.2f} nats per token on the 5 % of the files it was not trained on. It is a toy for demonstrations and tests.
"""


def train_tokenizer(directory: Path) -> None:
    """A byte-level BPE with SHAPE.vocab_size pieces; every digit is its own token, as in LLaMA."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=SHAPE.vocab_size, special_tokens=["<s>", "</s>"], show_progress=False,
                                  initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    tokenizer.train_from_iterator(read_documents(python_stdlib_files()[0]), trainer)
    tokenizer.save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text(json.dumps({
        "tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>",
        "clean_up_tokenization_spaces": False, "model_max_length": SHAPE.max_length}, indent=2) + "\n")


def make_seed(directory: Path) -> None:
    """Writes the untrained base, tokenizer and random weights, as a Hugging Face directory."""
    with new_directory(directory) as partial:
        train_tokenizer(partial)
        write_hf(partial, Bundle(SHAPE, init(SHAPE, jax.random.key(0)), SPEC))


def main() -> None:
    """Trains the tokenizer and the model, then exports them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workdir", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=4500)
    arguments = parser.parse_args()
    seed = arguments.workdir / "seed"
    if not seed.exists():
        make_seed(seed)
    config = load_config(Path(__file__).parent.parent / "configs" / "base.py",
                         [f"model.base={seed}", f"train.steps={arguments.steps}"])
    outcome = adapt(config, arguments.workdir / "run")
    bundle = load_bundle(arguments.workdir / "run")
    bf16 = jax.tree.map(lambda w: np.asarray(w, "bfloat16"), bundle.params)
    with new_directory(arguments.out) as partial:
        write_hf(partial, Bundle(bundle.config, bf16, SPEC))
        load_tokenizer(bundle).save(partial)
        (partial / "README.md").write_text(MODEL_CARD.format(
            parameters=parameter_count(SHAPE), python=platform.python_version(), steps=outcome.steps,
            nll=outcome.nelbo_after))


if __name__ == "__main__":
    main()
