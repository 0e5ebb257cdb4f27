"""Where the files of a task lie."""

from pathlib import Path

from dlm_jax.errors import UserError


def find(data: str | None, folder: str, *names: str) -> Path:
    """The first of these files that there is, in `data` or in its `folder`. Raises `UserError` if there is none."""
    if data is None:
        raise UserError(f"this task reads {' or '.join(names)}; name their folder with --data DIR, or with --metadata "
                        "data=DIR for lm_eval")
    for path in (Path(data) / place / name for place in ("", folder) for name in names):
        if path.is_file():
            return path
    raise UserError(f"there is no {' or '.join(names)} in {data}, nor in {Path(data) / folder}; put it there")
