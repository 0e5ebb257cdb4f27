"""Object stores: which URLs a run can live at, and the file system behind a URL."""

from typing import TYPE_CHECKING

from dlm_jax.errors import UserError
from dlm_jax.files import reachable

if TYPE_CHECKING:
    from fsspec import AbstractFileSystem

SCHEMES = ("gs", "s3", "az", "file")  # where Orbax writes checkpoints; `file` is a directory that is used like a store


def check_url(url: str) -> None:
    """Raises `UserError` if no run can live at `url`."""
    scheme, _, name = url.partition("://")
    if scheme not in SCHEMES or not name.strip("/"):
        allowed = ", ".join(f"{each}://" for each in SCHEMES)
        raise UserError(f"no run can be at {url}; name a directory, or a URL that begins with one of {allowed}")


def store_of(url: str) -> tuple["AbstractFileSystem", str]:
    """The file system behind a URL, and the path in it. Raises `UserError` if it cannot be reached."""
    with reachable(url):
        from fsspec.core import url_to_fs
        return url_to_fs(url.rstrip("/"))


def names_at(url: str) -> set[str]:
    """The names directly below a URL; none if there is nothing. Raises `UserError` if the store cannot be reached."""
    store, path = store_of(url)
    with reachable(url):
        store.invalidate_cache()  # another machine may have written since this process last looked
        entries = store.ls(path, detail=False) if store.exists(path) else []
    return {entry.rstrip("/").rsplit("/", 1)[-1] for entry in entries}
