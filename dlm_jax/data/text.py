"""Documents from files: plain text, JSON lines (gzipped or not), Parquet."""

import gzip
import hashlib
import json
import sysconfig
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

from dlm_jax.errors import UserError

SEPARATOR = "<|endoftext|>"  # alone on a line of a .txt file, it ends a document
PARQUET_ROWS = 256  # rows held in memory at a time
NOT_OURS = {"site-packages", "dist-packages", "test", "tests", "idle_test", "idlelib", "__pycache__"}


def read_documents(paths: Sequence[str | Path]) -> Iterator[str]:
    """The documents of the files, in order; those that are empty or only white space are left out.

    By suffix: `.jsonl` and `.jsonl.gz` hold one object with a field `text` a line, `.parquet` a column `text`; `.txt`
    is cut at lines that are exactly `<|endoftext|>`; any other file is one document. All text is UTF-8. Lines and rows
    are streamed, so memory does not grow with a file of many documents.

    Raises `UserError`, naming file and line or row: at once for a missing file, while reading for all else, and at the
    end where no file holds any text.
    """
    files = [Path(path) for path in paths]
    for file in files:
        if not file.is_file():
            raise UserError(f"there is no file {file}; name files of text, JSON lines or Parquet")
    return _non_empty(files)


def _non_empty(paths: list[Path]) -> Iterator[str]:
    found = False
    for path in paths:
        for document in _reader(path)(path):
            if document and not document.isspace():
                found = True
                yield document
    if not found:
        raise UserError(f"{', '.join(map(str, paths)) or 'the list of files'} holds no text; name files that do")


def _reader(path: Path) -> Callable[[Path], Iterator[str]]:
    """The function that turns a file of this name into documents."""
    name = path.name.lower()
    if name.endswith((".jsonl", ".jsonl.gz")):
        return _json_documents
    if name.endswith(".parquet"):
        return _parquet_documents
    return _separated_documents if name.endswith(".txt") else _whole_document


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """Numbered lines, their endings as they are."""
    number = 0
    try:
        with (gzip.open if path.name.lower().endswith(".gz") else open)(path, "rb") as file:
            for number, line in enumerate(file, start=1):
                yield number, line.decode("utf-8-sig" if number == 1 else "utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}, line {number} is not UTF-8 (byte {error.object[error.start]:#04x}); "
                        "convert the file to UTF-8") from error
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"cannot read {path} after line {number} ({error}); restore the file") from error


def _whole_document(path: Path) -> Iterator[str]:
    yield "".join(line for _, line in _lines(path))


def _separated_documents(path: Path) -> Iterator[str]:
    """The line break before a separator belongs to the separator, so a document is the text between."""
    kept: list[str] = []
    for _, line in _lines(path):
        if line.rstrip("\r\n") == SEPARATOR:
            yield "".join(kept).removesuffix("\n").removesuffix("\r")
            kept = []
        else:
            kept.append(line)
    yield "".join(kept)


def _json_documents(path: Path) -> Iterator[str]:
    for number, line in _lines(path):
        if line.isspace():
            continue
        try:
            record = json.loads(line)
        except (json.JSONDecodeError, RecursionError) as error:
            raise UserError(f"{path}, line {number} is not JSON ({error}); write one JSON object a line") from error
        text = record.get("text") if isinstance(record, dict) else None
        yield _checked(text, f"{path}, line {number}")


def _parquet_documents(path: Path) -> Iterator[str]:
    import pyarrow
    import pyarrow.parquet
    row = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            if "text" not in file.schema_arrow.names:
                raise UserError(f"{path} has no column 'text', only {', '.join(file.schema_arrow.names)}; rename one")
            batches = file.iter_batches(batch_size=PARQUET_ROWS, columns=["text"])
            texts = (text for batch in batches for text in batch.column(0).to_pylist())
            for row, text in enumerate(texts, start=1):
                yield _checked(text, f"{path}, row {row}")
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {path} after row {row} ({error}); restore the file") from error


def _checked(text: object, place: str) -> str:
    """`text` itself where it is text that UTF-8 can hold: JSON can also spell half a surrogate pair."""
    if not isinstance(text, str):
        raise UserError(f"{place} has no field 'text' that is a string; give each record one")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError(f"{place} holds half a surrogate pair, which is not text; remove it") from error
    return text


def python_stdlib_files() -> tuple[list[Path], list[Path]]:
    """The sources of the running Python's standard library, without its tests: about 95 % to train on, 5 % to validate.

    Sorted. A file's side depends on its name alone, so that it stays on it when other files come or go.
    """
    root = Path(sysconfig.get_path("stdlib"))
    names = sorted(path.relative_to(root) for path in root.rglob("*.py"))
    names = [name for name in names if NOT_OURS.isdisjoint(name.parts)]
    return _files(root, names, validation=False), _files(root, names, validation=True)


def _files(root: Path, names: Iterable[Path], validation: bool) -> list[Path]:
    def held_out(name: Path) -> bool:
        return int(hashlib.sha256(name.as_posix().encode()).hexdigest(), 16) % 20 == 0

    return [root / name for name in names if held_out(name) == validation]
