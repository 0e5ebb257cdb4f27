"""The command line: `dlm demo | import | export | prepare | train | sample | infill | eval ...`. Parse, call, print.

Results go to stdout and progress to stderr; with --json the last line of stdout is one JSON object. Exit codes: 0, 2
for what the user can mend, told in one sentence, and 130 after Ctrl-C.
"""

import argparse
import json
import logging
import os
import sys
from collections.abc import Callable
from typing import Any, NoReturn

from dlm_jax import __version__, commands
from dlm_jax.errors import Stopped, UserError
from dlm_jax.models.shapes import SHAPES

Arguments = argparse.Namespace
ORDER_HELP = ("which places are filled first: confidence (default), margin, entropy, random (each also as "
              "confidence:cosine), left, threshold:0.9 (all surer than that at once), factor:1, bound:0.5, speculate, "
              "diffullama_random or diffullama_confidence:0.95; then +remask:0.3 or +edit:0.9 to change one's mind")
MODEL_HELP = "a native, work or Hugging Face directory, a hub id, or 'bundled'"


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one line."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see `{self.prog} --help`")


def make_parser() -> Parser:
    """All commands and their flags."""
    parser = Parser(prog="dlm", description="Convert autoregressive language models into diffusion language models.")
    parser.add_argument("--version", action="version", version=f"dlm-jax {__version__}")
    subparsers = parser.add_subparsers(title="commands", dest="command", required=True, parser_class=Parser)

    def command(name: str, run: Callable[[Arguments], dict[str, Any]], help: str) -> argparse.ArgumentParser:
        sub = subparsers.add_parser(name, help=help, description=help, allow_abbrev=False)
        sub.set_defaults(run=run)
        sub.add_argument("--json", action="store_true", help="end stdout with one JSON object")
        return sub

    sub = command("demo", commands.run_demo,
                  "adapt the bundled model, fill a hole in code, export to PyTorch (5 minutes)")
    sub.add_argument("--out", required=True, help="new directory for the run and the export")

    sub = command("import", commands.run_import, "read a Hugging Face checkpoint into a native model directory")
    sub.add_argument("source", help="directory or hub id")
    sub.add_argument("--out", required=True, help="new directory")
    sub.add_argument("--mask", help="mask token: 'new' for a new row, or an existing token or id")
    sub.add_argument("--recipe", help="what made it a diffusion model, where its files do not say: diffullama, ...")
    sub.add_argument("--dtype", choices=["float32", "bfloat16"], help="default: as stored")
    sub.add_argument("--adapter", metavar="DIR", help="a PEFT directory whose LoRA adapters are merged into it")

    sub = command("export", commands.run_export, "write a model as a Hugging Face directory for PyTorch")
    sub.add_argument("model", help=MODEL_HELP)
    sub.add_argument("--out", required=True, help="new directory")
    what = sub.add_mutually_exclusive_group()
    what.add_argument("--dtype", choices=["float32", "bfloat16"], help="default: as held; float32 after training")
    what.add_argument("--adapter", action="store_true", help="of a run with adapters: only those, for PEFT")

    sub = command("prepare", commands.run_prepare, "pack text into records for training")
    what = sub.add_mutually_exclusive_group(required=True)
    what.add_argument("--text", nargs="+",
                     help="text, JSONL (field 'text') or parquet: files, patterns, gs:// or s3:// names (text "
                          "and JSONL also as .gz or .zst), or tfds:NAME[:SPLIT]")
    what.add_argument("--pairs", nargs="+",
                      help="JSONL of prompts and answers (prompt, answer; question, answer; or instruction, output)")
    sub.add_argument("--layout", choices=["packed", "diffullama"],
                     help="of pairs: whole pairs one after the other (default), or one a record filled with end tokens")
    sub.add_argument("--model", required=True, help="whose tokenizer: " + MODEL_HELP)
    sub.add_argument("--length", required=True, type=whole(2), help="tokens of a record")
    how = sub.add_mutually_exclusive_group()
    how.add_argument("--processes", type=whole(1), metavar="N",
                     help="how many cut text into tokens (default: one a core); the files do not depend on it")
    how.add_argument("--beam", metavar="FLAGS",
                     help="run as an Apache Beam pipeline with its flags, as in --beam='--runner=DirectRunner'")
    sub.add_argument("--out", required=True, help="new directory")

    sub = command("train", commands.run_train, "adapt a model as a config file says, or go on with a run")
    sub.add_argument("--config", required=True, help="a file such as configs/tiny.py")
    sub.add_argument("--workdir", required=True, help="directory of the run")
    sub.add_argument("--profile-steps", "--profile_steps", type=step_range, metavar="FIRST:LAST",
                     help="leave a trace of these steps in the work directory's profile/, for TensorBoard or Perfetto")
    sub.epilog = "Any key of the config can be given as --config.group.key=value, such as --config.train.steps=100."

    sub = command("aot", commands.run_aot, "compile the training step of a config for TPUs or GPUs that are not there")
    sub.add_argument("--config", required=True, help="a file such as configs/diffullama_7b.py")
    sub.add_argument("--topology", required=True, help="such as v5e:4x4, v5p:4x4x4, v6e:4x8, tpu7x:2x2x1 or h200:8")
    sub.add_argument("--slices", type=whole(1), default=1, metavar="N", help="how many of them, on TPUs (default 1)")
    sub.add_argument("--search", action="store_true",
                     help="find the model.remat and the least train.accumulate that fit and take the least time")
    sub.epilog = f"Keys of the config as for `train`. These bases are known and need not be there: {', '.join(SHAPES)}."

    sub = command("sample", commands.run_sample, "continue a prompt")
    sub.add_argument("model", help=MODEL_HELP)
    sub.add_argument("--prompt", default="", type=unicode_text, help="default: none, an unconditional sample")
    sub.add_argument("--max-tokens", type=whole(1), default=64, metavar="N", help="how long, in tokens (default 64)")
    sub.add_argument("--prompts", metavar="FILE",
                     help='many requests: JSON lines with "id", and "prompt" or "infill", and "max_tokens" if need be')
    sub.add_argument("--out", metavar="FILE",
                     help="where their results go, line by line; what is there is not done again")
    sub.add_argument("--batch", type=whole(1), default=16, metavar="N", help="how many together (default 16)")
    sub.add_argument("--stop", type=unicode_text, metavar="TOKEN", help="what ends a text (default: the model's own)")
    add_sampling_flags(sub)

    sub = command("generate", commands.run_generate, "write samples of an autoregressive base as text to train on")
    sub.add_argument("model", help=MODEL_HELP)
    sub.add_argument("--out", required=True, help="new file of JSON lines")
    sub.add_argument("--documents", required=True, type=whole(1), metavar="N", help="how many samples")
    sub.add_argument("--max-tokens", required=True, type=whole(1), metavar="N", help="how long, in tokens")
    sub.add_argument("--prompts", nargs="+", metavar="FILE", help="texts whose beginnings the samples begin with")
    sub.add_argument("--prompt-tokens", type=whole(0), default=16, metavar="N", help="of a beginning (default 16)")
    sub.add_argument("--batch", type=whole(1), default=64, metavar="N", help="drawn at once (default 64)")
    add_draw_flags(sub, temperature=1.0)

    sub = command("infill", commands.run_infill, "fill the holes of a text")
    sub.add_argument("model", help=MODEL_HELP)
    sub.add_argument("text", type=unicode_text,
                     help="text with holes such as [MASK:8], 8 tokens wide, or [MASK:2-6], whichever fits best")
    add_sampling_flags(sub)

    sub = command("eval", commands.run_eval, "likelihood of texts, in nats a token")
    sub.add_argument("model", help=MODEL_HELP)
    sub.add_argument("--task", required=True, choices=["nelbo", "ar_nll"],
                     help="nelbo: the diffusion model's bound; ar_nll: exact, left to right")
    sub.add_argument("--text", required=True, nargs="+", help="text, JSONL (field 'text') or parquet files")
    sub.add_argument("--limit", type=whole(1), metavar="N", help="read only so many documents")
    sub.add_argument("--samples", type=whole(1), default=4, metavar="N",
                     help="noisings of each text, for nelbo (default 4)")
    sub.add_argument("--seed", type=whole(0), default=0, metavar="N", help="of the noise, for nelbo (default 0)")
    return parser


def add_sampling_flags(sub: argparse.ArgumentParser) -> None:
    """What `sample` and `infill` share."""
    sub.add_argument("--steps", type=whole(1), metavar="N",
                     help="denoising steps of the text, or of each block (default: one a token, at most 64)")
    sub.add_argument("--order", default="confidence", help=ORDER_HELP)
    add_draw_flags(sub, temperature=0.0)
    sub.add_argument("--block", type=whole(1), metavar="N",
                     help="fill N places before the next ones are begun (for models without blocks of their own)")
    sub.add_argument("--cache", help="none, block (exact; for models with blocks), prefix or dual (approximate, with "
                                     "--block; for the others)")
    sub.add_argument("--watch", action="store_true", help="show the denoising in the terminal")
    sub.add_argument("--gif", metavar="FILE", help="draw the denoising as a GIF")
    sub.add_argument("--html", metavar="FILE", help="write a page with a slider through the denoising")


def add_draw_flags(sub: argparse.ArgumentParser, temperature: float) -> None:
    """How a token is drawn."""
    sub.add_argument("--temperature", type=float, default=temperature, metavar="X",
                     help=f"of the draw (default {temperature}); 0 takes the likeliest token")
    sub.add_argument("--top-k", type=whole(0), default=0, metavar="N",
                     help="draw among the N likeliest (default 0: all)")
    sub.add_argument("--top-p", type=float, default=1.0, metavar="P",
                     help="draw among the likeliest that hold this share of the probability (default 1: all)")
    sub.add_argument("--min-p", type=float, default=0.0, metavar="P",
                     help="draw among those this probable beside the likeliest (default 0: all)")
    sub.add_argument("--seed", type=whole(0), default=0, metavar="N", help="of the draw (default 0)")


def whole(least: int) -> Callable[[str], int]:
    """Reads a whole number of at least `least`."""
    def number(text: str) -> int:
        if not text.isdecimal() or not least <= int(text) < 2**32:
            raise argparse.ArgumentTypeError(f"'{text}' is not a whole number of at least {least}")
        return int(text)

    return number


def step_range(text: str) -> tuple[int, int]:
    """Reads FIRST:LAST, two step numbers."""
    first, colon, last = text.partition(":")
    if not colon or not first.isdecimal() or not last.isdecimal() or not 1 <= int(first) <= int(last):
        raise argparse.ArgumentTypeError(f"'{text}' is not of the form FIRST:LAST, such as 10:12")
    return int(first), int(last)


def unicode_text(text: str) -> str:
    """Text that is to be tokenised; what a shell hands over need not be UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise argparse.ArgumentTypeError("the text is not UTF-8") from None
    return text


def take_overrides(arguments: list[str]) -> tuple[list[str], list[str]]:
    """Splits off '--config.a.b=value' (as 'a.b=value') from the other arguments."""
    prefix = "--config."
    overrides = [x.removeprefix(prefix) for x in arguments if x.startswith(prefix)]
    for override in overrides:
        if "=" not in override:
            raise UserError(f"{prefix}{override} has no value; write {prefix}{override}=VALUE")
    return [x for x in arguments if not x.startswith(prefix)], overrides


def main(arguments: list[str] | None = None) -> int:
    """Runs one command. The exit code is 0; 2 with a sentence on stderr; 130 after Ctrl-C, 143 after
    SIGTERM."""
    try:
        rest, overrides = take_overrides(sys.argv[1:] if arguments is None else arguments)
        parsed = make_parser().parse_args(rest)
        if overrides and parsed.command not in ("train", "aot"):
            raise UserError(f"--config.{overrides[0]} belongs to `dlm train` and `dlm aot`; leave it out")
        parsed.overrides = overrides
        quiet()
        show(parsed.run(parsed), parsed)
        sys.stdout.flush()
    except UserError as error:
        return fail(str(error))
    except BrokenPipeError:  # who reads stdout has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except OSError as error:
        from dlm_jax.files import describe
        return fail(f"{describe(error)}; check that place, the rights to it and the space on its disk")
    except Stopped as stopped:
        print("dlm:", stopped, file=sys.stderr)
        return 143  # as a shell says of a process that SIGTERM ended
    except KeyboardInterrupt:
        print("dlm: interrupted", file=sys.stderr)
        return 130
    return 0


def fail(sentence: str) -> int:
    """Says it in one line."""
    print("dlm:", " ".join(sentence.split()), file=sys.stderr)
    return 2


def quiet() -> None:
    """No log lines: what goes wrong is raised, and Orbax would log it with a traceback for each of its threads too."""
    logging.getLogger("absl").addFilter(lambda record: False)
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")


def show(result: dict[str, Any], a: Arguments) -> None:
    """Prints what a command returns, where it has not yet been shown."""
    if not result:
        return  # not the first process of a run
    if a.json:
        print(json.dumps(result))
    elif a.command != "demo" and "text" not in result:
        for key, value in result.items():
            if value is not None:
                print(f"{key}: {shown(value)}")


def shown(value: Any) -> str:
    """A value of a result as a reader wants it: numbers short, groups of them in a line."""
    if isinstance(value, dict):
        return ", ".join(f"{name} {shown(each)}" for name, each in value.items())
    if isinstance(value, float):
        return f"{value:.4f}" if 1e-3 <= abs(value) < 1e6 else f"{value:.3g}"
    return str(value)


if __name__ == "__main__":
    sys.exit(main())
