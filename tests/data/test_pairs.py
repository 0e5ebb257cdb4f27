"""Prompts and answers as records: what is a prompt, what is learned, and that documents are not split."""

import json

import numpy as np
import pytest

from dlm_jax.commands.main import main
from dlm_jax.data.dataset import Dataset
from dlm_jax.data.pairs import prepare_pairs, read_pairs
from dlm_jax.data.tokenizer import Tokenizer
from dlm_jax.errors import UserError
from dlm_jax.segments import PROMPT_BIT, predictable, split_prompt_bit

PAIRS = [("the cat", "sat"), ("a dog ran on the hill", "it was quiet"), ("under", "the mat and then all"),
         ("a cat", "ran")]


@pytest.fixture(scope="module")
def tokenizer(base) -> Tokenizer:
    return Tokenizer.load(base)


def records(tmp_path, tokenizer, length: int, end_tokens: int | None):
    prepare_pairs(PAIRS, tokenizer, length, tmp_path / "records", end_tokens)
    tokens, segments = Dataset.open(tmp_path / "records").rows(slice(None))
    return tokens, *map(np.asarray, split_prompt_bit(segments))


def expected(tokenizer, prompt: str, answer: str) -> tuple[list[int], list[int]]:
    """(ids before the answer, the answer's ids with the end token)."""
    return [0, *tokenizer.encode(prompt + "\n")], [*tokenizer.encode(answer), 1]


def test_packed_pairs_are_whole_documents_one_after_the_other(tmp_path, tokenizer):
    tokens, documents, is_prompt = records(tmp_path, tokenizer, 24, 1)
    found = []
    for row, numbers, prompt in zip(tokens, documents, is_prompt):
        for number in range(1, numbers.max() + 1):
            own = numbers == number
            found.append((row[own & prompt].tolist(), row[own & ~prompt].tolist()))
    assert found == [expected(tokenizer, *pair) for pair in PAIRS]
    assert 1 < len(tokens) < len(PAIRS) and (documents == 0).any()
    assert not is_prompt[documents == 0].any()


def test_without_a_number_each_record_is_filled_with_end_tokens_to_be_learned(tmp_path, tokenizer):
    tokens, documents, is_prompt = records(tmp_path, tokenizer, 24, None)
    assert len(tokens) == len(PAIRS) and (documents == 1).all()
    for row, prompt, pair in zip(tokens, is_prompt, PAIRS):
        before, answer = expected(tokenizer, *pair)
        assert row[prompt].tolist() == before
        assert row[~prompt].tolist() == answer + [1] * (24 - len(before) - len(answer))
    assert np.asarray(predictable(documents))[:, 1:].all()


def test_as_many_end_tokens_are_learned_as_are_asked_for(tmp_path, tokenizer):
    tokens, documents, is_prompt = records(tmp_path, tokenizer, 64, 3)
    answers = [row[(numbers == number) & ~prompt].tolist() for row, numbers, prompt in zip(tokens, documents, is_prompt)
               for number in range(1, numbers.max() + 1)]
    assert answers == [expected(tokenizer, *pair)[1] + [1, 1] for pair in PAIRS]


def test_a_chat_prompt_is_the_template_s_with_one_start_token(tmp_path, tokenizer, base):
    chat = Tokenizer.load(base)
    chat.wrapped.chat_template = "{{ bos_token }}{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}:"
    prepare_pairs(PAIRS[:1], chat, 24, tmp_path / "records", chat=True)
    tokens, segments = Dataset.open(tmp_path / "records").rows(slice(None))
    prompt = tokens[0][segments[0] >= PROMPT_BIT].tolist()
    assert prompt[0] == 0 and 0 not in prompt[1:]
    assert tokenizer.decode(prompt[1:]) == "[user]the cat:"
    with pytest.raises(UserError, match="no chat template; leave out --apply-chat-template"):
        prepare_pairs(PAIRS, tokenizer, 24, tmp_path / "plain", chat=True)


def test_a_pair_that_is_too_long_loses_the_start_of_its_prompt_and_then_the_end_of_its_answer(tmp_path, tokenizer):
    pairs = [("the cat sat on the mat", "dog"), ("a", "the hill was quiet and the dog ran on under it")]
    prepare_pairs(pairs, tokenizer, 8, tmp_path / "records")
    tokens, segments = Dataset.open(tmp_path / "records").rows(slice(None))
    before, answer = expected(tokenizer, "the cat sat on the mat", "dog")
    assert tokens[0].tolist() == [0, *before[len(before) - (7 - len(answer)):], *answer]
    long = expected(tokenizer, "a", "the hill was quiet and the dog ran on under it")[1]
    assert tokens[1].tolist() == [0, *tokenizer.encode("\n"), *long[:6]]
    assert (segments[1] >= PROMPT_BIT).tolist() == [True] * 2 + [False] * 6


@pytest.mark.parametrize("names", [("prompt", "answer"), ("question", "answer"), ("instruction", "output")])
def test_the_usual_field_names_are_read(tmp_path, names):
    file = tmp_path / "pairs.jsonl"
    file.write_text("".join(json.dumps(dict(zip(names, pair))) + "\n" for pair in PAIRS))
    assert list(read_pairs([file])) == PAIRS


@pytest.mark.parametrize("line, words", [
    ('{"question": "a"}', "line 1 has no field 'prompt' that is a string"),
    ('{"question": "a", "answer": 3}', "line 1 has no field 'answer' that is a string"), ("[1]", "no field 'prompt'")])
def test_a_line_without_its_fields_is_refused(tmp_path, line, words):
    (tmp_path / "pairs.jsonl").write_text(line + "\n")
    with pytest.raises(UserError, match=words):
        list(read_pairs([tmp_path / "pairs.jsonl"]))


@pytest.mark.slow
def test_gsm8k_is_prepared_and_trained_on_from_the_command_line(shared, base, tiny_config, tiny_run, tmp_path):
    lines = (shared / "gsm8k" / "train.jsonl").read_text().splitlines()[:12]
    (tmp_path / "gsm.jsonl").write_text("\n".join(lines) + "\n")
    assert main(["prepare", "--pairs", str(tmp_path / "gsm.jsonl"), "--model", str(base), "--length", "64",
                 "--end-tokens", "all", "--out", str(tmp_path / "gsm")]) == 0
    assert len(Dataset.open(tmp_path / "gsm").rows(slice(None))[0]) == 12
    changes = [*tiny_run, f"data.train={tmp_path / 'gsm'}", f"data.validation={tmp_path / 'gsm'}", "train.steps=2"]
    assert main(["train", "--config", str(tiny_config), "--workdir", str(tmp_path / "run"),
                 *(f"--config.{change}" for change in changes)]) == 0


@pytest.mark.parametrize("flags, words", [
    (["--length", "3"], "has no room for a prompt and its answer"),
    (["--length", "8", "--processes", "2"], "leave out --beam and --processes"),
    (["--length", "8", "--end-tokens", "0"], "--end-tokens"), (["--length", "8", "--end-tokens", "x"], "--end-tokens")])
def test_pairs_that_cannot_be_prepared_are_refused(tmp_path, base, capsys, flags, words):
    (tmp_path / "pairs.jsonl").write_text('{"prompt": "a", "answer": "b"}\n')
    assert main(["prepare", "--pairs", str(tmp_path / "pairs.jsonl"), "--model", str(base), "--out",
                 str(tmp_path / "out"), *flags]) == 2
    assert words in capsys.readouterr().err and not (tmp_path / "out").exists()
