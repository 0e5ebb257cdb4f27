"""A tokenizer that needs no files, and datasets made with it."""

import pytest

from dlm_jax.data.prepare import prepare


class CharacterTokenizer:
    """One token a character. It offers what `prepare` uses of a `Tokenizer`."""

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
    """Prepares a dataset of `records` records of 4 tokens, no two of which are equal; returns its directory."""
    def make(records):
        texts = [f"{number:03d}" for number in range(records)]
        prepare(texts, characters, 4, tmp_path / "dataset")
        return tmp_path / "dataset"
    return make
