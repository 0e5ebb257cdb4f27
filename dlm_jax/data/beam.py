"""`prepare` as an Apache Beam pipeline, for more text than one machine should read.

Each input file is one part of the dataset: any worker can tokenize, pack and write it. The result is an ordinary
dataset. This needs the extra `dlm-jax[beam]`, and an output directory that every worker and this process see under the
same path.
"""

import json
import os
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

from dlm_jax.data.inputs import expand
from dlm_jax.data.prepare import check_length, write_description, write_part
from dlm_jax.data.text import check_field, documents_of
from dlm_jax.data.tokenizer import Tokenizer
from dlm_jax.errors import UserError
from dlm_jax.files import new_directory, read_json

TEMPORARY = ".part."


def prepare_with_beam(names: Sequence[str | Path], tokenizer: Tokenizer, length: int, out: str | Path,
                      flags: Sequence[str] = (), field: str = "text") -> dict:
    """Writes the documents of the inputs into the new directory `out`, as `prepare` does, and returns its description.

    Unlike with `prepare`, each input file has its own shards and ends with a padded record, so the output depends
    neither on the runner nor on the number of workers. `flags` are Beam's own, such as '--runner=DirectRunner'; `field`
    is as for `read_documents`.

    Raises `UserError` for whatever `prepare` rejects, if Beam is not installed, and if its pipeline fails.
    """
    beam = _import_beam()
    check_length(length)
    inputs = expand(names)
    check_field(inputs, field)
    parts = list(enumerate(inputs))
    with new_directory(out) as directory:
        try:
            with beam.Pipeline(argv=list(flags)) as pipeline:
                (pipeline | beam.Create(parts) | beam.Reshuffle()
                 | beam.Map(_write_input, tokenizer, length, str(directory), field))
        except Exception as error:  # every runner raises its own exception types
            raise UserError(f"the Beam pipeline failed ({type(error).__name__}: {error}); fix the cause and run it "
                            "again") from error
        for leftover in directory.glob(f"{TEMPORARY}*"):  # from workers that died; another worker redid their parts
            shutil.rmtree(leftover, ignore_errors=True)
        return write_description([_take_result(directory, number) for number, _ in parts], tokenizer, length, directory)


def _import_beam() -> ModuleType:
    try:
        import apache_beam
    except ImportError as error:
        raise UserError("Apache Beam is not installed; pip install 'dlm-jax[beam]'") from error
    return apache_beam


def _write_input(part: tuple[int, str], tokenizer: Tokenizer, length: int, out: str, field: str) -> None:
    """Runs on a worker: writes the shards of one input file, and a result file with their counts or with the error.

    Beam may run this twice for the same input, even concurrently. Both runs write the same bytes, each into its own
    temporary directory, and move the finished files into place.
    """
    number, name = part
    with tempfile.TemporaryDirectory(dir=out, prefix=TEMPORARY) as temporary:
        directory = Path(temporary)
        try:
            result = write_part(documents_of(name, field), tokenizer, length, directory, f"records-{number:05d}")
        except UserError as error:
            result = {"error": str(error), "shards": []}
        (directory / _result_name(number)).write_text(json.dumps(result), encoding="utf-8")
        for file in [*(shard["name"] for shard in result["shards"]), _result_name(number)]:
            os.replace(directory / file, Path(out) / file)


def _result_name(number: int) -> str:
    return f"part-{number:05d}.json"


def _take_result(directory: Path, number: int) -> dict:
    """Reads and deletes the result file of part `number`. Raises `UserError` if the input was at fault."""
    file = directory / _result_name(number)
    result = read_json(file)
    if "error" in result:
        raise UserError(result["error"])
    file.unlink()
    return result
