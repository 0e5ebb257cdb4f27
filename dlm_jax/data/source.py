"""What a config or a command may name as data: a prepared directory, text files, or the sources of Python itself."""

from pathlib import Path
from typing import Literal

from dlm_jax.data.dataset import Dataset, check_tokenizer
from dlm_jax.data.prepare import prepare
from dlm_jax.data.text import python_stdlib_files, read_documents
from dlm_jax.data.tokenizer import Tokenizer
from dlm_jax.errors import UserError

STDLIB = "python-stdlib"


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
