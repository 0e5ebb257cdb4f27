"""An export where dlm-jax is not installed: transformers, torch and the directory are enough."""

import dataclasses
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import dlm_jax

pytest.importorskip("torch")

HEAD = """
import sys, torch
sys.modules["dlm_jax"] = None  # importing it fails
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMaskedLM, AutoTokenizer, pipeline
where = {"pretrained_model_name_or_path": sys.argv[1], "trust_remote_code": True}
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1], trust_remote_code=False)
model = AutoModelForCausalLM.from_pretrained(**where)
"""


@pytest.fixture(scope="module")
def export(tmp_path_factory):
    """The bundled base with a mask token, as a bidirectional model; its text is of no use."""
    lm = dlm_jax.load("bundled").with_mask()
    directory = tmp_path_factory.mktemp("export") / "model"
    dataclasses.replace(lm, spec=dataclasses.replace(lm.spec, rule="bidirectional")).export(directory)
    return directory


@pytest.fixture(scope="module")
def python(export):
    """Runs a program after HEAD, in a directory of its own; returns what it prints."""
    def run(program, cwd=export.parent, head=HEAD):
        done = subprocess.run([sys.executable, "-c", head + program, str(export)], cwd=cwd, capture_output=True,
                              text=True, env={**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": ""})
        assert done.returncode == 0, done.stderr
        return done.stdout

    return run


@pytest.mark.slow
def test_both_auto_classes_the_pipeline_and_a_padded_batch_work(python):
    assert python("""
masked = AutoModelForMaskedLM.from_pretrained(**where)
assert AutoConfig.from_pretrained(**where).mask_token_id == tokenizer.mask_token_id
assert tokenizer.pad_token_id is not None and tokenizer.pad_token_id != tokenizer.mask_token_id
texts = ["def add(a, b):", "import"]
ids = tokenizer(texts[0], return_tensors="pt").input_ids
assert torch.equal(masked(ids).logits, model(ids).logits)

for side in ("left", "right"):
    tokenizer.padding_side = side
    batch = model.generate(**tokenizer(texts, return_tensors="pt", padding=True), max_new_tokens=6, stop_at_eos=False)
    for text, row in zip(texts, batch):
        alone = model.generate(**tokenizer(text, return_tensors="pt"), max_new_tokens=6, stop_at_eos=False)[0]
        assert torch.equal(row[-6:], alone[-6:]), (side, text)

pipe = pipeline("text-generation", model=model, tokenizer=tokenizer)
[answer] = pipe(texts[0], max_new_tokens=4)
assert answer["generated_text"].startswith(texts[0]) and len(answer["generated_text"]) > len(texts[0])

model.save_pretrained("again")
again = AutoModelForCausalLM.from_pretrained("again", trust_remote_code=True)
assert torch.equal(again(ids).logits, model(ids).logits)
assert torch.isfinite(model.to(torch.bfloat16)(ids).logits).all()
print("all")
""").endswith("all\n")


@pytest.mark.slow
def test_the_pipeline_loads_the_directory_and_half_precision_answers(python):
    assert python("""
pipe = pipeline("text-generation", model=sys.argv[1], trust_remote_code=True)
answers = pipe(["def add(a, b):", "import"], max_new_tokens=4, do_sample=False, batch_size=2)
assert [a["generated_text"].startswith(t) for [a], t in zip(answers, ["def add(a, b):", "import"])] == [True, True]
ids = tokenizer("import", return_tensors="pt").input_ids
assert torch.isfinite(model.half()(ids).logits).all() and model.generate(ids, max_new_tokens=4).shape[1] > ids.shape[1]
print("all")
""").endswith("all\n")


@pytest.mark.slow
def test_other_projects_samplers_run_and_give_the_tokens_of_generate(python):
    assert python(f"""
sys.path.insert(0, {str(Path(__file__).parent)!r})
import peer_samplers
mask, eos = tokenizer.mask_token_id, tokenizer.eos_token_id
start = model.config.eos_token_id if model.config.bos_token_id is None else model.config.bos_token_id
prompt = torch.tensor([[start, *tokenizer("def add(a, b):", add_special_tokens=False).input_ids]])
expected = model.generate(prompt, max_new_tokens=16, steps=8, block_length=8, stop_at_eos=False)
assert not (expected == mask).any()
peer_samplers.forbid(model, mask)
assert torch.equal(peer_samplers.dllm(model, list(prompt), 8, 16, 8, mask, eos,
                                      right_shift_logits=model.config.alignment == "shifted"), expected)
peer_samplers.fast_dllm(model, prompt, 8, 16, 8, mask, prefix_cache=True)
print("all")
""").endswith("all\n")


@pytest.mark.slow
def test_the_code_of_the_card_works(python, export):
    [code] = re.findall(r"```python\n(.*?)```", (export / "README.md").read_text(), re.S)
    head = 'import sys\nsys.modules["dlm_jax"] = None\n'
    assert "Once upon a time" in python(code.replace("path/to/this/directory", str(export)), head=head)
