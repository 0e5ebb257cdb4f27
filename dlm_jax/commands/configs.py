"""`dlm configs`: the named configs, to run with `dlm train --config NAME` or to copy and edit."""

import argparse
from typing import Any

from dlm_jax.commands.arguments import Arguments


def add_flags(parser: argparse.ArgumentParser) -> None:
    """The flags of `dlm configs`."""
    parser.add_argument("name", nargs="?", help="print this config's source, to save as a file and edit")


def run(a: Arguments) -> dict[str, Any]:
    """What each config is for, by name; or prints the source of one."""
    from dlm_jax.config.named import config_file, named_configs, purpose_of
    if a.name is None:
        return {name: purpose_of(file) for name, file in named_configs().items()}
    source = config_file(a.name).read_text(encoding="utf-8")
    if not a.json:
        print(source, end="")
    return {"name": a.name, "text": source}
