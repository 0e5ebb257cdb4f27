"""What a config may name as data: a prepared directory, a text file, Python's own sources, or a mixture."""

import re
from pathlib import Path
from typing import Literal

from dlm_jax.data.dataset import Dataset, check_tokenizer
from dlm_jax.data.mixture import Mixture
from dlm_jax.data.prepare import prepare
from dlm_jax.data.text import python_stdlib_files, read_documents
from dlm_jax.data.tokenizer import Tokenizer
from dlm_jax.errors import UserError

STDLIB = "python-stdlib"
WEIGHTED = re.compile(r"(?P<name>.+):(?P<weight>[0-9.]+(?:[eE][+-]?[0-9]+)?)")


def load_training_data(source: str, tokenizer: Tokenizer | None, length: int, prepared: Path) -> Dataset | Mixture:
    """Loads what `data.train` names: one source, or a mixture such as 'data/slimpajama:0.69,data/starcoder:0.31'.

    Weights are relative. Raises `UserError` as `load_source` does, for a source without a weight beside weighted ones,
    and for sources that do not fit together.
    """
    entries = [entry.strip() for entry in source.split(",")]
    weighted = [WEIGHTED.fullmatch(entry) for entry in entries]
    if not any(weighted) or Path(source).exists():
        return load_source(source, "train", tokenizer, length, prepared)
    names, weights = [], []
    for entry, match in zip(entries, weighted):
        if match is None:
            raise UserError(f"data.train: '{entry}' has no weight; write a mixture as PATH:WEIGHT,PATH:WEIGHT")
        names.append(match["name"])
        weights.append(_number(match["weight"]))
    datasets = [load_source(name, "train", tokenizer, length, prepared / str(i)) for i, name in enumerate(names)]
    return Mixture(tuple(datasets), tuple(weights))


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise UserError(f"data.train: the weight '{text}' is not a number; write one such as 0.5") from None


def load_source(source: str, split: Literal["train", "validation"], tokenizer: Tokenizer | None, length: int,
                prepared: Path) -> Dataset:
    """Loads the dataset that `source` names. Text is packed once, into records of `length` tokens under `prepared`.

    Raises `UserError` if nothing of that name can be read, and for records of another tokenizer or length.
    """
    path = Path(source)
    if path.is_dir():
        dataset = Dataset.open(path)
        if tokenizer is not None:
            check_tokenizer(dataset, tokenizer)
        return dataset
    if source != STDLIB and not path.is_file():
        raise UserError(f"data.{split}: there is no {source}; name a directory made by `dlm prepare`, a text file, or "
                        f"'{STDLIB}'")
    if tokenizer is None:
        raise UserError(f"{source} is text and the model has no tokenizer; name a directory made by `dlm prepare`")
    if not prepared.exists():
        prepare(read_documents(_text_files(source, split)), tokenizer, length, prepared)
    dataset = Dataset.open(prepared)
    check_tokenizer(dataset, tokenizer)
    if dataset.length != length:
        raise UserError(f"{prepared} holds records of {dataset.length} tokens but data.seq_length is {length}; remove "
                        "it or choose another work directory")
    return dataset


def _text_files(source: str, split: Literal["train", "validation"]) -> list[Path]:
    if source != STDLIB:
        return [Path(source)]
    train, validation = python_stdlib_files()
    return validation if split == "validation" else train
