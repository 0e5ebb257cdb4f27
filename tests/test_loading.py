"""Models are found by name, and get a mask token if they need one."""

import dataclasses
import json
import random
import shutil

import jax
import numpy as np
import pytest

from dlm_jax.convert.hub import Fetched
from dlm_jax.convert.native import write_native
from dlm_jax.errors import UserError
from dlm_jax.language_model import load
from dlm_jax.loading import load_bundle, load_tokenizer, with_mask_token
from dlm_jax.models.bundle import Bundle
from dlm_jax.models.diffusion_spec import DiffusionSpec
from dlm_jax.models.mask_token import add_mask_row, reuse_mask_row


@pytest.fixture
def bundle(random_model):
    """A tiny model with 31 embedding rows, an untied head and no tokenizer."""
    config, params = random_model("llama")
    return Bundle(config, params, DiffusionSpec())


def test_a_native_and_a_hugging_face_directory_are_distinguished(bundle, base, tmp_path):
    write_native(tmp_path, bundle)
    assert load_bundle(tmp_path).config == bundle.config
    assert load_bundle(base).spec.bos_token_id == 0


def test_a_model_from_the_hub_records_its_id_and_commit(base, monkeypatch):
    revision = "0123456789" * 4
    monkeypatch.setattr("dlm_jax.loading.fetch", lambda source: Fetched(base, revision))
    spec = load_bundle("org/name").spec
    assert (spec.base_model, spec.base_revision) == ("org/name", revision)


def test_a_new_mask_takes_the_next_id_and_the_mean_of_all_rows(bundle):
    masked, tokenizer = with_mask_token(bundle, None, "new")
    assert tokenizer is None and masked.spec.mask_token_id == 31 and masked.config.vocab_size == 32
    for before, after in ((bundle.params["embed"]["tokens"], masked.params["embed"]["tokens"]),
                          (bundle.params["head"]["weight"].T, masked.params["head"]["weight"].T)):
        assert after.shape == (32, 16) and after.dtype == before.dtype
        np.testing.assert_array_equal(after[:31], before)
        np.testing.assert_allclose(after[31], before.mean(0), rtol=1e-5, atol=1e-6)


def test_a_spare_row_becomes_the_mask_and_the_others_are_unchanged(bundle):
    masked = add_mask_row(bundle, known_ids=29)
    before, after = bundle.params["embed"]["tokens"], masked.params["embed"]["tokens"]
    assert masked.spec.mask_token_id == 29 and masked.config.vocab_size == 31
    np.testing.assert_array_equal(np.delete(after, 29, 0), np.delete(before, 29, 0))
    np.testing.assert_allclose(after[29], before[:29].mean(0), rtol=1e-5, atol=1e-6)


def test_a_tokenizer_with_more_ids_than_the_model_has_rows_is_refused(bundle):
    with pytest.raises(UserError, match="knows 32 ids but the model has only 31 rows"):
        add_mask_row(bundle, known_ids=32)


def test_a_model_with_a_mask_keeps_it(bundle):
    masked = reuse_mask_row(bundle, 5)
    assert with_mask_token(masked, None, "new") == (masked, None)


def test_an_existing_id_or_token_becomes_the_mask_and_no_weight_changes(base):
    model = load_bundle(base)
    tokenizer = load_tokenizer(model)
    known = next(i for i in range(2, 30) if tokenizer.encode(tokenizer.decode([i])) == [i])
    by_token, _ = with_mask_token(model, tokenizer, tokenizer.decode([known]))
    by_id, _ = with_mask_token(model, tokenizer, str(known))
    assert by_token.spec == by_id.spec == dataclasses.replace(model.spec, mask_token_id=known)
    assert by_token.params is model.params


def test_a_mask_that_has_another_role_or_replaces_one_is_refused(base):
    model = load_bundle(base)
    tokenizer = load_tokenizer(model)
    with pytest.raises(UserError, match="starts or ends a text"):
        with_mask_token(model, tokenizer, "</s>")
    with pytest.raises(UserError, match="mask token is 17 already"):
        with_mask_token(reuse_mask_row(model, 17), tokenizer, "18")


@pytest.mark.parametrize("mask, words", [("31", "not in the vocabulary of 31"), ("word", "the model has no tokenizer"),
                                         ("²", "the model has no tokenizer")])
def test_a_mask_that_does_not_exist_is_refused(bundle, mask, words):
    with pytest.raises(UserError, match=words):
        with_mask_token(bundle, None, mask)


def test_the_tokenizer_gets_the_mask_of_its_model(base):
    model = load_bundle(base)
    masked, tokenizer = with_mask_token(model, load_tokenizer(model), "new")
    assert tokenizer.mask_id == masked.spec.mask_token_id == model.config.vocab_size
    assert load_tokenizer(masked).mask_id == masked.spec.mask_token_id  # though its files do not know it yet


def test_text_starts_and_ends_with_the_tokens_that_the_model_names(base, tmp_path):
    """Qwen's configuration names a start token that its tokenizer does not; GPT-2 uses one token for both ends."""
    shutil.copytree(base, tmp_path / "m")
    fields = json.loads((base / "config.json").read_text())
    for ids, expected in (({"bos_token_id": 7, "eos_token_id": 8}, (7, 8)),
                          ({"bos_token_id": None, "eos_token_id": 8}, (8, 8))):
        (tmp_path / "m" / "config.json").write_text(json.dumps(fields | ids))
        tokenizer = load_tokenizer(load_bundle(tmp_path / "m"))
        assert (tokenizer.bos_id, tokenizer.eos_id) == expected
        assert tokenizer.with_mask(id=tokenizer.size).bos_id == expected[0]


def test_no_flipped_bit_of_a_saved_model_or_its_tokenizer_is_loaded(base, tmp_path):
    intact = load(base)
    intact.save(tmp_path / "intact")
    chance, refused = random.Random(0), set()
    names = sorted(path.name for path in (tmp_path / "intact").iterdir())
    for name in 8 * names:
        shutil.rmtree(tmp_path / "flipped", ignore_errors=True)
        file = shutil.copytree(tmp_path / "intact", tmp_path / "flipped") / name
        data = bytearray(file.read_bytes())
        data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
        file.write_bytes(data)
        try:
            back = load(tmp_path / "flipped")
            assert (back.config, back.spec) == (intact.config, intact.spec)
            assert jax.tree.all(jax.tree.map(np.array_equal, back.params, intact.params))
            assert back.text_tokenizer().fingerprint() == intact.text_tokenizer().fingerprint()
        except UserError as error:
            assert name in str(error)
            refused.add(name)
    assert refused == set(names)


@pytest.mark.parametrize("rows", [40, 200])
def test_a_tokenizer_with_ids_that_have_no_row_is_refused_when_both_are_loaded(random_model, base, tmp_path, rows):
    config, params = random_model("llama", vocab_size=rows)
    write_native(tmp_path, Bundle(config, params, DiffusionSpec()))
    shutil.copy(base / "tokenizer.json", tmp_path)
    shutil.copy(base / "tokenizer_config.json", tmp_path)
    with pytest.raises(UserError, match=rf"{tmp_path} has ids up to \d+ and the model has only {rows} rows"):
        load_tokenizer(load_bundle(tmp_path))


def test_a_mask_token_that_the_tokenizer_gets_has_a_row_too(base):
    model = load_bundle(base)
    beyond = dataclasses.replace(model, spec=dataclasses.replace(model.spec, mask_token_id=model.config.vocab_size))
    with pytest.raises(UserError, match="has ids up to"):
        load_tokenizer(beyond)
