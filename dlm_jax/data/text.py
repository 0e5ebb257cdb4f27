"""Documents from files: plain text, JSON lines, Parquet, TensorFlow datasets."""

import functools
import hashlib
import io
import lzma
import sysconfig
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

from dlm_jax.data.inputs import TFDS, expand, open_bytes, open_stored, without_compression
from dlm_jax.data.tfds_text import tfds_texts
from dlm_jax.errors import UserError
from dlm_jax.schema.json_text import parse_json

SEPARATOR = "<|endoftext|>"  # on a line of its own in a .txt file, ends a document
MAX_DOCUMENT = 2**27  # characters
PARQUET_ROWS = 256  # rows held in memory at once
SKIPPED_FOLDERS = {"site-packages", "dist-packages", "test", "tests", "idle_test", "idlelib", "__pycache__"}


def read_documents(names: Sequence[str | Path], field: str = "text") -> Iterator[str]:
    """The documents of the files, in order, skipping those that are empty or only whitespace.

    names: whatever `inputs.expand` takes. The suffix says the format: `.jsonl` has one object per line, with the text
    in `field`; `.parquet` a column of that name; `.txt` is split at lines that are exactly `<|endoftext|>`; any other
    file is one document. All but Parquet may be compressed (`.gz`, `.bz2`, `.xz`, `.zst`). All text is UTF-8. Lines and
    rows are streamed, so memory does not grow with the number of documents in a file.

    Raises `UserError` naming the file and the line or row: immediately for a missing file, and for a field other than
    'text' where no file has fields; while reading for anything else; and at the end if no file holds any text.
    """
    inputs = expand(names)
    check_field(inputs, field)
    return _non_empty(inputs, field)


def check_field(names: Sequence[str], field: str) -> None:
    """Raises `UserError` if a field was chosen although none of these inputs from `inputs.expand` has any."""
    if field != "text" and not any(_has_fields(name) for name in names):
        raise UserError(f"none of {', '.join(names)} is JSONL, Parquet or a TensorFlow dataset, so there is no field "
                        f"'{field}'; leave out --text-field")


def _has_fields(name: str) -> bool:
    return name.startswith(TFDS) or without_compression(name).endswith((".jsonl", ".parquet"))


def _non_empty(names: list[str], field: str) -> Iterator[str]:
    found = False
    for name in names:
        for document in documents_of(name, field):
            found = True
            yield document
    if not found:
        raise UserError(f"{', '.join(names) or 'the list of files'} holds no text; name files that do")


def documents_of(name: str, field: str = "text") -> Iterator[str]:
    """The documents, possibly none, of one input from `inputs.expand`. Raises `UserError` as `read_documents` does."""
    return (document for document in _reader(name, field)(name) if document and not document.isspace())


def _reader(name: str, field: str) -> Callable[[str], Iterator[str]]:
    """The function that reads the documents of an input of this name."""
    if name.startswith(TFDS):
        return functools.partial(_tfds_documents, field=field)
    plain = without_compression(name)
    if plain.endswith(".jsonl"):
        return functools.partial(_json_documents, field=field)
    if plain.endswith(".parquet"):
        return functools.partial(_parquet_documents, field=field)
    return _separated_documents if plain.endswith(".txt") else _entire_file


def numbered_lines(name: str) -> Iterator[tuple[int, str]]:
    """(number, line) of a file from `inputs.expand`, counted from 1, with line endings as they are.

    Raises `UserError` for what cannot be read.
    """
    number = 0
    try:
        with open_bytes(name) as file:
            for number, line in enumerate(iter(lambda: file.readline(MAX_DOCUMENT + 1), b""), start=1):
                check_size(len(line), f"{name}, line {number}")
                yield number, line.decode("utf-8-sig" if number == 1 else "utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{name}, line {number} is not UTF-8 (byte {error.object[error.start]:#04x}); "
                        "convert the file to UTF-8") from error
    except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
        raise UserError(f"cannot read {name} after line {number} ({error}); restore the file") from error


def check_size(size: int, where: str) -> None:
    """Raises `UserError` for a text that is too long to be held in memory and tokenized."""
    if size > MAX_DOCUMENT:
        raise UserError(f"{where} makes a document of more than {MAX_DOCUMENT} characters; split it, in a .txt file by "
                        f"lines of {SEPARATOR}")


def _entire_file(name: str) -> Iterator[str]:
    yield from _documents(name, separator=None)


def _separated_documents(name: str) -> Iterator[str]:
    yield from _documents(name, SEPARATOR)


def _documents(name: str, separator: str | None) -> Iterator[str]:
    """The line break before a separator belongs to the separator, so a document is exactly the text between two."""
    lines, size = io.StringIO(newline=""), 0
    for number, line in numbered_lines(name):
        if line.rstrip("\r\n") == separator:
            yield lines.getvalue().removesuffix("\n").removesuffix("\r")
            lines, size = io.StringIO(newline=""), 0
        else:
            size += lines.write(line)
            check_size(size, f"{name}, line {number}")
    yield lines.getvalue()


def _json_documents(name: str, field: str) -> Iterator[str]:
    for where, record in json_lines(name):
        if not isinstance(record.get(field), str):
            raise UserError(f"{where} has no field '{field}' that is a string; its fields are "
                            f"{', '.join(record) or 'none'}: name the one that holds the text with --text-field")
        yield check_text(record[field], where, field)


def json_lines(name: str) -> Iterator[tuple[str, dict]]:
    """(location, object) for each line of a JSON-lines file, the location in words; any other value counts as {}.

    Raises `UserError` for a line that is not JSON.
    """
    for number, line in numbered_lines(name):
        if line.isspace():
            continue
        where = f"{name}, line {number}"
        try:
            record = parse_json(line.encode(), 4 * MAX_DOCUMENT)
        except ValueError as error:
            raise UserError(f"{where} is not JSON ({error}); write one JSON object per line") from error
        yield where, record if isinstance(record, dict) else {}


def _parquet_documents(name: str, field: str) -> Iterator[str]:
    import pyarrow
    import pyarrow.parquet
    row = 0
    try:
        with open_stored(name) as stored, pyarrow.parquet.ParquetFile(stored) as file:
            if field not in file.schema_arrow.names:
                raise UserError(f"{name} has no column '{field}', only {', '.join(file.schema_arrow.names)}; name one "
                                "with --text-field")
            batches = file.iter_batches(batch_size=PARQUET_ROWS, columns=[field])
            texts = (text for batch in batches for text in batch.column(0).to_pylist())
            for row, text in enumerate(texts, start=1):
                yield check_text(text, f"{name}, row {row}", field)
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {name} after row {row} ({error}); restore the file") from error


def _tfds_documents(name: str, field: str) -> Iterator[str]:
    for number, text in tfds_texts(name, field):
        yield check_text(text, f"{name}, record {number}", field)


def check_text(text: object, where: str, field: str) -> str:
    """`text` itself if it is a string that UTF-8 can encode: JSON can also spell half a surrogate pair.

    Raises `UserError` naming `where` otherwise.
    """
    if not isinstance(text, str):
        raise UserError(f"{where} has no field '{field}' that is a string; give each record one")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError(f"{where} holds half a surrogate pair, which is not text; remove it") from error
    return text


def python_stdlib_files() -> tuple[list[Path], list[Path]]:
    """The sources of the running Python's standard library, without its tests: (train, validation), about 95 % and 5 %.

    Both are sorted. Which split a file is in depends on its name alone, so it stays there when other files come or go.
    """
    root = Path(sysconfig.get_path("stdlib"))
    names = sorted(path.relative_to(root) for path in root.rglob("*.py"))
    names = [name for name in names if SKIPPED_FOLDERS.isdisjoint(name.parts)]
    return _files(root, names, validation=False), _files(root, names, validation=True)


def _files(root: Path, names: Iterable[Path], validation: bool) -> list[Path]:
    def held_out(name: Path) -> bool:
        return int(hashlib.sha256(name.as_posix().encode()).hexdigest(), 16) % 20 == 0

    return [root / name for name in names if held_out(name) == validation]
