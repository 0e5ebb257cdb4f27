"""`dlm sample --prompts`: JSON lines in, JSON lines out, in batches of similar length, on all devices and hosts.

A line in: `id`, either `prompt` or `infill`, and optionally `max_tokens`. A line out: `id`, `text`, `tokens` (the ids
that were written), `nfe` (forward passes). A line that cannot be served gives `id` and `error`; the others are served.

A result depends on its line's number and text and on the seed, and on no other line. Results are written one whole line
at a time, as they finish; run the same command again and it serves the lines that are missing. The command ends with
exit code 3 if it refused any line.
"""

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, TextIO

from dlm_jax.errors import UserError
from dlm_jax.files import write_text
from dlm_jax.language_model import LanguageModel, best_of
from dlm_jax.parallel.distributed import barrier, is_primary
from dlm_jax.sampling.generation import canvas_length
from dlm_jax.sampling.requests import Request, in_batches
from dlm_jax.sampling.settings import Settings
from dlm_jax.schema.json_text import MAX_LINE, parse_json, read_regular
from dlm_jax.schema.kinds import TEXT, Schema, check_fields, whole

MAX_REQUESTS = 2**32  # bytes of a file of requests or results
LINE: Schema = {"prompt": TEXT, "infill": TEXT, "max_tokens": whole(1)}  # and an `id`, which is any value but null
FIELDS = {"id", *LINE}


class Line(NamedTuple):
    """A line of the input."""

    number: int  # from 0
    id: Any  # any JSON value but null; None where the line has none
    requests: list[Request]  # one per choice of hole widths
    error: str | None  # why the line cannot be served


def sample_file(lm: LanguageModel, content: bytes, out: str | Path, settings: Settings, max_tokens: int,
                batch: int, progress: Callable[[int, int], None], host: tuple[int, int] = (0, 1)) -> dict[str, int]:
    """Serves the lines of `content` that are not yet in `out`, at most `batch` together.

    host: (i, n), this is host i of n. Each host serves every n-th batch into a file of its own; the first merges them
    at the end. progress: called with how many lines this host has served, and is to serve. Returns how many lines, over
    all hosts, are `served` now, were served `before`, and are `refused`, now or before.
    """
    lm.fill([], settings)  # raises for settings that no line can be served with
    lines = list(read_lines(lm, content, max_tokens))
    number, hosts = host
    own_file = Path(out) if hosts == 1 else Path(f"{out}.{number}-of-{hosts}")
    waiting = missing(lines, [Path(out), *host_files(Path(out))])
    truncate_partial_line(own_file)
    with open(own_file, "a", encoding="utf-8") as file:
        if number == 0:
            write_errors(file, waiting)
        serve(lm, waiting, lines, settings, batch, host, file, progress)
    barrier("all lines are served")
    if is_primary() and host_files(Path(out)):
        merge_host_files(Path(out))
    refused = sum(line.error is not None for line in lines)
    served = sum(line.error is None for line in waiting)
    return {"served": served, "refused": refused, "before": len(lines) - refused - served}


def sample_pipe(lm: LanguageModel, content: bytes, file: TextIO, settings: Settings, max_tokens: int, batch: int,
                progress: Callable[[int, int], None]) -> dict[str, int]:
    """Serves all lines of `content` into an open file, such as stdout, where nothing resumes. Returns how many lines
    are `served` and `refused`."""
    lm.fill([], settings)
    lines = list(read_lines(lm, content, max_tokens))
    write_errors(file, lines)
    serve(lm, lines, lines, settings, batch, (0, 1), file, progress)
    refused = sum(line.error is not None for line in lines)
    return {"served": len(lines) - refused, "refused": refused}


def serve(lm: LanguageModel, waiting: list[Line], lines: list[Line], settings: Settings, batch: int,
          host: tuple[int, int], file: TextIO, progress: Callable[[int, int], None]) -> None:
    """Writes the results of this host's waiting lines to its file."""
    numbers = {line.number for line in waiting}
    mine = [line for line in host_lines(lm, lines, settings, batch, host) if line.number in numbers]
    for start in range(0, len(mine), batch):
        group = mine[start:start + batch]
        for result in results(lm, group, settings, batch):
            write_result(file, result)
        progress(start + len(group), len(mine))


def host_lines(lm: LanguageModel, lines: list[Line], settings: Settings, batch: int,
               host: tuple[int, int]) -> list[Line]:
    """The lines of one of the hosts, short ones first: every n-th batch of all lines, whether answered or not, so that
    hosts that start at different times agree."""
    servable, size = [line for line in lines if line.error is None], settings.block_size_for(lm.spec)
    lengths = [canvas_length(line.requests, lm.config.max_length, size, lm.spec) for line in servable]
    number, hosts = host
    return [servable[i] for indices in list(in_batches(lengths, batch))[number::hosts] for i in indices]


def results(lm: LanguageModel, group: list[Line], settings: Settings, batch: int) -> Iterator[dict[str, Any]]:
    """The results of some lines. A line with holes of unknown width is several requests, of which the best counts."""
    requests = [request for line in group for request in line.requests]
    numbers = [line.number for line in group for _ in line.requests]
    samples = []
    for start in range(0, len(requests), batch):
        samples += lm.fill(requests[start:start + batch], settings, numbers[start:start + batch])
    candidates = iter(samples)
    for line in group:
        best = best_of([next(candidates) for _ in line.requests])
        written = [token for token, step in zip(best.tokens, best.commit_step) if step]
        yield {"id": line.id, "text": best.text, "tokens": written, "nfe": best.nfe}


def content_of(file: Path) -> bytes:
    """What a file of requests holds. Raises `UserError` where it cannot be read."""
    try:
        return read_regular(file, MAX_REQUESTS)
    except OSError as error:
        raise UserError(f"cannot read {file} ({error.strerror}); name a file of JSON lines") from error


def read_lines(lm: LanguageModel, content: bytes, max_tokens: int) -> Iterator[Line]:
    """The lines, each with its requests or its error."""
    seen: dict[str, int] = {}
    for number, text in enumerate(content.splitlines()):
        if not text.strip():
            continue
        fields: dict[str, Any] = {}
        try:
            fields = parse(text, number)
            key = json.dumps(fields["id"])
            if key in seen:
                raise UserError(f"line {number + 1} has the id of line {seen[key] + 1}; give it another")
            seen[key] = number
            yield Line(number, fields["id"], requests_of(lm, fields, max_tokens), None)
        except UserError as error:
            yield Line(number, fields.get("id"), [], str(error))


def parse(text: bytes, number: int) -> dict[str, Any]:
    """The object in a line, which has an id."""
    try:
        fields = parse_json(text, MAX_LINE)
    except ValueError as error:
        raise UserError(f"line {number + 1} is not JSON ({error}); correct it") from None
    if not isinstance(fields, dict) or fields.get("id") is None:
        raise UserError(f"line {number + 1} has no id; write an object with id and prompt or infill")
    return fields


def requests_of(lm: LanguageModel, fields: dict[str, Any], max_tokens: int) -> list[Request]:
    """The requests of a line. Raises `UserError` for fields that do not fit, and for what the model cannot serve."""
    if unknown := fields.keys() - FIELDS:
        raise UserError(f"the field {sorted(unknown)[0]!r} is not known; the fields are {', '.join(sorted(FIELDS))}")
    if ("prompt" in fields) == ("infill" in fields):
        raise UserError("a line has either a prompt or an infill; write one of them")
    check_fields(fields, LINE, "the line")
    if None in fields.values():
        raise UserError("null stands for no text and no number; leave the field out")
    if "prompt" in fields:
        requests = [lm.continuation(fields["prompt"], fields.get("max_tokens", max_tokens))]
    else:
        requests = lm.with_holes(fields["infill"])
    for request in requests:
        lm.check(request)
    return requests


def missing(lines: list[Line], files: list[Path]) -> list[Line]:
    """The lines that are not yet in the files: matched by id and, where they are refused, by error."""
    written = [read_result(text, file) for file in files for text in whole_lines(file)]
    done = {(json.dumps(result.get("id")), result.get("error")) for result in written}
    return [line for line in lines if (json.dumps(line.id), line.error) not in done]


def whole_lines(file: Path) -> list[bytes]:
    """The lines of a file without a last one that a kill cut short; none where there is no file."""
    return read_regular(file, MAX_REQUESTS).split(b"\n")[:-1] if file.exists() else []


def read_result(text: bytes, file: Path) -> dict[str, Any]:
    """A result written by an earlier command. Raises `UserError` for anything else."""
    try:
        result = parse_json(text, MAX_LINE)
    except ValueError:
        result = None
    if not isinstance(result, dict) or not {"text", "error"} & result.keys():
        raise UserError(f"{file} holds a line that was not written by `dlm sample --out`; name another file")
    return result


def truncate_partial_line(file: Path) -> None:
    """Removes the beginning of a line that a kill left at the end."""
    if file.exists() and not (content := read_regular(file, MAX_REQUESTS)).endswith(b"\n"):
        os.truncate(file, content.rfind(b"\n") + 1)


def write_errors(file: TextIO, lines: list[Line]) -> None:
    """Writes the results of the lines that cannot be served."""
    for line in lines:
        if line.error is not None:
            write_result(file, {"id": line.id, "error": line.error})


def write_result(file: TextIO, result: dict[str, Any]) -> None:
    """Writes one line, and flushes it."""
    file.write(json.dumps(result, ensure_ascii=False) + "\n")
    file.flush()


def host_files(out: Path) -> list[Path]:
    """The files of the hosts."""
    return sorted(out.parent.glob(f"{out.name}.*-of-*"))


def merge_host_files(out: Path) -> None:
    """Merges the files of all hosts into `out`. A kill at any point loses no line and doubles none."""
    lines = dict.fromkeys(line for file in (out, *host_files(out)) for line in whole_lines(file))
    write_text(out, "".join(line.decode() + "\n" for line in lines))
    for file in host_files(out):
        file.unlink()
