"""The command line: `dlm demo | import | export | prepare | train | sample | infill | eval`. Parse, call, print.

Results go to stdout and progress to stderr; with --json the last line of stdout is one JSON object. Exit codes: 0, and 2
for what the user can mend, told in one sentence.
"""

import argparse
import dataclasses
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from dlm_jax.errors import UserError

Arguments = argparse.Namespace
ORDER_HELP = "which places are filled first: confidence, random, or threshold:0.9"
MODEL_HELP = "a native, work or Hugging Face directory, a hub id, or 'bundled'"


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one line."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see `{self.prog} --help`")


def run_demo(a: Arguments) -> dict[str, Any]:
    from dlm_jax.demo import demo
    return demo(Path(a.out))


def run_import(a: Arguments) -> dict[str, Any]:
    from dlm_jax.importing import import_model
    return import_model(a.source, Path(a.out), a.mask, a.recipe, a.dtype)


def run_export(a: Arguments) -> dict[str, Any]:
    from dlm_jax.language_model import load
    load(a.model).export(a.out)
    return {"out": str(a.out)}


def run_prepare(a: Arguments) -> dict[str, Any]:
    from dlm_jax.data.prepare import prepare
    from dlm_jax.data.text import read_documents
    from dlm_jax.opening import open_bundle, open_tokenizer
    documents = read_documents([Path(path) for path in a.text])
    tokenizer = open_tokenizer(open_bundle(a.model))
    if tokenizer is None:
        raise UserError(f"{a.model} has no tokenizer files; name a model that has")
    with counter("prepared") as count:
        description = prepare(documents, tokenizer, a.length, a.out, count)
    return {"out": str(a.out), **{key: description[key] for key in ("records", "length", "tokens", "documents", "bytes")}}


def run_train(a: Arguments) -> dict[str, Any]:
    from dlm_jax.adapt import adapt
    from dlm_jax.config import load_config
    config = load_config(a.config, a.overrides)
    return {"workdir": str(a.workdir), **dataclasses.asdict(adapt(config, a.workdir))}


def run_sample(a: Arguments) -> dict[str, Any]:
    from dlm_jax.language_model import load
    lm = load(a.model)
    start = time.perf_counter()
    sample = lm.sample(a.prompt, max_tokens=a.max_tokens, **sampling(a))
    return show_sample(lm, sample, time.perf_counter() - start, a)


def run_infill(a: Arguments) -> dict[str, Any]:
    from dlm_jax.language_model import load
    lm = load(a.model)
    start = time.perf_counter()
    sample = lm.infill(a.text, **sampling(a))
    return show_sample(lm, sample, time.perf_counter() - start, a)


def run_eval(a: Arguments) -> dict[str, Any]:
    import itertools

    from dlm_jax.data.text import read_documents
    from dlm_jax.language_model import load
    documents = read_documents([Path(path) for path in a.text])
    lm = load(a.model)
    texts = list(itertools.islice(documents, a.limit))
    if a.task == "ar_nll":
        result = lm.ar_nll(texts)
    else:
        if lm.card.mask_token_id is None:
            print("this model has no mask token: a new one, its row at the mean, stands in", file=sys.stderr)
        result = lm.nelbo(texts, samples=a.samples, seed=a.seed)
    return {"task": a.task, "nats_per_token": result.per_token, "tokens": result.tokens, "texts": len(texts)}


def sampling(a: Arguments) -> dict[str, Any]:
    """The keywords that `sample` and `infill` share."""
    return {name: getattr(a, name) for name in ("steps", "order", "temperature", "top_k", "top_p", "seed")}


def show_sample(lm: Any, sample: Any, seconds: float, a: Arguments) -> dict[str, Any]:
    """Prints the text (after its animation with --watch) and returns what --json says."""
    if a.watch:
        from rich.console import Console

        from dlm_jax.sampling.render import play
        play(lm.tokenizer.pieces(sample.tokens), sample.order, Console(stderr=True))
    if not a.json:
        print(sample.text)
    return {"text": sample.text, "tokens": sample.tokens, "new_tokens": sample.new_tokens, "forwards": sample.forwards,
            "seconds": seconds}


def counter(verb: str) -> Any:
    """A context whose value, called with the bytes done, shows them on a terminal's stderr."""
    from rich.console import Console
    from rich.progress import DownloadColumn, Progress, TextColumn, TransferSpeedColumn

    class Counter(Progress):
        def __enter__(self) -> Callable[[int], None]:
            super().__enter__()
            task = self.add_task(verb, total=None)
            return lambda done: self.update(task, completed=done)

    console = Console(stderr=True)
    return Counter(TextColumn("{task.description}"), DownloadColumn(), TransferSpeedColumn(), console=console,
                   disable=not console.is_terminal)


def make_parser() -> Parser:
    """All commands and their flags."""
    parser = Parser(prog="dlm", description="Convert autoregressive language models into diffusion language models.")
    commands = parser.add_subparsers(title="commands", dest="command", required=True, parser_class=Parser)

    def command(name: str, run: Callable[[Arguments], dict[str, Any]], help: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=help, description=help, allow_abbrev=False)
        sub.set_defaults(run=run)
        sub.add_argument("--json", action="store_true", help="end stdout with one JSON object")
        return sub

    sub = command("demo", run_demo, "adapt the bundled model, fill a hole in code, export to PyTorch (5 minutes)")
    sub.add_argument("--out", required=True, help="new directory for the run and the export")

    sub = command("import", run_import, "read a Hugging Face checkpoint into a native model directory")
    sub.add_argument("source", help="directory or hub id")
    sub.add_argument("--out", required=True, help="new directory")
    sub.add_argument("--mask", help="mask token: 'new' for a new row, or an existing token or id")
    sub.add_argument("--recipe", help="what made it a diffusion model, where its files do not say: diffullama, ...")
    sub.add_argument("--dtype", choices=["float32", "bfloat16"], help="default: as stored")

    sub = command("export", run_export, "write a model as a Hugging Face directory for PyTorch")
    sub.add_argument("model", help=MODEL_HELP)
    sub.add_argument("--out", required=True, help="new directory")

    sub = command("prepare", run_prepare, "pack text into records for training")
    sub.add_argument("--text", required=True, nargs="+", help="text, JSONL (field 'text') or parquet files")
    sub.add_argument("--model", required=True, help="whose tokenizer: " + MODEL_HELP)
    sub.add_argument("--length", required=True, type=int, help="tokens of a record")
    sub.add_argument("--out", required=True, help="new directory")

    sub = command("train", run_train, "adapt a model as a config file says, or go on with a run")
    sub.add_argument("--config", required=True, help="a file such as configs/tiny.py")
    sub.add_argument("--workdir", required=True, help="directory of the run")
    sub.epilog = "Any key of the config can be given as --config.group.key=value, such as --config.train.steps=100."

    sub = command("sample", run_sample, "continue a prompt")
    sub.add_argument("model", help=MODEL_HELP)
    sub.add_argument("--prompt", default="", help="default: none, an unconditional sample")
    sub.add_argument("--max-tokens", type=int, default=64)
    add_sampling_flags(sub)

    sub = command("infill", run_infill, "fill the holes of a text")
    sub.add_argument("model", help=MODEL_HELP)
    sub.add_argument("text", help="text with holes such as [MASK:8], 8 tokens wide")
    add_sampling_flags(sub)

    sub = command("eval", run_eval, "likelihood of texts, in nats a token")
    sub.add_argument("model", help=MODEL_HELP)
    sub.add_argument("--task", required=True, choices=["nelbo", "ar_nll"])
    sub.add_argument("--text", required=True, nargs="+", help="text, JSONL (field 'text') or parquet files")
    sub.add_argument("--limit", type=int, help="read only so many documents")
    sub.add_argument("--samples", type=int, default=4, help="noisings of each text (nelbo)")
    sub.add_argument("--seed", type=int, default=0)
    return parser


def add_sampling_flags(sub: argparse.ArgumentParser) -> None:
    """What `sample` and `infill` share."""
    sub.add_argument("--steps", type=int, help="denoising steps of the text, or of each block")
    sub.add_argument("--order", default="confidence", help=ORDER_HELP)
    sub.add_argument("--temperature", type=float, default=0.0, help="0 takes the likeliest token")
    sub.add_argument("--top-k", type=int, default=0)
    sub.add_argument("--top-p", type=float, default=1.0)
    sub.add_argument("--seed", type=int, default=0)
    sub.add_argument("--watch", action="store_true", help="show the denoising in the terminal")


def take_overrides(arguments: list[str]) -> tuple[list[str], list[str]]:
    """Splits off '--config.a.b=value' (as 'a.b=value') from the other arguments."""
    prefix = "--config."
    overrides = [x.removeprefix(prefix) for x in arguments if x.startswith(prefix)]
    return [x for x in arguments if not x.startswith(prefix)], overrides


def main(arguments: list[str] | None = None) -> int:
    """Runs one command; the exit code is 0, or 2 with a sentence on stderr."""
    try:
        rest, overrides = take_overrides(sys.argv[1:] if arguments is None else arguments)
        parsed = make_parser().parse_args(rest)
        if overrides and parsed.command != "train":
            raise UserError(f"--config.{overrides[0]} belongs to `dlm train`; leave it out")
        parsed.overrides = overrides
        result = parsed.run(parsed)
    except UserError as error:
        print(f"dlm: {error}", file=sys.stderr)
        return 2
    if parsed.json:
        print(json.dumps(result))
    elif parsed.command not in ("sample", "infill", "demo"):
        for key, value in result.items():
            print(f"{key}: {value}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
