"""Many requests: JSON lines in, JSON lines out, in batches of like length, on all devices and hosts.

A line in: `id`, and `prompt` or `infill`, and `max_tokens` if it is not the usual. A line out: `id`, `text`, `tokens`
(the ids that were written), `forwards`. A line that cannot be served gives `id` and `error`, and the others go on.

What a line gives depends on its number, its text and the seed, and on no other line. Lines are written whole and in the
order in which they are finished; whoever starts again with the same files gets those that are missing.
"""

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from dlm_jax.cluster import leads, meet
from dlm_jax.errors import UserError
from dlm_jax.files import write_text
from dlm_jax.language_model import LanguageModel, best_of
from dlm_jax.sampling.generate import canvas_length
from dlm_jax.sampling.requests import Request, in_batches
from dlm_jax.sampling.settings import Settings

FIELDS = {"id", "prompt", "infill", "max_tokens"}


class Line(NamedTuple):
    """A line of the input: its number from 0, its id, and what is to be done, or why it cannot be."""

    number: int
    id: Any
    requests: list[Request]
    error: str | None


def sample_file(lm: LanguageModel, prompts: str | Path, out: str | Path, settings: Settings, max_tokens: int,
                batch: int, progress: Callable[[int, int], None], host: tuple[int, int] = (0, 1)) -> dict[str, int]:
    """Serves the lines of `prompts` that are not yet in `out`, at most `batch` together. host: (i, n), this is host i
    of n: it serves every n-th batch into a file of its own, and the first one joins them at the end. progress: called
    with how many lines this host has served, and is to serve. Returns how many lines, of all hosts, were `served`,
    `refused` and there `before`.
    """
    lm.fill([], settings)  # says what no line can mend
    lines = list(read_lines(lm, Path(prompts), max_tokens))
    number, hosts = host
    own = Path(out) if hosts == 1 else Path(f"{out}.{number}-of-{hosts}")
    waiting = missing(lines, [Path(out), *parts(Path(out))])
    mend(own)
    with open(own, "a", encoding="utf-8") as file:
        for line in waiting if number == 0 else []:
            if line.error is not None:
                write(file, {"id": line.id, "error": line.error})
        left = {line.number for line in waiting}
        mine = [line for line in share(lm, lines, settings, batch, host) if line.number in left]
        for start in range(0, len(mine), batch):
            group = mine[start:start + batch]
            for result in serve(lm, group, settings, batch):
                write(file, result)
            progress(start + len(group), len(mine))
    meet("all lines are served")
    if leads() and parts(Path(out)):
        join(Path(out))
    refused = sum(line.error is not None for line in waiting)
    return {"served": len(waiting) - refused, "refused": refused, "before": len(lines) - len(waiting)}


def share(lm: LanguageModel, lines: list[Line], settings: Settings, batch: int, host: tuple[int, int]) -> list[Line]:
    """The lines of one of the hosts, short ones first: every n-th batch, whatever is done already, so that hosts that
    start one after the other agree."""
    servable, size = [line for line in lines if line.error is None], settings.size(lm.card)
    lengths = [canvas_length(max(len(request.tokens) for request in line.requests), lm.config.max_length, size)
               for line in servable]
    number, hosts = host
    return [servable[i] for indices in list(in_batches(lengths, batch))[number::hosts] for i in indices]


def serve(lm: LanguageModel, group: list[Line], settings: Settings, batch: int) -> Iterator[dict[str, Any]]:
    """The results of some lines; a line with holes of unknown width is many requests."""
    todo = [(line.number, request) for line in group for request in line.requests]
    samples = iter([sample for start in range(0, len(todo), batch) for sample in lm.fill(
        [request for _, request in todo[start:start + batch]], settings,
        [number for number, _ in todo[start:start + batch]])])
    for line in group:
        best = best_of([next(samples) for _ in line.requests])
        written = [token for token, step in zip(best.tokens, best.order) if step]
        yield {"id": line.id, "text": best.text, "tokens": written, "forwards": best.forwards}


def read_lines(lm: LanguageModel, file: Path, max_tokens: int) -> Iterator[Line]:
    """The lines of a file, each read as far as it can be. Raises `UserError` where there is no file."""
    try:
        texts = file.read_bytes().splitlines()
    except OSError as error:
        raise UserError(f"cannot read {file} ({error.strerror}); name a file of JSON lines") from error
    seen: dict[str, int] = {}
    for number, text in enumerate(texts):
        if not text.strip():
            continue
        fields: Any = {}
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
    """The object in a line, with its id, and nothing that is not known."""
    try:
        fields = json.loads(text)
    except ValueError as error:
        raise UserError(f"line {number + 1} is not JSON ({error}); mend it") from None
    if not isinstance(fields, dict) or fields.get("id") is None:
        raise UserError(f"line {number + 1} has no id; write an object with id and prompt or infill")
    return fields


def requests_of(lm: LanguageModel, fields: dict[str, Any], max_tokens: int) -> list[Request]:
    """What a line asks for, checked."""
    if unknown := fields.keys() - FIELDS:
        raise UserError(f"the field {sorted(unknown)[0]!r} is not known; the fields are {', '.join(sorted(FIELDS))}")
    if ("prompt" in fields) == ("infill" in fields):
        raise UserError("a line has either a prompt or an infill; write one of them")
    text = fields.get("prompt", fields.get("infill"))
    most = fields.get("max_tokens", max_tokens)
    if not isinstance(text, str) or type(most) is not int:
        raise UserError("prompt and infill are texts and max_tokens is a whole number; mend the one that is not")
    requests = [lm.continuation(text, most)] if "prompt" in fields else lm.with_holes(text)
    for request in requests:
        lm.check(request)
    return requests


def missing(lines: list[Line], files: list[Path]) -> list[Line]:
    """The lines that are not yet in the files: by their id, and, where they are refused, by their error."""
    results = [read_result(text, file) for file in files for text in whole_lines(file)]
    done = {(json.dumps(result.get("id")), result.get("error")) for result in results}
    return [line for line in lines if (json.dumps(line.id), line.error) not in done]


def whole_lines(file: Path) -> list[bytes]:
    """The lines of a file, but for one that a kill has cut short; none where there is no file."""
    return file.read_bytes().split(b"\n")[:-1] if file.exists() else []


def read_result(text: bytes, file: Path) -> dict[str, Any]:
    """A line that was written before."""
    try:
        result = json.loads(text)
    except ValueError:
        result = None
    if not isinstance(result, dict) or not {"text", "error"} & result.keys():
        raise UserError(f"{file} holds a line that was not written by `dlm sample --out`; name another file")
    return result


def mend(file: Path) -> None:
    """Cuts off what a kill has left of a line."""
    if file.exists() and not (content := file.read_bytes()).endswith(b"\n"):
        os.truncate(file, content.rfind(b"\n") + 1)


def write(file: Any, result: dict[str, Any]) -> None:
    """One line, on its way to the disk at once."""
    file.write(json.dumps(result, ensure_ascii=False) + "\n")
    file.flush()


def parts(out: Path) -> list[Path]:
    """The files of the hosts."""
    return sorted(out.parent.glob(f"{out.name}.*-of-*"))


def join(out: Path) -> None:
    """Makes `out` of itself and the files of all hosts; a kill in between costs nothing and doubles nothing."""
    lines = dict.fromkeys(line for file in (out, *parts(out)) for line in whole_lines(file))
    write_text(out, "".join(line.decode() + "\n" for line in lines))
    for part in parts(out):
        part.unlink()
