"""Samples of the base as text to train on."""

import json

import pytest

from dlm_jax.commands.main import main
from dlm_jax.commands.self_generate import as_autoregressive
from dlm_jax.data.text import read_documents
from dlm_jax.errors import UserError
from dlm_jax.language_model import load
from dlm_jax.models.diffusion_spec import DiffusionSpec


def test_samples_are_documents_that_can_be_prepared_and_depend_on_the_seed(base, tmp_path, capsys):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        assert main(["self-generate", str(base), "--documents", "5", "--max-tokens", "8", "--batch", "3", "--json",
                     "--seed", str(seed), "--out", str(tmp_path / f"{name}.jsonl")]) == 0
    said = json.loads(capsys.readouterr().out.splitlines()[-1])
    a, b, c = ((tmp_path / f"{name}.jsonl").read_text() for name in "abc")
    assert a == b != c and said["documents"] == 5 and 0 < said["tokens"] <= 40
    assert len(set(a.splitlines())) == 5
    assert main(["prepare", "--text", str(tmp_path / "a.jsonl"), "--model", str(base), "--length", "8", "--out",
                 str(tmp_path / "records")]) == 0


def test_samples_start_with_their_prompts_and_continue_as_the_model_does(base, texts, tmp_path):
    assert main(["self-generate", str(base), "--documents", "3", "--max-tokens", "6", "--prompts", str(texts),
                 "--prompt-tokens", "5", "--temperature", "0", "--out", str(tmp_path / "a.jsonl")]) == 0
    lm = load(base)
    written = [json.loads(line)["text"] for line in (tmp_path / "a.jsonl").read_text().splitlines()]
    for text, document in zip(written, read_documents([texts])):
        prompt = lm.tokenizer.decode(lm.encode(document)[:6])
        assert text == lm.sample(prompt, max_tokens=6).text


def test_only_a_model_that_reads_left_to_right_can_self_generate():
    assert as_autoregressive(DiffusionSpec()).rule == "causal"
    both = DiffusionSpec("same_position", "block_causal", 4, 30, clean_half="token_causal")
    assert as_autoregressive(both).alignment == "shifted"
    for spec in (DiffusionSpec("shifted", "bidirectional", None, 30),
                 DiffusionSpec("same_position", "block_causal", 4, 30)):
        with pytest.raises(UserError, match="does not write left to right"):
            as_autoregressive(spec)
