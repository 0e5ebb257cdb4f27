"""The `dlm` command: parse the arguments, run one subcommand, print its result.

Results go to stdout and progress to stderr; with --json the last line of stdout is one JSON object. Exit codes: 0;
2 for a mistake the user can fix, reported in one sentence; 3 if some lines of a file of requests were refused and the
others served; 130 after Ctrl-C; 143 after SIGTERM.

A subcommand is a module with `add_flags(parser)` and `run(arguments)`, which returns the result as a dict. To add one,
write the module and list it in COMMANDS.
"""

import importlib
import json
import logging
import math
import os
import sys
from typing import Any

from dlm_jax import __version__
from dlm_jax.commands.arguments import Arguments, Parser, take_overrides
from dlm_jax.errors import Stopped, UserError, printable, shortened

# name: (module, what it does)
COMMANDS = {
    "demo": ("demo", "convert the bundled model, fill a hole, export, write JSON many tokens at a time (5 minutes)"),
    "import": ("import_model", "read a Hugging Face checkpoint into a native model directory"),
    "export": ("export_model", "write a model as a Hugging Face directory for PyTorch"),
    "prepare": ("prepare", "pack text into training records"),
    "train": ("train", "adapt a model as a config file describes, or resume a run"),
    "configs": ("configs", "list the named configs, or print one to edit"),
    "aot": ("aot", "compile the training step of a config for TPUs or GPUs you do not have"),
    "sample": ("sample", "continue a prompt, or serve a file of requests"),
    "serve": ("serve", "an HTTP server with OpenAI's API, and a page to try the model on"),
    "self-generate": ("self_generate", "write samples of an autoregressive base as training text"),
    "infill": ("infill", "fill the holes in a text"),
    "eval": ("evaluate", "likelihoods, tasks of lm-evaluation-harness, infilling and samples, with intervals"),
    "completion": ("completion", "a script by which a shell completes commands and flags"),
    "doctor": ("doctor", "what is installed here, what works, and the command that mends what does not"),
}


def make_parser() -> Parser:
    """The parser of all subcommands."""
    parser = Parser(prog="dlm", description="Convert autoregressive language models into diffusion language models.")
    parser.add_argument("--version", action="version", version=f"dlm-jax {__version__}")
    subparsers = parser.add_subparsers(title="commands", dest="command", required=True, parser_class=Parser)
    for name, (module, purpose) in COMMANDS.items():
        command = importlib.import_module(f"dlm_jax.commands.{module}")
        subparser = subparsers.add_parser(name, help=purpose, description=purpose, allow_abbrev=False)
        subparser.add_argument("--json", action="store_true", help="end stdout with one JSON object")
        subparser.set_defaults(run=command.run)
        command.add_flags(subparser)
    return parser


def main(arguments: list[str] | None = None) -> int:
    """Runs one subcommand and returns the exit code."""
    try:
        rest, overrides = take_overrides(sys.argv[1:] if arguments is None else arguments)
        parsed = make_parser().parse_args(rest)
        if overrides and parsed.command not in ("train", "aot"):
            raise UserError(f"--config.{overrides[0]} belongs to `dlm train` and `dlm aot`; leave it out")
        parsed.overrides = overrides
        silence_libraries()
        result = parsed.run(parsed)
        show(result, parsed)
        sys.stdout.flush()
        return 3 if result.get("refused") else 0
    except UserError as error:
        return fail(str(error))
    except BrokenPipeError:  # the reader of stdout has left, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except OSError as error:
        from dlm_jax.files import describe
        return fail(f"{describe(error)}; check that path, your rights to it and the space on its disk")
    except Stopped as stopped:
        print("dlm:", stopped, file=sys.stderr)
        return stopped.exit_code
    except KeyboardInterrupt:
        print("dlm: interrupted", file=sys.stderr)
        return 130
    return 0


def fail(sentence: str) -> int:
    """Prints the sentence on one line of stderr."""
    print("dlm:", printable(shortened(" ".join(sentence.split()))), file=sys.stderr)
    return 2


def silence_libraries() -> None:
    """Errors are raised as exceptions; Orbax would also log each of them with a traceback per thread."""
    logging.getLogger("absl").addFilter(lambda record: False)
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")


def show(result: dict[str, Any], a: Arguments) -> None:
    """Prints a command's result, unless the command already has. Only the first process of a run has a result.

    Raises `UserError` for a number that is not finite: it is no result, and JSON has none.
    """
    if not result:
        return
    check_finite(result)
    if a.json:
        print(json.dumps(result, allow_nan=False))
    elif a.command != "demo" and "text" not in result:
        for key, value in result.items():
            if value is not None:
                print(f"{key}: {readable(value)}")


def check_finite(result: dict[str, Any]) -> None:
    """Raises `UserError` for a number that is not finite, in a group of them as well."""
    for key, value in result.items():
        if isinstance(value, dict):
            check_finite(value)
        elif isinstance(value, float) and not math.isfinite(value):
            raise UserError(f"{key} is {value}, because the model computes with numbers too large for it; use weights "
                            "from before they diverged")


def readable(value: object) -> str:
    """A value of a result for a person: short numbers, a group of them on one line."""
    if isinstance(value, dict):
        return ", ".join(f"{name} {readable(each)}" for name, each in value.items())
    if isinstance(value, float):
        return f"{value:.4f}" if 1e-3 <= abs(value) < 1e6 else f"{value:.3g}"
    return printable(str(value))


if __name__ == "__main__":
    sys.exit(main())
