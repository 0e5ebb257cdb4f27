"""`prepare` as an Apache Beam pipeline, for more text than one machine should read: every input file is a part that any
worker tokenises, packs and writes. The result is an ordinary dataset.

It needs the extra `dlm-jax[beam]`, and a directory that all workers and this process see under the same name.
"""

import json
import os
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dlm_jax.data.inputs import expand
from dlm_jax.data.own_directory import own_directory
from dlm_jax.data.prepare import check_length, describe, write_part
from dlm_jax.data.text import documents_of
from dlm_jax.data.tokenizer import Tokenizer
from dlm_jax.errors import UserError

TEMPORARY = ".part."


def prepare_with_beam(names: Sequence[str | Path], tokenizer: Tokenizer, length: int, out: str | Path,
                      flags: Sequence[str] = ()) -> dict:
    """Writes the documents of the inputs into the new directory `out`, as `prepare` does, and returns its description.

    Unlike there, each input file ends with a padded record and has shards of its own, so that the files depend neither
    on the runner nor on the number of its workers. `flags` are those of Beam, such as '--runner=DirectRunner'.

    Raises `UserError` for what `prepare` refuses, and where Beam is not installed or its pipeline fails.
    """
    beam = _import_beam()
    check_length(length)
    parts = list(enumerate(expand(names)))
    with own_directory(out) as directory:
        try:
            with beam.Pipeline(argv=list(flags)) as pipeline:
                (pipeline | beam.Create(parts) | beam.Reshuffle()
                 | beam.Map(_write_input, tokenizer, length, str(directory)))
        except Exception as error:  # of any kind: each runner has its own
            raise UserError(f"the Beam pipeline failed ({type(error).__name__}: {error}); mend that and start it "
                            "again") from error
        for left in directory.glob(f"{TEMPORARY}*"):  # by workers that died and whose parts others have written
            shutil.rmtree(left, ignore_errors=True)
        return describe([_take_result(directory, number) for number, _ in parts], tokenizer, length, directory)


def _import_beam() -> Any:
    try:
        import apache_beam
    except ImportError as error:
        raise UserError("Apache Beam is not installed; pip install 'dlm-jax[beam]'") from error
    return apache_beam


def _write_input(part: tuple[int, str], tokenizer: Tokenizer, length: int, out: str) -> None:
    """On a worker: the shards of one input file, and a file that says what they hold or what is wrong with the input.

    Beam may run this twice for one input, even at once: both write the same files, under other names until whole.
    """
    number, name = part
    with tempfile.TemporaryDirectory(dir=out, prefix=TEMPORARY) as temporary:
        directory = Path(temporary)
        try:
            result = write_part(documents_of(name), tokenizer, length, directory, f"records-{number:05d}")
        except UserError as error:
            result = {"error": str(error), "shards": []}
        (directory / _result_name(number)).write_text(json.dumps(result), encoding="utf-8")
        for file in [*(shard["name"] for shard in result["shards"]), _result_name(number)]:
            os.replace(directory / file, Path(out) / file)


def _result_name(number: int) -> str:
    return f"part-{number:05d}.json"


def _take_result(directory: Path, number: int) -> dict:
    """What part `number` holds; its file is removed. Raises `UserError` where something was wrong with the input."""
    file = directory / _result_name(number)
    result = json.loads(file.read_text(encoding="utf-8"))
    if "error" in result:
        raise UserError(result["error"])
    file.unlink()
    return result
