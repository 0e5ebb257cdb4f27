"""A tokenizer that needs no files, and datasets made with it."""

import pytest

from dlm_jax.data.prepare import prepare


class CharacterTokenizer:
    """One token per character, with just the methods of `Tokenizer` that `prepare` uses."""

    bos_id, eos_id = 1, None

    def encode_batch(self, texts):
        return [[ord(character) for character in text] for text in texts]

    def fingerprint(self):
        return "characters"


@pytest.fixture(scope="session")
def characters():
    return CharacterTokenizer()


@pytest.fixture
def make_dataset(tmp_path, characters):
    """Prepares `records` records of 4 tokens that spell `first`, `first` + 1, ..., and returns their directory."""
    def make(records, name="dataset", first=0):
        texts = [f"{number:03d}" for number in range(first, first + records)]
        prepare(texts, characters, 4, tmp_path / name)
        return tmp_path / name
    return make


@pytest.fixture(scope="session")
def numbers():
    """The numbers that records of `make_dataset` spell; token 0 of a record is the start token."""
    return lambda tokens: [int("".join(map(chr, row[1:]))) for row in tokens]
