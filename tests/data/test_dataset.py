"""The stream is a function of (seed, step), every epoch is complete, and damage is found and named."""

import importlib
import itertools
import json
import subprocess
import sys
import threading

import numpy as np
import pytest

from dlm_jax.data.dataset import Dataset, check_tokenizer
from dlm_jax.errors import UserError

prepare_module = importlib.import_module("dlm_jax.data.prepare")  # `dlm_jax.data.prepare` itself is the function


@pytest.fixture
def take(numbers):
    """Reads the numbers of each of the first `steps` batches."""
    def take(dataset, steps, batch=4, seed=0, first_step=0, shard=(0, 1)):
        batches = dataset.batches(batch, seed, first_step, shard)
        return [numbers(tokens) for tokens, _ in itertools.islice(batches, steps)]

    return take


def test_a_batch_does_not_depend_on_where_iteration_started(make_dataset, take):
    dataset = Dataset.open(make_dataset(11))
    full = take(dataset, 12)
    for first in range(12):
        assert take(dataset, 12 - first, first_step=first) == full[first:]


def test_the_order_depends_on_the_seed_alone(make_dataset, take):
    directory = make_dataset(11)
    orders = [take(Dataset.open(directory), 6, seed=seed) for seed in (0, 1, 2, 0, 2**32 + 7)]
    assert orders[0] == orders[3]
    assert len({str(order) for order in orders}) == 4


def test_an_epoch_visits_each_record_exactly_once_in_a_new_order(make_dataset, take):
    stream = list(itertools.chain(*take(Dataset.open(make_dataset(11)), 11)))
    epochs = [stream[start:start + 11] for start in range(0, 44, 11)]
    assert all(sorted(epoch) == list(range(11)) for epoch in epochs)
    assert len({str(epoch) for epoch in epochs}) == 4


@pytest.mark.parametrize("records", [1, 3])
def test_a_dataset_smaller_than_a_batch_repeats_to_fill_it(make_dataset, records, take):
    first, second = take(Dataset.open(make_dataset(records)), 2, batch=6)
    assert sorted(first + second) == sorted(list(range(records)) * (12 // records))


@pytest.mark.parametrize("count", [1, 2, 3, 6])
def test_the_shards_of_all_processes_make_up_the_batch(make_dataset, take, count):
    dataset = Dataset.open(make_dataset(11))
    full = take(dataset, 7, batch=6)
    shards = [take(dataset, 5, batch=6, first_step=2, shard=(index, count)) for index in range(count)]
    assert [sum(rows, []) for rows in zip(*shards)] == full[2:]


READ = """
import itertools, json, sys
from dlm_jax.data.dataset import Dataset
directory, first, index, count = sys.argv[1], *map(int, sys.argv[2:])
batches = Dataset.open(directory).batches(6, seed=5, first_step=first, shard=(index, count))
print(json.dumps([tokens.tolist() for tokens, _ in itertools.islice(batches, 3)]))
"""


@pytest.mark.slow
def test_a_run_resumes_with_another_number_of_processes(make_dataset):
    directory = make_dataset(11)
    full = [tokens.tolist() for tokens, _ in itertools.islice(Dataset.open(directory).batches(6, seed=5), 6)]
    for first, count in ((0, 2), (3, 3)):
        commands = [[sys.executable, "-c", READ, directory, first, index, count] for index in range(count)]
        outputs = [subprocess.run(list(map(str, command)), capture_output=True, check=True).stdout
                   for command in commands]
        assert [sum(rows, []) for rows in zip(*map(json.loads, outputs))] == full[first:first + 3]


def test_a_process_reads_only_the_records_of_its_shard(make_dataset, monkeypatch, take):
    monkeypatch.setattr(prepare_module, "SHARD_BYTES", 8 * 4)  # one record per file
    dataset = Dataset.open(make_dataset(40))
    mine, = take(dataset, 1, batch=40, shard=(1, 4))
    for number in set(range(40)) - set(mine):
        damage(dataset.directory / dataset.shards[number].name, f"{number % 10}")
    assert take(dataset, 1, batch=40, shard=(1, 4)) == [mine]
    with pytest.raises(UserError, match="is damaged"):
        take(dataset, 1, batch=40)


@pytest.mark.parametrize("batch, shard, words", [
    (6, (0, 4), "batch of 6 records cannot be split evenly over 4 processes"),
    (6, (2, 2), "no shard 2 of 2"), (6, (-1, 2), "no shard -1 of 2"), (6, (0, 0), "no shard 0 of 0")])
def test_an_impossible_shard_is_refused(make_dataset, batch, shard, words):
    dataset = Dataset.open(make_dataset(3))
    with pytest.raises(UserError, match=words):
        next(dataset.batches(batch, seed=0, shard=shard))
    with pytest.raises(UserError, match=words):
        dataset.sources(batch, 0, shard)


def test_all_rows_of_a_dataset_come_from_one_source(make_dataset):
    dataset = Dataset.open(make_dataset(3))
    assert dataset.names == ("dataset",) and dataset.sources(6, 3, (1, 2)).tolist() == [0, 0, 0]


def test_a_batch_holds_whole_records(make_dataset):
    tokens, segments = next(Dataset.open(make_dataset(5)).batches(3, seed=0))
    assert tokens.shape == segments.shape == (3, 4)
    assert tokens.dtype == segments.dtype == np.int32
    assert (tokens[:, 0] == 1).all() and (segments == 1).all()


def test_rows_come_back_as_they_were_written(make_dataset, monkeypatch, numbers):
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


def damage(shard, digit):
    """Corrupts the first record in the file that spells a number with this digit."""
    content = shard.read_bytes()
    record = content.index(digit.encode(), 64)  # after the header of the file
    shard.write_bytes(content[:record] + b"#" + content[record + 1:])


def test_a_damaged_record_is_named(make_dataset, monkeypatch, take):
    monkeypatch.setattr(prepare_module, "SHARD_BYTES", 8 * 4 * 3)
    dataset = Dataset.open(make_dataset(8))
    damage(dataset.directory / dataset.shards[1].name, "4")  # the fifth record, "004", is number 1 of its shard
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
    ({"format": 2}, "is of a format that"),
    ({"shards": [{"name": "records-00000.array_record"}]}, "is not a prepared dataset .*records"),
    ({"records": 4}, "do not add up to 4 records"),
    ({"shards": [{"name": "../r.array_record", "records": 3}]}, "which is not in its directory"),
    ({"length": True}, "length: True, which is not of type int"),
    ({"surprise": 1}, "is not a prepared dataset .*surprise"),
    ({"shards": [{"name": "other.array_record", "records": 3}]}, "lacks its file .*other.array_record"),
    ({"shards": [{"name": "records-00000.array_record", "records": 4}], "records": 4},
     "holds 3 records instead of 4"),
])
def test_a_description_that_does_not_match_is_refused(make_dataset, changes, named):
    directory = make_dataset(3)
    rewrite(directory, **changes)
    with pytest.raises(UserError, match=named):
        Dataset.open(directory)


@pytest.mark.parametrize("content", [None, "", "[]", "{}"])
def test_a_directory_that_was_not_prepared_is_refused(tmp_path, content):
    if content is not None:
        (tmp_path / "dataset.json").write_text(content)
    with pytest.raises(UserError, match="is not a prepared dataset"):
        Dataset.open(tmp_path)


def test_a_truncated_shard_is_refused(make_dataset):
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
