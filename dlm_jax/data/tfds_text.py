"""Documents from a TensorFlow dataset, through its random-access files and without TensorFlow."""

import re
from collections.abc import Iterator
from typing import Any

from dlm_jax.data.inputs import TFDS
from dlm_jax.errors import UserError

FORM = re.compile(TFDS + r"(?P<dataset>[^:]+(:\d[^:]*)?)(:(?P<split>\D.*))?")

def tfds_texts(name: str) -> Iterator[tuple[int, object]]:
    """The numbered values of the feature `text` of `tfds:NAME[:VERSION][:SPLIT]`, by default of the split 'train'.

    NAME is as in `tfds.data_source`, with its config, in the directory that TFDS_DATA_DIR names. Raises
    `UserError` where it cannot be opened or has no such feature.
    """
    source = _open(name)
    for number in range(len(source)):
        record = source[number]
        if not isinstance(record, dict) or "text" not in record:
            raise UserError(f"{name} has no feature 'text'; name a dataset that has")
        yield number, _decoded(record["text"], f"{name}, record {number}")


def _decoded(text: object, place: str) -> object:
    """TFDS gives text as bytes."""
    if not isinstance(text, bytes):
        return text
    try:
        return text.decode()
    except UnicodeDecodeError as error:
        raise UserError(f"{place} is not UTF-8; convert it") from error


def _open(name: str) -> Any:
    try:
        named = FORM.fullmatch(name)
        if named is None:
            raise ValueError("it is not of the form tfds:NAME[:VERSION][:SPLIT]")
        import tensorflow_datasets as tfds  # seconds of import
        return tfds.data_source(named["dataset"], split=named["split"] or "train", download=False)
    except Exception as error:  # of all kinds: no such name, no such split, not prepared, files in sequence only
        cause = str(error).strip().split("\n")[0] or type(error).__name__
        raise UserError(f"cannot read {name} ({cause}); name TFDS_DATA_DIR and prepare the dataset there with "
                        "`tfds build --file_format=array_record`") from error
