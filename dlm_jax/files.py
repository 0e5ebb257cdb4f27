"""Writing that leaves the whole thing or nothing."""

import contextlib
import json
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dlm_jax.errors import UserError


def check_new(out: str | Path) -> None:
    """Raises `UserError` where `out` exists and is not an empty directory: better before long work than after it."""
    out = Path(out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out} already exists and is not an empty directory; name a new one or remove it")


@contextlib.contextmanager
def new_directory(out: str | Path) -> Iterator[Path]:
    """A temporary sibling of `out` that becomes `out` when the block ends well, and vanishes when it does not.

    Raises `UserError` where `out` exists and is not an empty directory, and for a full disk or an unwritable path.
    """
    out = Path(out)
    check_new(out)
    temporary = None
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{out.name}.", suffix=".partial", dir=out.parent))
        yield temporary
        temporary.chmod(0o755)
        temporary.replace(out)
    except OSError as error:
        raise UserError(f"cannot write {out}: {error.strerror or error}; free space or name a writable "
                        "place") from error
    finally:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)


def write_text(path: Path, text: str) -> None:
    """Replaces the file at `path` by one that holds `text`. Raises `OSError`, and then leaves the old one."""
    partial = path.with_name(path.name + ".partial")
    try:
        partial.write_text(text, encoding="utf-8")
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def is_remote(name: str | Path) -> bool:
    """Whether a name is a URL, such as gs://bucket/run."""
    return "://" in str(name)


@contextlib.contextmanager
def reachable(name: str) -> Iterator[None]:
    """What fsspec and the packages behind it raise, as one sentence."""
    try:
        yield
    except ImportError as error:
        package = {"gs": "gcsfs", "gcs": "gcsfs", "s3": "s3fs"}.get(name.split("://")[0])
        mend = f"pip install {package}" if package else "install it"
        raise UserError(f"{name} needs a package that is not installed ({error}); {mend}") from error
    except Exception as error:  # each store has errors of its own: no network, no rights, no such protocol
        raise UserError(f"cannot reach {name} ({type(error).__name__}: {error}); check the name, the network and your "
                        "rights to it") from error


def describe(error: OSError) -> str:
    """The cause and the file, without the error's number."""
    place = f" ({error.filename})" if error.filename else ""
    return f"{error.strerror or error}{place}"


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises `UserError` where there is none."""
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path.parent} has no {path.name}; name a checkpoint directory") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read as JSON ({error}); copy or download it again") from error
    if not isinstance(fields, dict):
        raise UserError(f"{path} does not hold a JSON object; copy or download it again")
    return fields
