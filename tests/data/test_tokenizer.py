"""Text survives the tokenizer, and the tokenizer says who it is."""

import json
import random

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


def test_a_batch_equals_its_texts_one_by_one(tokenizer):
    texts = [TEXT, "", "a"]
    assert tokenizer.encode_batch(texts) == [tokenizer.encode(text) for text in texts]


def test_pieces_of_a_text_join_to_the_text(tokenizer):
    ids = tokenizer.encode(TEXT)
    pieces = tokenizer.pieces(ids)
    assert len(pieces) == len(ids) and "".join(pieces) == TEXT


def test_pieces_of_any_ids_show_every_mask_in_its_place(tokenizer):
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


def test_saved_and_loaded_it_is_the_same(tokenizer, tmp_path):
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
    whole = json.loads((byte_level / "tokenizer.json").read_text())
    whole["model"]["merges"].pop()
    (tmp_path / "tokenizer.json").write_text(json.dumps(whole))
    (tmp_path / "tokenizer_config.json").write_text((byte_level / "tokenizer_config.json").read_text())
    assert Tokenizer.load(tmp_path).fingerprint() != Tokenizer.load(byte_level).fingerprint()


def test_a_story_is_cut_as_the_model_learned_it(shared):
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
