"""The stream is a function of (seed, step), each run through the data is whole, and damage is found and named."""

import itertools
import json
import threading

import numpy as np
import pytest

from dlm_jax.data import prepare as prepare_module
from dlm_jax.data.dataset import Dataset, check_tokenizer
from dlm_jax.errors import UserError

LAST_DIGITS = slice(1, 4)  # of a record: token 0 is the start token


def numbers(tokens):
    """The numbers that the records of `make_dataset` spell."""
    return [int("".join(map(chr, row[LAST_DIGITS]))) for row in tokens]


def take(dataset, steps, batch=4, seed=0, first_step=0):
    """The numbers of each of the first `steps` batches."""
    batches = dataset.batches(batch, seed, first_step)
    return [numbers(tokens) for tokens, _ in itertools.islice(batches, steps)]


def test_a_batch_does_not_depend_on_where_iteration_started(make_dataset):
    dataset = Dataset.open(make_dataset(11))
    whole = take(dataset, 12)
    for first in range(12):
        assert take(dataset, 12 - first, first_step=first) == whole[first:]


def test_the_order_depends_on_the_seed_alone(make_dataset):
    directory = make_dataset(11)
    orders = [take(Dataset.open(directory), 6, seed=seed) for seed in (0, 1, 2, 0, 2**32 + 7)]
    assert orders[0] == orders[3]
    assert len({str(order) for order in orders}) == 4


def test_an_epoch_visits_each_record_exactly_once_in_a_new_order(make_dataset):
    stream = list(itertools.chain(*take(Dataset.open(make_dataset(11)), 11)))
    epochs = [stream[start:start + 11] for start in range(0, 44, 11)]
    assert all(sorted(epoch) == list(range(11)) for epoch in epochs)
    assert len({str(epoch) for epoch in epochs}) == 4


@pytest.mark.parametrize("records", [1, 3])
def test_a_dataset_smaller_than_a_batch_fills_it_by_repetition(make_dataset, records):
    first, second = take(Dataset.open(make_dataset(records)), 2, batch=6)
    assert sorted(first + second) == sorted(list(range(records)) * (12 // records))


def test_a_batch_holds_whole_records(make_dataset):
    tokens, segments = next(Dataset.open(make_dataset(5)).batches(3, seed=0))
    assert tokens.shape == segments.shape == (3, 4)
    assert tokens.dtype == segments.dtype == np.int32
    assert (tokens[:, 0] == 1).all() and (segments == 1).all()


def test_rows_come_as_they_were_written(make_dataset, monkeypatch):
    monkeypatch.setattr(prepare_module, "SHARD_BYTES", 8 * 4 * 3)
    dataset = Dataset.open(make_dataset(8))
    assert len(dataset.shards) == 3
    assert numbers(dataset.rows(slice(None))[0]) == list(range(8))
    assert numbers(dataset.rows(slice(2, 99, 2))[0]) == [2, 4, 6]
    assert numbers(dataset.rows([7, 0, -1])[0]) == [7, 0, 7]
    assert dataset.rows([])[0].shape == (0, 4)
    with pytest.raises(IndexError):
        dataset.rows([8])


def test_a_closed_iterator_leaves_no_thread(make_dataset):
    before = set(threading.enumerate())
    batches = Dataset.open(make_dataset(8)).batches(2, seed=0)
    next(batches)
    readers = set(threading.enumerate()) - before
    assert readers
    batches.close()
    for reader in readers:
        reader.join(timeout=5)
        assert not reader.is_alive()


def test_a_damaged_record_is_named(make_dataset, monkeypatch):
    monkeypatch.setattr(prepare_module, "SHARD_BYTES", 8 * 4 * 3)
    dataset = Dataset.open(make_dataset(8))
    shard = dataset.directory / dataset.shards[1].name
    content = shard.read_bytes()
    record = content.index(b"4", 64)  # the fifth record, "004": number 1 of its shard
    shard.write_bytes(content[:record] + b"5" + content[record + 1:])
    named = "record 1 of .*records-00001.array_record is damaged"
    with pytest.raises(UserError, match=named):
        dataset.rows(slice(None))
    with pytest.raises(UserError, match=named):
        take(dataset, 4)


def test_a_record_of_another_length_is_named(make_dataset):
    directory = make_dataset(3)
    rewrite(directory, length=5)
    with pytest.raises(UserError, match="record 2 of .*records-00000.array_record is damaged"):
        Dataset.open(directory).rows([2])


def rewrite(directory, **changes):
    """Changes fields of the description."""
    path = directory / "dataset.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize("changes, named", [
    ({"format": 2}, "has a format that"),
    ({"shards": [{"name": "records-00000.array_record"}]}, "is not a prepared dataset .*records"),
    ({"surprise": 1}, "is not a prepared dataset .*surprise"),
    ({"shards": [{"name": "other.array_record", "records": 3}]}, "lacks its file .*other.array_record"),
    ({"shards": [{"name": "records-00000.array_record", "records": 4}]}, "holds 3 records instead of 4"),
])
def test_a_description_that_does_not_fit_is_refused(make_dataset, changes, named):
    directory = make_dataset(3)
    rewrite(directory, **changes)
    with pytest.raises(UserError, match=named):
        Dataset.open(directory)


@pytest.mark.parametrize("content", [None, "", "[]", "{}"])
def test_what_was_not_prepared_is_refused(tmp_path, content):
    if content is not None:
        (tmp_path / "dataset.json").write_text(content)
    with pytest.raises(UserError, match="is not a prepared dataset"):
        Dataset.open(tmp_path)


def test_a_cut_off_shard_is_refused(make_dataset):
    directory = make_dataset(3)
    shard = directory / "records-00000.array_record"
    shard.write_bytes(shard.read_bytes()[:100])
    with pytest.raises(UserError, match="records-00000.array_record holds 0 records instead of 3"):
        Dataset.open(directory)


def test_another_tokenizer_is_refused(make_dataset, characters):
    dataset = Dataset.open(make_dataset(3))
    check_tokenizer(dataset, characters)

    class Other:
        def fingerprint(self):
            return "words"

    with pytest.raises(UserError, match="prepared with another tokenizer .characters. than this one .words."):
        check_tokenizer(dataset, Other())
