"""The `README.md` of an export: what the model is, how it reads its outputs, and how to load it."""

from dlm_jax.models.bundle import Bundle
from dlm_jax.models.weights import parameter_count

HOW_DIFFUSION = """\
from transformers import AutoModel, AutoTokenizer

model = AutoModel.from_pretrained("{name}", trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained("{name}", trust_remote_code=True)
ids = tokenizer("Once upon a time", return_tensors="pt").input_ids
print(tokenizer.decode(model.generate(ids, max_new_tokens=64, temperature=0.8, top_p=0.95, seed=0)[0]))
"""
HOW_AUTOREGRESSIVE = """\
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("{name}")
tokenizer = AutoTokenizer.from_pretrained("{name}")
"""
ALIGNED = {"shifted": "the output at n-1 predicts token n", "same_position": "the output at n predicts token n"}


def model_card(bundle: Bundle) -> str:
    """Markdown with the header that the hub reads."""
    card = bundle.card
    kind = "A masked diffusion" if card.is_diffusion else "An autoregressive"
    how = HOW_DIFFUSION if card.is_diffusion else HOW_AUTOREGRESSIVE
    base = f"base_model: {card.base_model}\n" if card.base_model else ""
    facts = "".join(f"| {name} | {value} |\n" for name, value in card_facts(bundle).items() if value is not None)
    return (f"---\nlibrary_name: transformers\npipeline_tag: text-generation\n{base}---\n\n"
            f"# {kind} language model\n\nConverted with dlm-jax.\n\n| | |\n|---|---|\n{facts}\n"
            f"## How to load it\n\n```python\n{how.format(name='path/to/this/directory')}```\n")


def card_facts(bundle: Bundle) -> dict[str, object]:
    """The rows of the table; None is left out."""
    card, config = bundle.card, bundle.config
    facts: dict[str, object] = {
        "base model": card.base_model, "base revision": card.base_revision, "family": config.family,
        "parameters": f"{parameter_count(config):,}", "context": f"{config.max_length} tokens", "recipe": card.recipe}
    if card.is_diffusion:
        facts |= {"mask token id": card.mask_token_id, "attention rule": card.rule, "block size": card.block_size,
                  "alignment": f"{card.alignment}: {ALIGNED[card.alignment]}"}
    return facts
