"""Names of models, and mask tokens given to them."""

import dataclasses
import json
import shutil

import numpy as np
import pytest

from dlm_jax.convert import directories
from dlm_jax.convert.native import write_native
from dlm_jax.errors import UserError
from dlm_jax.models.bundle import Bundle
from dlm_jax.models.card import Card
from dlm_jax.models.mask_token import add_mask_row, reuse_mask_row
from dlm_jax.opening import open_bundle, open_tokenizer, with_mask


@pytest.fixture
def bundle(random_model):
    """A tiny model of 31 rows with a head of its own and no tokenizer."""
    config, params = random_model("llama")
    return Bundle(config, params, Card())


def test_a_native_and_a_hugging_face_directory_are_told_apart(bundle, base, tmp_path):
    write_native(tmp_path, bundle)
    assert open_bundle(tmp_path).config == bundle.config
    assert open_bundle(base).card.bos_token_id == 0


def test_what_came_from_the_hub_says_so(base, monkeypatch):
    revision = "0123456789" * 4
    monkeypatch.setattr("dlm_jax.opening.fetch", lambda source: directories.Fetched(base, revision))
    card = open_bundle("org/name").card
    assert (card.base_model, card.base_revision) == ("org/name", revision)


def test_a_new_mask_takes_the_next_id_and_the_mean_of_all_rows(bundle):
    masked, tokenizer = with_mask(bundle, None, "new")
    assert tokenizer is None and masked.card.mask_token_id == 31 and masked.config.vocab_size == 32
    for before, after in ((bundle.params["embed"]["tokens"], masked.params["embed"]["tokens"]),
                          (bundle.params["head"]["weight"].T, masked.params["head"]["weight"].T)):
        assert after.shape == (32, 16) and after.dtype == before.dtype
        np.testing.assert_array_equal(after[:31], before)
        np.testing.assert_allclose(after[31], before.mean(0), rtol=1e-5, atol=1e-6)


def test_a_spare_row_becomes_the_mask_and_the_others_stay(bundle):
    masked = add_mask_row(bundle, known_ids=29)
    before, after = bundle.params["embed"]["tokens"], masked.params["embed"]["tokens"]
    assert masked.card.mask_token_id == 29 and masked.config.vocab_size == 31
    np.testing.assert_array_equal(np.delete(after, 29, 0), np.delete(before, 29, 0))
    np.testing.assert_allclose(after[29], before[:29].mean(0), rtol=1e-5, atol=1e-6)


def test_a_tokenizer_that_knows_more_than_the_model_is_refused(bundle):
    with pytest.raises(UserError, match="knows 32 ids and the model has only 31 rows"):
        add_mask_row(bundle, known_ids=32)


def test_a_model_with_a_mask_keeps_it(bundle):
    masked = reuse_mask_row(bundle, 5)
    assert with_mask(masked, None, "new") == (masked, None)


def test_an_existing_id_or_token_becomes_the_mask_and_no_weight_changes(base):
    model = open_bundle(base)
    tokenizer = open_tokenizer(model)
    known = next(i for i in range(2, 30) if tokenizer.encode(tokenizer.decode([i])) == [i])
    by_token, _ = with_mask(model, tokenizer, tokenizer.decode([known]))
    by_id, _ = with_mask(model, tokenizer, str(known))
    assert by_token.card == by_id.card == dataclasses.replace(model.card, mask_token_id=known)
    assert by_token.params is model.params


def test_a_mask_that_has_another_duty_or_replaces_one_is_refused(base):
    model = open_bundle(base)
    tokenizer = open_tokenizer(model)
    with pytest.raises(UserError, match="starts or ends a text"):
        with_mask(model, tokenizer, "</s>")
    with pytest.raises(UserError, match="mask token is 17 already"):
        with_mask(reuse_mask_row(model, 17), tokenizer, "18")


@pytest.mark.parametrize("mask, words", [("31", "not in the vocabulary of 31"), ("word", "the model has no tokenizer"),
                                         ("²", "the model has no tokenizer")])
def test_a_mask_that_is_not_there_is_refused(bundle, mask, words):
    with pytest.raises(UserError, match=words):
        with_mask(bundle, None, mask)


def test_the_tokenizer_learns_the_mask_of_its_model(base):
    model = open_bundle(base)
    masked, tokenizer = with_mask(model, open_tokenizer(model), "new")
    assert tokenizer.mask_id == masked.card.mask_token_id == model.config.vocab_size
    assert open_tokenizer(masked).mask_id == masked.card.mask_token_id  # though its files do not know it yet


def test_text_starts_and_ends_with_the_tokens_that_the_model_names(base, tmp_path):
    """Qwen's configuration names a start token and its tokenizer does not; GPT-2 has one token for both ends."""
    shutil.copytree(base, tmp_path / "m")
    fields = json.loads((base / "config.json").read_text())
    for ids, expected in (({"bos_token_id": 7, "eos_token_id": 8}, (7, 8)),
                          ({"bos_token_id": None, "eos_token_id": 8}, (8, 8))):
        (tmp_path / "m" / "config.json").write_text(json.dumps(fields | ids))
        tokenizer = open_tokenizer(open_bundle(tmp_path / "m"))
        assert (tokenizer.bos_id, tokenizer.eos_id) == expected
        assert tokenizer.with_mask(id=tokenizer.size).bos_id == expected[0]
