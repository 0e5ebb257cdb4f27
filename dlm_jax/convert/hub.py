"""Where checkpoint directories come from and which of their files are read. Nothing is unpickled or executed."""

import re
from pathlib import Path
from typing import NamedTuple

import huggingface_hub

from dlm_jax.convert import hf_schema
from dlm_jax.errors import UserError
from dlm_jax.files import read_json
from dlm_jax.schema.json_text import shown
from dlm_jax.schema.kinds import check_fields

HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
HUB_REVISION = re.compile(r"[0-9a-f]{40}")
DOWNLOADED = ["*.safetensors", "*.json", "*.txt", "*.model"]
INDEX = "model.safetensors.index.json"
NAME_BYTES = 255  # the longest name that a file can have
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "vocab.txt")


class Fetched(NamedTuple):
    """A local checkpoint directory."""

    directory: Path
    revision: str | None  # its commit, if it was downloaded from the hub


def fetch(source: str | Path) -> Fetched:
    """The directory that `source` names: itself if it is one, else a download of the hub repository `org/name`.

    Raises `UserError` for a path that is not a directory, and if the download fails.
    """
    path = Path(source)
    if path.is_dir():
        return Fetched(path, None)
    if path.exists():
        raise UserError(f"{source} is a file; name the directory that holds config.json and the safetensors files")
    if not HUB_ID.fullmatch(str(source)):
        raise UserError(f"there is no directory {source}; name a checkpoint directory or a hub id such as org/name")
    try:
        snapshot = Path(huggingface_hub.snapshot_download(str(source), allow_patterns=DOWNLOADED))
    except Exception as error:  # those of the client's HTTP library have no common base
        raise UserError(f"there is no directory {source}, and downloading it from the Hugging Face hub failed "
                        f"({type(error).__name__}); download it on a machine with a network, copy it here and name "
                        "its directory") from error
    return Fetched(snapshot, snapshot.name if HUB_REVISION.fullmatch(snapshot.name) else None)


def weight_files(directory: Path) -> list[Path]:
    """The safetensors files of a Hugging Face checkpoint: `model.safetensors`, or those its index names.

    Raises `UserError` if it has both or neither, or only pickles, which are never opened.
    """
    single, index = directory / "model.safetensors", directory / INDEX
    if single.exists() and index.exists():
        raise UserError(f"{directory} has both {single.name} and {index.name}; remove the stale one")
    if single.exists():
        return [single]
    if index.exists():
        return indexed_files(index)
    pickles = sorted(path.name for pattern in PICKLES for path in directory.glob(pattern))
    if pickles:
        raise UserError(f"{directory} has its weights in {pickles[0]}, a pickle, which can run code when opened; "
                        "convert it to safetensors first")
    raise UserError(f"{directory} has neither {single.name} nor {index.name}; name a directory with "
                    "safetensors weights")


def indexed_files(index: Path) -> list[Path]:
    """The files that an index names, without repetition. Raises `UserError` for a name that leaves the directory."""
    fields = read_json(index)
    check_fields(fields, hf_schema.INDEX, str(index))
    names = fields.get("weight_map")
    if not names:
        raise UserError(f"{index} has no weight_map from tensors to files; copy or download it again")
    files = sorted(set(names.values()))
    outside = [name for name in files if Path(name).name != name or len(name.encode()) > NAME_BYTES]
    if outside:
        raise UserError(f"{index} names the file {shown(outside[0])}, which cannot be in its directory; download it "
                        "again from a source you trust")
    return [index.parent / name for name in files]


def tokenizer_directory(directory: Path) -> Path | None:
    """`directory` if it contains tokenizer files, else None."""
    return directory if any((directory / name).exists() for name in TOKENIZER_FILES) else None
