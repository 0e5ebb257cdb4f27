"""Where the files of a task lie, and one that several tasks read."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from dlm_jax.data.text import check_text
from dlm_jax.errors import UserError
from dlm_jax.files import read_json

TRIVIAQA_FILE = "wikipedia-dev.json"  # of triviaqa-rc


def find(data: str | None, folder: str, *names: str) -> Path:
    """The first of these files that there is, in `data` or in its `folder`. Raises `UserError` if there is none."""
    if data is None:
        raise UserError(f"this task reads {' or '.join(names)}; name their folder with --data DIR, or with --metadata "
                        "data=DIR for lm_eval")
    for path in (Path(data) / place / name for place in ("", folder) for name in names):
        if path.is_file():
            return path
    raise UserError(f"there is no {' or '.join(names)} in {data}, nor in {Path(data) / folder}; put it there")


class Trivia(NamedTuple):
    """A question, its answer, and everything that is accepted as one."""

    question: str
    value: str
    accepted: tuple[str, ...]


def trivia_questions(path: Path) -> Iterator[Trivia]:
    """The questions of a file of TriviaQA (Joshi et al. 2017). Raises `UserError` if it is none."""
    entries = read_json(path).get("Data")
    if not isinstance(entries, list):
        raise UserError(f"{path} has no list 'Data'; take {TRIVIAQA_FILE} of triviaqa-rc")
    for number, entry in enumerate(entries):
        where, fields = f"{path}, question {number + 1}", entry if isinstance(entry, dict) else {}
        answer = fields.get("Answer")
        known: dict[str, Any] = answer if isinstance(answer, dict) else {}
        aliases = known.get("Aliases")
        value = check_text(known.get("Value"), where, "Answer.Value")
        accepted = tuple(check_text(alias, where, "Answer.Aliases")
                         for alias in (aliases if isinstance(aliases, list) else []))
        yield Trivia(check_text(fields.get("Question"), where, "Question"), value, accepted or (value,))
