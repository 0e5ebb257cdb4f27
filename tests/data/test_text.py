"""Documents are exactly what the files hold, and a bad file is named with its line."""

import bz2
import gzip
import json
import lzma

import pyarrow
import pyarrow.parquet
import pytest

from dlm_jax.data.text import python_stdlib_files, read_documents
from dlm_jax.errors import UserError

TEXTS = ["One.\n", "Zwei Wörter\r\n\r\nund \u2028 mehr.", "三"]


def test_every_format_gives_the_same_documents(tmp_path):
    lines = "".join(json.dumps({"text": text, "more": 1}) + "\n" for text in TEXTS)
    (tmp_path / "a.jsonl").write_text(lines)
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    table = pyarrow.table({"id": [1, 2, 3], "text": TEXTS})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet", row_group_size=2)
    (tmp_path / "a.txt").write_bytes("\n<|endoftext|>\n".join(TEXTS).encode())
    for name in ("a.jsonl", "a.jsonl.gz", "a.parquet", "a.txt"):
        assert list(read_documents([tmp_path / name])) == TEXTS


def test_a_text_without_separator_is_one_document(tmp_path):
    for name in ("a.txt", "b.py", "c.md"):
        (tmp_path / name).write_bytes("".join(TEXTS).encode())
    paths = sorted(tmp_path.iterdir())
    assert list(read_documents(paths)) == ["".join(TEXTS)] * 3


def test_a_byte_order_mark_is_not_text(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfa")
    assert list(read_documents([tmp_path / "a.txt"])) == ["a"]


def test_empty_documents_are_left_out(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": ""}\n\n{"text": "a"}\n{"text": " \\n"}\n')
    assert list(read_documents([tmp_path / "a.jsonl"])) == ["a"]


@pytest.mark.parametrize("name, content, named", [
    ("a.txt", b"good\nb\xe4d\n", "a.txt, line 2 is not UTF-8"),
    ("a.jsonl", b'{"text": "good"}\n{"text": \n', "a.jsonl, line 2 is not JSON"),
    ("a.jsonl", b'{"text": "good"}\n{"content": "a"}\n', "a.jsonl, line 2 has no field 'text'"),
    ("a.jsonl", b'{"text": 3}\n', "a.jsonl, line 1 has no field 'text'"),
    ("a.jsonl", b'["text"]\n', "a.jsonl, line 1 has no field 'text'"),
    ("a.jsonl", b'{"text": "a", "score": NaN}\n', "a.jsonl, line 1 is not JSON .NaN is not a number"),
    ("a.txt", gzip.compress(b"good\n", mtime=0), "a.txt is compressed and its name does not say so; add .gz"),
    ("a.txt", bz2.compress(b"good\n"), "a.txt is compressed and its name does not say so; add .bz2"),
    ("a.txt", lzma.compress(b"good\n"), "a.txt is compressed and its name does not say so; add .xz"),
    ("a.txt.xz", b"good\n", "cannot read .*a.txt.xz"),
    ("a.txt.bz2", b"good\n", "cannot read .*a.txt.bz2"),
    ("a.txt.bz2", bz2.compress(b"a" * 2**23), "a.txt.bz2 swells to more than 200 times its size"),
    ("a.txt.gz", gzip.compress(b"a" * 2**23, mtime=0), "a.txt.gz swells to more than 200 times its size"),
    ("a.jsonl.gz", gzip.compress(b"\n" * 2**23, mtime=0), "a.jsonl.gz swells to more than 200 times its size"),
    ("a.jsonl", b'{"text": "\\ud800"}\n', "a.jsonl, line 1 is not JSON .it holds half a surrogate pair"),
    ("a.jsonl", b"[" * 100_000, "a.jsonl, line 1 is not JSON"),
    ("a.jsonl.gz", b"{}", "cannot read .*a.jsonl.gz"),
    ("a.jsonl.gz", gzip.compress(b'{"text": "a"}\n' * 99, mtime=0)[:-9], "cannot read .*a.jsonl.gz"),
    ("a.parquet", b"PAR1", "cannot read .*a.parquet"),
    ("a.md", b" \n", "a.md holds no text"),
    ("a.txt", b"", "a.txt holds no text"),
])
def test_a_bad_file_is_named(tmp_path, name, content, named):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=named):
        list(read_documents([tmp_path / name]))


def test_a_bad_parquet_table_is_named(tmp_path):
    pyarrow.parquet.write_table(pyarrow.table({"content": ["a"]}), tmp_path / "a.parquet")
    pyarrow.parquet.write_table(pyarrow.table({"text": ["a", None]}), tmp_path / "b.parquet")
    with pytest.raises(UserError, match="a.parquet has no column 'text', only content"):
        list(read_documents([tmp_path / "a.parquet"]))
    with pytest.raises(UserError, match="b.parquet, row 2 has no field 'text'"):
        list(read_documents([tmp_path / "b.parquet"]))


def test_the_text_is_in_the_field_that_was_named(tmp_path):
    rows = [{"text": "no", "content": text, "id": 1} for text in TEXTS]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    (tmp_path / "a.txt").write_text("plain")  # has no fields, and may stand beside files that do
    names = [tmp_path / name for name in ("a.jsonl", "a.parquet", "a.txt")]
    assert list(read_documents(names, "content")) == [*TEXTS, *TEXTS, "plain"]
    with pytest.raises(UserError, match="line 1 has no field 'body' that is a string; its fields are text, "):
        list(read_documents(names, "body"))
    with pytest.raises(UserError, match="a.parquet has no column 'body', only text, content, id; name one"):
        list(read_documents(names[1:], "body"))
    with pytest.raises(UserError, match="none of .*a.txt is JSONL.* no field 'content'; leave out --text-field"):
        read_documents(names[2:], "content")


def test_a_missing_file_is_named_before_anything_is_read(tmp_path):
    (tmp_path / "a.txt").write_text("a")
    with pytest.raises(UserError, match="there is no file .*b.txt"):
        read_documents([tmp_path / "a.txt", tmp_path / "b.txt"])


def test_the_standard_library_without_its_tests_is_split_in_two():
    train, validation = python_stdlib_files()
    assert (train, validation) == python_stdlib_files()
    assert not set(train) & set(validation)
    assert "dataclasses.py" in {path.name for path in train + validation}
    assert not {"test", "tests", "site-packages"} & {part for path in train + validation for part in path.parts}
    assert 0.02 < len(validation) / len(train + validation) < 0.1
    assert sum(map(len, read_documents(validation))) > 100_000
