"""A mixture is a function of (seed, step): its proportions are exact, and each source has its own epochs."""

import itertools

import numpy as np
import pytest

from dlm_jax.data.dataset import Dataset
from dlm_jax.data.mixture import PERIOD, Mixture, apportion, schedule
from dlm_jax.data.prepare import prepare
from dlm_jax.data.source import load_source, load_training_data
from dlm_jax.errors import UserError

WEIGHTS = (0.6, 0.3, 0.1)


@pytest.fixture
def mixture(make_dataset):
    """7 records that count from 0, 50 from 100 and 5 from 900."""
    directories = [make_dataset(7, "a"), make_dataset(50, "b", 100), make_dataset(5, "c", 900)]
    return Mixture(tuple(Dataset.open(directory) for directory in directories), WEIGHTS)


@pytest.fixture
def take(numbers):
    """Reads the numbers of each of the first `steps` batches of 10."""
    def take(data, steps, seed=0, first_step=0, shard=(0, 1)):
        return [numbers(tokens) for tokens, _ in itertools.islice(data.batches(10, seed, first_step, shard), steps)]

    return take


def source_of(number):
    return 0 if number < 100 else 1 if number < 900 else 2


def test_over_a_period_the_proportions_are_exact():
    counts = apportion((0.693584, 0.306416))  # SlimPajama and StarCoder
    assert counts.tolist() == [693_584, 306_416]
    assert np.bincount(schedule(counts)[0]).tolist() == counts.tolist()
    assert apportion((2, 2, 2)).tolist() == [333_334, 333_333, 333_333]


@pytest.mark.parametrize("weights", [(1,), (0.69, 0.31), (5, 3, 1, 0.2, 0.001), (1e-6, 1)])
def test_at_every_row_each_source_is_close_to_its_proportion(weights):
    counts = apportion(weights)
    sources, index = schedule(counts)
    for number, count in enumerate(counts):
        mine = sources == number
        assert np.abs(np.cumsum(mine) - np.arange(1, PERIOD + 1) * (count / PERIOD)).max() < 1.5
        assert (index[mine] == np.arange(count)).all()


def test_rows_come_from_the_sources_that_are_reported(mixture, take):
    for step, batch in enumerate(take(mixture, 8)):
        assert [source_of(number) for number in batch] == mixture.sources(10, step).tolist()
    assert mixture.sources(10, 3).dtype == np.int32
    assert np.bincount(mixture.sources(1000, 0)).tolist() == [600, 300, 100]
    assert mixture.names == ("a", "b", "c") and mixture.length == 4


def test_each_source_has_its_own_epochs_each_in_a_new_order(mixture, take):
    rows = sum(take(mixture, 50), [])  # 300 of a, 150 of b, 50 of c
    for records in (set(range(7)), set(range(100, 150)), set(range(900, 905))):
        mine = [number for number in rows if number in records]
        epochs = [mine[start:start + len(records)] for start in range(0, len(mine) - len(records) + 1, len(records))]
        assert len(epochs) >= 3 and all(set(epoch) == records for epoch in epochs)
        assert len({str(epoch) for epoch in epochs}) > 1


@pytest.mark.parametrize("first", [0, 1, 7, PERIOD // 10 - 2])
def test_a_batch_depends_neither_on_where_iteration_started_nor_on_how_many_processes_read_it(mixture, take, first):
    full = take(mixture, 4, first_step=first)  # the last `first` crosses from one period to the next
    assert take(mixture, 3, first_step=first + 1) == full[1:]
    for count in (2, 5):
        shards = [take(mixture, 4, first_step=first, shard=(index, count)) for index in range(count)]
        assert [sum(rows, []) for rows in zip(*shards)] == full
        sources = [mixture.sources(10, first, (index, count)) for index in range(count)]
        assert np.concatenate(sources).tolist() == mixture.sources(10, first).tolist()


def test_the_seed_changes_the_records_and_not_the_sources(mixture, take):
    ours, other = sum(take(mixture, 4, seed=0), []), sum(take(mixture, 4, seed=1), [])
    assert ours != other and list(map(source_of, ours)) == list(map(source_of, other))
    assert take(mixture, 4, seed=0) == take(mixture, 4, seed=0)


def test_a_mixture_of_one_dataset_equals_that_dataset(mixture, take):
    dataset = mixture.datasets[0]
    assert take(Mixture((dataset,), (3,)), 5, seed=4) == take(dataset, 5, seed=4)


@pytest.mark.parametrize("weights, words", [
    ((1, 0, 1), "must be positive"), ((1, -1, 1), "must be positive"), ((1, float("inf"), 1), "must be positive"),
    ((1, float("nan"), 1), "must be positive")])
def test_weights_that_are_not_positive_are_refused(mixture, weights, words):
    with pytest.raises(UserError, match=words):
        Mixture(mixture.datasets, weights)


def test_a_weight_below_a_millionth_is_refused():
    with pytest.raises(UserError, match="weight 1e-07 is less than a millionth"):
        apportion((1.0, 1e-7))


def test_sources_that_differ_in_length_or_tokenizer_are_refused(mixture, characters, tmp_path):
    first = mixture.datasets[0]
    prepare(["once"], characters, 5, tmp_path / "longer")

    class Other(type(characters)):
        def fingerprint(self):
            return "words"

    prepare(["once"], Other(), 4, tmp_path / "words")
    with pytest.raises(UserError, match="a has records of 4 tokens and .*longer records of 5 tokens; prepare"):
        Mixture((first, Dataset.open(tmp_path / "longer")), (1, 1))
    with pytest.raises(UserError, match="a has the tokenizer characters and .*words the tokenizer words; prepare"):
        Mixture((first, Dataset.open(tmp_path / "words")), (1, 1))
    with pytest.raises(UserError, match="same directory twice"):
        Mixture((first, first), (1, 1))


def test_a_mixture_is_written_in_one_line(mixture, characters, tmp_path):
    paths = [dataset.directory for dataset in mixture.datasets]
    text = f"{paths[0]}:0.6, {paths[1]}:.3,{paths[2]}:1e-1"
    assert load_training_data(text, characters, 4, tmp_path / "prepared") == mixture
    assert load_training_data(str(paths[0]), characters, 4, tmp_path / "prepared") == mixture.datasets[0]


def test_a_text_in_a_mixture_is_prepared_once(mixture, characters, tmp_path):
    (tmp_path / "new.txt").write_text("once upon a time")
    text = f"{mixture.directory}:1,{tmp_path / 'new.txt'}:1"
    loaded = load_training_data(text, characters, 4, tmp_path / "prepared")
    alone = load_source(str(tmp_path / "new.txt"), "train", characters, 4, tmp_path / "prepared" / "1")
    assert loaded.datasets[1] == alone


def test_sources_with_equal_names_are_called_by_their_paths(make_dataset):
    datasets = [Dataset.open(make_dataset(3, f"{name}/train")) for name in ("a", "b")]
    assert Mixture(tuple(datasets), (1, 1)).names == tuple(str(dataset.directory) for dataset in datasets)


@pytest.mark.parametrize("text, words", [
    ("a:0.5,b", "'b' has no weight"), ("a:0.5,b:0.1.2", "weight '0.1.2' is not a number"),
    ("a:0.5,b:0.5", "there is no a; name"), ("a,b", "there is no a,b; name")])
def test_a_mixture_that_cannot_be_read_is_refused(text, words, characters, tmp_path):
    with pytest.raises(UserError, match=words):
        load_training_data(text, characters, 4, tmp_path)
