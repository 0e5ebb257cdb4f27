"""What each `dlm` command does: a function from its flags to what it found. Imports wait until they are needed."""

import argparse
import contextlib
import dataclasses
import logging
import os
import shlex
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from dlm_jax.errors import UserError

Arguments = argparse.Namespace
LINE_SECONDS = 30.0  # between two lines of progress where there is no terminal


def run_demo(a: Arguments) -> dict[str, Any]:
    from dlm_jax.demo import demo
    return demo(Path(a.out))


def run_import(a: Arguments) -> dict[str, Any]:
    from dlm_jax.importing import import_model
    return import_model(a.source, Path(a.out), a.mask, a.recipe, a.dtype, a.adapter)


def run_export(a: Arguments) -> dict[str, Any]:
    from dlm_jax.files import check_new
    from dlm_jax.language_model import load
    check_new(a.out)
    if a.adapter:
        from dlm_jax.exporting import export_adapter
        export_adapter(Path(a.model), Path(a.out))
    else:
        load(a.model).export(a.out)
    return {"out": str(a.out)}


def run_prepare(a: Arguments) -> dict[str, Any]:
    from dlm_jax.data.inputs import expand
    from dlm_jax.files import check_new
    from dlm_jax.opening import open_bundle, open_tokenizer
    check_new(a.out)
    names = expand(a.text or a.pairs)
    tokenizer = open_tokenizer(open_bundle(a.model))
    if tokenizer is None:
        raise UserError(f"{a.model} has no tokenizer files; name a model that has")
    if a.pairs:
        from dlm_jax.data.pairs import prepare_pairs, read_pairs
        if a.beam is not None or a.processes is not None:
            raise UserError("pairs are prepared by one process; leave out --beam and --processes")
        with counter("prepared") as count:
            description = prepare_pairs(read_pairs(names), tokenizer, a.length, a.out, a.layout or "packed", count)
    elif a.layout is not None:
        raise UserError("--layout is for --pairs; leave it out")
    elif a.beam is None:
        from dlm_jax.data.prepare import prepare
        from dlm_jax.data.text import read_documents
        with counter("prepared") as count:
            description = prepare(read_documents(names), tokenizer, a.length, a.out, count, a.processes or cores())
    else:
        from dlm_jax.data.beam import prepare_with_beam
        description = prepare_with_beam(names, tokenizer, a.length, a.out, shlex.split(a.beam))
    told = ("records", "length", "tokens", "documents", "bytes")
    return {"out": str(a.out), **{key: description[key] for key in told}}


def run_generate(a: Arguments) -> dict[str, Any]:
    from dlm_jax.data.text import read_documents
    from dlm_jax.language_model import load
    from dlm_jax.on_policy import write_samples
    from dlm_jax.sampling.proposal import Proposal
    prompts = read_documents(a.prompts) if a.prompts else ()
    return write_samples(load(a.model), Path(a.out), a.documents, a.max_tokens,
                         Proposal(a.temperature, a.top_k, a.top_p), prompts=prompts, prompt_tokens=a.prompt_tokens,
                         batch=a.batch, seed=a.seed)


def tell() -> None:
    """Shows what the library logs, such as which attention runs, on stderr."""
    log = logging.getLogger("dlm_jax")
    log.setLevel(logging.INFO)
    log.propagate = False
    log.handlers = [logging.StreamHandler()]


def run_train(a: Arguments) -> dict[str, Any]:
    from dlm_jax.adapt import adapt
    from dlm_jax.cluster import join, leads
    from dlm_jax.config import load_config
    config = load_config(a.config, a.overrides)
    join()
    tell()
    keep_compiled(a.workdir)
    outcome = {"workdir": str(a.workdir), **dataclasses.asdict(adapt(config, a.workdir, a.profile_steps))}
    return outcome if leads() else {}


def keep_compiled(workdir: str) -> None:
    """What is compiled stays in the work directory, where a restarted run finds it; unless the user names a place."""
    import jax
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        jax.config.update("jax_compilation_cache_dir", f"{workdir}/compiled")


def run_aot(a: Arguments) -> dict[str, Any]:
    from dlm_jax.aot import aot
    from dlm_jax.aot_search import search
    from dlm_jax.config import load_config
    config = load_config(a.config, a.overrides)
    if not a.search:
        return dataclasses.asdict(aot(config, a.topology, a.slices))
    tell()
    return dataclasses.asdict(search(config, a.topology, a.slices)[0])


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
    documents = read_documents(a.text)
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


def cores() -> int:
    """How many processes can run at once here."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextlib.contextmanager
def counter(verb: str) -> Iterator[Callable[[int], None]]:
    """A function that, called with the bytes done, shows them: on a terminal's stderr always, elsewhere as a line now
    and then."""
    from rich.console import Console
    from rich.progress import BarColumn, FileSizeColumn, Progress, TextColumn, TimeElapsedColumn, TransferSpeedColumn
    console = Console(stderr=True)
    if not console.is_terminal:
        yield lines(verb)
        return
    with Progress(TextColumn("{task.description}"), BarColumn(20), FileSizeColumn(), TransferSpeedColumn(),
                  TimeElapsedColumn(), console=console) as bar:
        task = bar.add_task(verb, total=None)  # how much text a compressed file holds shows when it is read
        yield lambda done: bar.update(task, completed=done)


def lines(verb: str) -> Callable[[int], None]:
    """A function that, called with the bytes done, says them on stderr every LINE_SECONDS."""
    began = told = time.monotonic()

    def say(done: int) -> None:
        nonlocal told
        now = time.monotonic()
        if now - told >= LINE_SECONDS:
            told = now
            print(f"{verb} {done / 1e6:.0f} MB, {done / 1e6 / (now - began):.1f} MB/s", file=sys.stderr, flush=True)

    return say
