"""What each `dlm` command does: a function from its flags to what it found. Imports wait until they are needed."""

import argparse
import contextlib
import dataclasses
import logging
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from dlm_jax.errors import UserError

Arguments = argparse.Namespace


def run_demo(a: Arguments) -> dict[str, Any]:
    from dlm_jax.demo import demo
    return demo(Path(a.out))


def run_import(a: Arguments) -> dict[str, Any]:
    from dlm_jax.importing import import_model
    return import_model(a.source, Path(a.out), a.mask, a.recipe, a.dtype)


def run_export(a: Arguments) -> dict[str, Any]:
    from dlm_jax.files import check_new
    from dlm_jax.language_model import load
    check_new(a.out)
    load(a.model).export(a.out)
    return {"out": str(a.out)}


def run_prepare(a: Arguments) -> dict[str, Any]:
    from dlm_jax.data.prepare import prepare
    from dlm_jax.data.text import read_documents
    from dlm_jax.files import check_new
    from dlm_jax.opening import open_bundle, open_tokenizer
    check_new(a.out)
    documents = read_documents([Path(path) for path in a.text])
    tokenizer = open_tokenizer(open_bundle(a.model))
    if tokenizer is None:
        raise UserError(f"{a.model} has no tokenizer files; name a model that has")
    with counter("prepared") as count:
        description = prepare(documents, tokenizer, a.length, a.out, count)
    told = ("records", "length", "tokens", "documents", "bytes")
    return {"out": str(a.out), **{key: description[key] for key in told}}


def tell() -> None:
    """Shows what the library logs, such as which attention runs, on stderr."""
    log = logging.getLogger("dlm_jax")
    log.setLevel(logging.INFO)
    log.propagate = False
    log.handlers = [logging.StreamHandler()]


def run_train(a: Arguments) -> dict[str, Any]:
    from dlm_jax.adapt import adapt
    from dlm_jax.config import load_config
    config = load_config(a.config, a.overrides)
    tell()
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
    return {"task": a.task, "nats_per_token": result, "tokens": result.tokens, "texts": len(texts)}


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


@contextlib.contextmanager
def counter(verb: str) -> Iterator[Callable[[int], None]]:
    """A function that, called with the bytes done, shows them on a terminal's stderr."""
    from rich.console import Console
    from rich.progress import FileSizeColumn, Progress, TextColumn, TransferSpeedColumn
    console = Console(stderr=True)
    with Progress(TextColumn("{task.description}"), FileSizeColumn(), TransferSpeedColumn(), console=console,
                  disable=not console.is_terminal) as bar:
        task = bar.add_task(verb, total=None)
        yield lambda done: bar.update(task, completed=done)
