"""The model card: the `README.md` of an export, which states what the model or the adapter is and how to load it.

Names in it may be a stranger's, so none is written where YAML, Markdown or HTML would act on it.
"""

import json
import shlex
from collections.abc import Mapping, Sequence
from typing import TypedDict, Unpack

from dlm_jax.convert.origin import Origin
from dlm_jax.errors import printable
from dlm_jax.models.bundle import Bundle
from dlm_jax.models.lora import Lora
from dlm_jax.models.weights import parameter_count

USAGE_DIFFUSION = """\
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("{name}", trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained("{name}", trust_remote_code=False)
inputs = tokenizer("Once upon a time", return_tensors="pt")
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=64, temperature=0.8, top_p=0.95, seed=0)[0]))
"""
USAGE_AUTOREGRESSIVE = """\
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("{name}")
tokenizer = AutoTokenizer.from_pretrained("{name}")
"""
TAGS_DIFFUSION = ("diffusion-language-model", "masked-diffusion", "dlm-jax")
TAGS_AUTOREGRESSIVE = ("dlm-jax",)
ALIGNMENT = {"shifted": "the output at n-1 predicts token n", "same_position": "the output at n predicts token n"}


class CardOptions(TypedDict, total=False):
    """What a card says beyond what the model itself knows; whoever publishes the model states it."""

    scores: Mapping[str, float]  # what was measured of the model, by name
    license: str | None  # the hub's name of it, such as apache-2.0
    datasets: Sequence[str]  # what it was trained on, such as the hub's names


def model_card(bundle: Bundle, engines: Mapping[str, str] | None = None, loads: bool = True,
               **options: Unpack[CardOptions]) -> str:
    """Markdown, starting with the header that the Hugging Face hub reads. engines: those that read the model, each with
    the command that serves it. loads: whether `transformers` loads it."""
    spec = bundle.spec
    kind = "A masked diffusion" if spec.is_diffusion else "An autoregressive"
    usage = USAGE_DIFFUSION if spec.is_diffusion else USAGE_AUTOREGRESSIVE
    base = f"base_model: {quoted(spec.base_model)}\n" if spec.base_model else ""
    tags = json.dumps(TAGS_DIFFUSION if spec.is_diffusion else TAGS_AUTOREGRESSIVE)
    license, datasets = options.get("license"), options.get("datasets") or ()
    stated = f"license: {quoted(license)}\n" if license else ""
    stated += f"datasets: [{', '.join(map(quoted, datasets))}]\n" if datasets else ""
    facts = card_facts(bundle) | {"license": code(license),
                                  "datasets": ", ".join(str(code(name)) for name in datasets) or None}
    facts |= {f"{code(name)}": f"{value:.4g}" for name, value in (options.get("scores") or {}).items()}
    return (f"---\nlibrary_name: transformers\npipeline_tag: text-generation\ntags: {tags}\n{base}{stated}---\n\n"
            f"# {kind} language model\n\nConverted with dlm-jax.\n\n{table(facts)}\n"
            + how_to_run(engines or {}, usage if loads else ""))


def how_to_run(engines: Mapping[str, str], usage: str) -> str:
    """The sections on PyTorch, where it loads the model, and on engines."""
    path, sections = "path/to/this/directory", []
    if usage:
        sections.append(f"## How to load it\n\n```python\n{usage.format(name=path)}```\n")
    if engines:
        rows = (f"* {engine}" + (f": `{command.format(path=path)}`" if command else "")
                for engine, command in engines.items())
        sections.append("## Engines that read it\n\n" + "\n".join(rows) + "\n")
    return "\n".join(sections)


def card_facts(bundle: Bundle) -> dict[str, object]:
    """The rows of the table, by name; those that are None are not shown."""
    spec, config = bundle.spec, bundle.config
    facts: dict[str, object] = {
        "base model": code(spec.base_model), "base revision": code(spec.base_revision), "family": config.family,
        "parameters": f"{parameter_count(config):,}", "context": f"{config.max_length} tokens",
        "recipe": code(spec.recipe)}
    if spec.is_diffusion:
        facts |= {"mask token id": spec.mask_token_id, "attention rule": spec.rule, "block size": spec.block_size,
                  "alignment": f"{spec.alignment}: {ALIGNMENT[spec.alignment]}"}
    return facts


def adapter_card(bundle: Bundle, lora: Lora, base: Origin) -> str:
    """The card of adapters: which base they belong to, and how they are merged into it. bundle: what was trained."""
    spec, vocab_size = bundle.spec, bundle.config.vocab_size
    facts: dict[str, object] = {
        "base model": code(base.name), "base revision": code(base.revision),
        "weights of the base": f"SHA-256 `{base.sha256}`", "rank": lora.rank, "alpha": lora.alpha,
        "recipe": code(spec.recipe), "mask token id": spec.mask_token_id}
    resized = "" if vocab_size == base.vocab_size else (
        f"The mask token resized the vocabulary: the base has {base.vocab_size} rows, and the adapter belongs to a "
        f"model with {vocab_size}. PEFT alone needs the base resized first; `--mask` below does that.\n\n")
    made = f" --recipe {shlex.quote(spec.recipe)}" if spec.is_diffusion and spec.recipe else ""
    mask = "" if base.mask is None else f" --mask {shlex.quote(base.mask)}"
    command = printable(f"dlm import BASE{made}{mask} --adapter path/to/this/directory --out merged")
    return (f"---\nlibrary_name: peft\nbase_model: {quoted(base.name)}\n---\n\n# LoRA adapter\n\nTrained with "
            f"dlm-jax.\n\n{table(facts)}\n{resized}## How to merge it\n\n    {command}\n\nBASE is the base model as a "
            "Hugging Face directory or hub id; `dlm export` makes one of a native or work directory.\n")


def table(facts: Mapping[str, object]) -> str:
    """A Markdown table of names and values, without those that are None."""
    return "| | |\n|---|---|\n" + "".join(f"| {key} | {value} |\n" for key, value in facts.items() if value is not None)


def quoted(name: str) -> str:
    """A name as a YAML string. JSON's are."""
    return json.dumps(printable(name), ensure_ascii=False)


def code(name: str | None) -> str | None:
    """A name as a Markdown code span, which holds no markup; what would end it or its table cell is replaced."""
    return None if name is None else "`" + printable(name).replace("`", "'").replace("|", "\N{BROKEN BAR}") + "`"
