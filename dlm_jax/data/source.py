"""What a config may name as data: a prepared directory, a text file, the sources of Python itself, or a mixture."""

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


def open_training(source: str, tokenizer: Tokenizer | None, length: int, made: Path) -> Dataset | Mixture:
    """What `data.train` names: one source, or a mixture such as 'data/slimpajama:0.69,data/starcoder:0.31'.

    Weights are relative. Raises `UserError` as `open_source` does, for a source without a weight beside others that
    have one, and for sources that do not fit together.
    """
    parts = [part.strip() for part in source.split(",")]
    weighted = [WEIGHTED.fullmatch(part) for part in parts]
    if not any(weighted) or Path(source).exists():
        return open_source(source, "train", tokenizer, length, made)
    names, weights = [], []
    for part, match in zip(parts, weighted):
        if match is None:
            raise UserError(f"data.train: '{part}' has no weight; write a mixture as PATH:WEIGHT,PATH:WEIGHT")
        names.append(match["name"])
        weights.append(_number(match["weight"]))
    opened = [open_source(name, "train", tokenizer, length, made / str(number)) for number, name in enumerate(names)]
    return Mixture(tuple(opened), tuple(weights))


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise UserError(f"data.train: the weight '{text}' is not a number") from None


def open_source(source: str, split: Literal["train", "validation"], tokenizer: Tokenizer | None, length: int,
                made: Path) -> Dataset:
    """The dataset that `source` names; text is packed into records of `length` tokens under the directory `made`, once.

    Raises `UserError` where nothing of that name can be read, and for records of another tokenizer or length.
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
    if not made.exists():
        files = python_stdlib_files()[split == "validation"] if source == STDLIB else [path]
        prepare(read_documents(files), tokenizer, length, made)
    dataset = Dataset.open(made)
    check_tokenizer(dataset, tokenizer)
    if dataset.length != length:
        raise UserError(f"{made} holds records of {dataset.length} tokens and data.length is {length}; remove it or "
                        "choose another work directory")
    return dataset
