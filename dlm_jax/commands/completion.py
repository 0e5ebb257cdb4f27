"""`dlm completion`: a script by which a shell completes the commands and flags of `dlm`."""

import argparse
from typing import Any

from dlm_jax.commands.arguments import Arguments
from dlm_jax.errors import UserError

SHELLS = ("bash", "zsh", "fish", "tcsh")


def add_flags(parser: argparse.ArgumentParser) -> None:
    """The flags of `dlm completion`."""
    parser.add_argument("shell", choices=SHELLS, help="for bash: eval \"$(dlm completion bash)\" in ~/.bashrc")


def run(a: Arguments) -> dict[str, Any]:
    """Prints the script."""
    try:
        import shtab
    except ImportError:
        raise UserError("completion needs shtab: pip install 'dlm-jax[completion]'") from None
    from dlm_jax.commands.main import make_parser
    if a.shell not in shtab.SUPPORTED_SHELLS:
        raise UserError(f"shtab writes no script for {a.shell}; choose one of {', '.join(shtab.SUPPORTED_SHELLS)}")
    script = shtab.complete(make_parser(), a.shell)
    if not a.json:
        print(script)
    return {"shell": a.shell, "text": script}
