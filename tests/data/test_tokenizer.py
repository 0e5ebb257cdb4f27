"""Text survives a round trip through the tokenizer, and the fingerprint identifies it."""

import json
import random
import shutil

import pytest
from tokenizers import AddedToken, decoders, models, pre_tokenizers, trainers
from tokenizers import Tokenizer as Backend

from dlm_jax.data.tokenizer import Tokenizer
from dlm_jax.errors import UserError

TEXT = 'Once upon a time, "Zoë" saw 日本 and  two spaces.\n\n\tA tab; 🙂!\r\n'


@pytest.fixture(scope="module")
def byte_level(tmp_path_factory):
    """The directory of a byte-level BPE with one special token."""
    directory = tmp_path_factory.mktemp("byte_level")
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, show_progress=False)
    backend.train_from_iterator(["once upon a time there was a time"] * 4, trainer)
    backend.add_special_tokens([AddedToken("<|endoftext|>", special=True)])
    backend.enable_truncation(4)
    backend.save(str(directory / "tokenizer.json"))
    config = {"tokenizer_class": "TokenizersBackend", "bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>"}
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    return directory


@pytest.fixture(scope="module", params=["byte_level", "byte_fallback"])
def tokenizer(request):
    """A byte-level BPE trained here, and a sentencepiece-like one with byte fallback."""
    if request.param == "byte_level":
        return Tokenizer.load(request.getfixturevalue("byte_level"))
    return Tokenizer.load(request.getfixturevalue("shared") / "stories260k")


def test_text_roundtrips(tokenizer):
    for text in (TEXT, " leading", "", "\n"):
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_nothing_is_added_to_a_text(tokenizer):
    assert tokenizer.encode("") == []
    assert not {tokenizer.bos_id, tokenizer.eos_id} & set(tokenizer.encode(TEXT))


def test_a_batch_is_tokenized_like_its_texts_one_by_one(tokenizer):
    texts = [TEXT, "", "a"]
    assert tokenizer.encode_batch(texts) == [tokenizer.encode(text) for text in texts]


def test_pieces_of_a_text_join_to_the_text(tokenizer):
    ids = tokenizer.encode(TEXT)
    pieces = tokenizer.pieces(ids)
    assert len(pieces) == len(ids) and "".join(pieces) == TEXT


def test_pieces_of_any_ids_show_every_mask_at_its_index(tokenizer):
    masked = tokenizer.with_mask(id=tokenizer.size)
    draw = random.Random(0)
    for _ in range(100):
        ids = [draw.choice([masked.mask_id, draw.randrange(masked.size + 2)]) for _ in range(20)]
        pieces = masked.pieces(ids)
        assert [piece == "<|mask|>" for piece in pieces] == [token == masked.mask_id for token in ids]


def test_special_tokens_are_hidden_and_the_mask_is_shown(tokenizer):
    masked = tokenizer.with_mask(id=tokenizer.size)
    ids = [masked.bos_id, *masked.encode("a time"), masked.mask_id, masked.eos_id]
    assert masked.decode(ids) == "a time<|mask|>" == "".join(masked.pieces(ids))
    assert tokenizer.mask_id is None and masked.size == tokenizer.size + 1


def test_a_mask_with_another_id_than_expected_is_refused(tokenizer):
    with pytest.raises(UserError, match=f"{tokenizer.size} and the model expects 7"):
        tokenizer.with_mask(id=7)


def test_saving_and_loading_changes_nothing(tokenizer, tmp_path):
    tokenizer.with_mask(id=tokenizer.size).save(tmp_path)
    again = Tokenizer.load(tmp_path)
    assert again.encode(TEXT) == tokenizer.encode(TEXT)
    assert again.fingerprint() == tokenizer.fingerprint()
    assert (again.bos_id, again.eos_id, again.mask_id) == (tokenizer.bos_id, tokenizer.eos_id, tokenizer.size)


def test_a_directory_that_names_the_plain_class_is_read_as_transformers_reads_it(tokenizer, tmp_path):
    from transformers import AutoTokenizer
    tokenizer.with_mask(id=tokenizer.size).save(tmp_path)
    assert "TokenizersBackend" in (tmp_path / "tokenizer_config.json").read_text()
    again, theirs = Tokenizer.load(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    assert again.backend.to_str() == theirs.backend_tokenizer.to_str()
    assert (again.bos_id, again.eos_id, again.mask_id) == (theirs.bos_token_id, theirs.eos_token_id,
                                                           theirs.mask_token_id)


def test_another_vocabulary_has_another_fingerprint(byte_level, tmp_path):
    description = json.loads((byte_level / "tokenizer.json").read_text())
    description["model"]["merges"].pop()
    (tmp_path / "tokenizer.json").write_text(json.dumps(description))
    (tmp_path / "tokenizer_config.json").write_text((byte_level / "tokenizer_config.json").read_text())
    assert Tokenizer.load(tmp_path).fingerprint() != Tokenizer.load(byte_level).fingerprint()


def test_a_story_is_tokenized_as_in_training(shared):
    tokenizer = Tokenizer.load(shared / "stories260k")
    assert tokenizer.pieces(tokenizer.encode("Once upon a time, ")) == ["Once", " upon", " a", " time", ",", " "]
    with open(shared / "tinystories" / "tinystories_val.jsonl", encoding="utf-8") as lines:
        story = json.loads(next(lines))["text"]
    assert tokenizer.decode(tokenizer.encode(story)) == story


@pytest.mark.parametrize("content", [None, "{", "{}"])
def test_a_broken_tokenizer_is_named(tmp_path, content):
    if content is not None:
        (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(UserError, match=str(tmp_path)):
        Tokenizer.load(tmp_path)


def test_a_missing_directory_is_named(tmp_path):
    with pytest.raises(UserError, match="nowhere"):
        Tokenizer.load(tmp_path / "nowhere")


def test_saving_keeps_what_a_text_needs_and_nothing_that_names_code(byte_level, tmp_path):
    """A directory with code of its own is read without it, and does not hand it on to those who trust our export."""
    from transformers import AutoTokenizer
    source, out = shutil.copytree(byte_level, tmp_path / "source"), tmp_path / "out"
    template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    harmful = {"auto_map": {"AutoTokenizer": ["evil.Tokenizer", "evil.Tokenizer"]}, "processor_class": "Evil",
               "response_template": "x", "name_or_path": "/home/me", "custom": {"auto_map": "evil.Tokenizer"}}
    fields = json.loads((source / "tokenizer_config.json").read_text())
    (source / "tokenizer_config.json").write_text(json.dumps({
        **fields, **harmful, "padding_side": "left", "model_max_length": 512,
        "chat_template": [{"name": "default", "template": template}, {"name": "../../up", "template": template}]}))
    (source / "evil.py").write_text(f"open({str(tmp_path / 'executed')!r}, 'w')\n")
    tokenizer = Tokenizer.load(source)
    out.mkdir()
    tokenizer.with_mask(id=tokenizer.size).save(out)
    saved = json.loads((out / "tokenizer_config.json").read_text())
    assert not harmful.keys() & saved.keys() and "evil" not in json.dumps(saved).lower()
    assert (saved["padding_side"], saved["model_max_length"], saved["mask_token"]) == ("left", 512, "<|mask|>")
    assert sorted(path.name for path in out.iterdir()) == ["tokenizer.json", "tokenizer_config.json"]
    theirs = AutoTokenizer.from_pretrained(out, trust_remote_code=True)
    assert theirs.apply_chat_template([{"content": "a time"}], tokenize=False, chat_template="default") == "a time"
    assert theirs.encode(TEXT, add_special_tokens=False) == tokenizer.encode(TEXT)
    assert not (tmp_path / "executed").exists()


def test_the_largest_id_counts_gaps(byte_level, tmp_path):
    description = json.loads((byte_level / "tokenizer.json").read_text())
    assert Tokenizer.load(byte_level).largest_id == Tokenizer.load(byte_level).size - 1
    vocabulary = description["model"]["vocab"]
    vocabulary[max(vocabulary, key=vocabulary.get)] = 5000
    (tmp_path / "tokenizer.json").write_text(json.dumps(description))
    (tmp_path / "tokenizer_config.json").write_text((byte_level / "tokenizer_config.json").read_text())
    assert Tokenizer.load(tmp_path).largest_id >= 5000
