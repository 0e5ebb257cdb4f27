"""Documents from a TensorFlow dataset, read through its random-access files, without TensorFlow."""

import re
from collections.abc import Iterator, Sequence

from dlm_jax.data.inputs import TFDS
from dlm_jax.errors import UserError

FORM = re.compile(TFDS + r"(?P<dataset>[^:]+(:\d[^:]*)?)(:(?P<split>\D.*))?")


def tfds_texts(name: str, feature: str) -> Iterator[tuple[int, object]]:
    """(index, value) of a feature of `tfds:NAME[:VERSION][:SPLIT]`; the default split is 'train'.

    NAME is as in `tfds.data_source`, including its config, and is looked up in the directory TFDS_DATA_DIR.
    Raises `UserError` if it cannot be opened or has no such feature.
    """
    source = _open(name)
    for number in range(len(source)):
        record = source[number]
        if not isinstance(record, dict) or feature not in record:
            found = ", ".join(record) if isinstance(record, dict) else "an unnamed one"
            raise UserError(f"{name} has no feature '{feature}', only {found}; name one with --text-field")
        yield number, _decoded(record[feature], f"{name}, record {number}")


def _decoded(text: object, where: str) -> object:
    """`text` itself, or decoded from the bytes that TFDS returns."""
    if not isinstance(text, bytes):
        return text
    try:
        return text.decode()
    except UnicodeDecodeError as error:
        raise UserError(f"{where} is not UTF-8; convert it") from error


def _open(name: str) -> Sequence[object]:
    try:
        named = FORM.fullmatch(name)
        if named is None:
            raise ValueError("it is not of the form tfds:NAME[:VERSION][:SPLIT]")
        import tensorflow_datasets as tfds  # takes seconds to import
        return tfds.data_source(named["dataset"], split=named["split"] or "train", download=False)
    except Exception as error:  # of many kinds: no such name or split, not prepared, sequential files only
        cause = str(error).strip().split("\n")[0] or type(error).__name__
        raise UserError(f"cannot read {name} ({cause}); set TFDS_DATA_DIR and prepare the dataset there with "
                        "`tfds build --file_format=array_record`") from error
