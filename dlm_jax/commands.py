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
        load(a.model).export(a.out, a.dtype)
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
    from dlm_jax.sampling.settings import Settings
    prompts = read_documents(a.prompts) if a.prompts else ()
    return write_samples(load(a.model), Path(a.out), a.documents, a.max_tokens,
                         Settings(temperature=a.temperature, top_k=a.top_k, top_p=a.top_p, min_p=a.min_p, seed=a.seed),
                         prompts=prompts, prompt_tokens=a.prompt_tokens, batch=a.batch)


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
    if a.prompts is not None or a.out is not None:
        return run_prompts(a)
    from dlm_jax.language_model import load
    lm = load(a.model)
    with watching(lm, a) as recorder:
        sample = lm.sample(a.prompt, max_tokens=a.max_tokens, stop=a.stop, callback=recorder, **settings(a))
    return show_sample(lm, sample, recorder, a)


def run_prompts(a: Arguments) -> dict[str, Any]:
    if a.prompts is None or a.out is None or a.prompt or a.watch or a.gif or a.html:
        raise UserError("--prompts FILE and --out FILE go together, and without --prompt, --watch, --gif and --html; "
                        "give both, or neither")
    from dlm_jax.cluster import join
    join()
    import jax

    from dlm_jax.language_model import load
    from dlm_jax.many import sample_file
    from dlm_jax.sampling.settings import Settings
    lm = load(a.model).ending_with(a.stop)
    host = jax.process_index(), jax.process_count()
    with tally("served") as progress:
        counts = sample_file(lm, a.prompts, a.out, Settings(**settings(a)), a.max_tokens, a.batch, progress, host)
    return {"out": str(a.out), **counts} if host[0] == 0 else {}


def run_infill(a: Arguments) -> dict[str, Any]:
    from dlm_jax.language_model import load
    lm = load(a.model)
    with watching(lm, a) as recorder:
        sample = lm.infill(a.text, callback=recorder, **settings(a))
    return show_sample(lm, sample, recorder, a)


def run_eval(a: Arguments) -> dict[str, Any]:
    import itertools

    from dlm_jax.data.text import read_documents
    from dlm_jax.language_model import load
    documents = read_documents(a.text)
    lm = load(a.model)
    texts = list(itertools.islice(documents, a.limit))
    if a.task == "nelbo" and lm.card.mask_token_id is None:
        print("this model has no mask token: a new one, its row at the mean, stands in", file=sys.stderr)
    with tally("measured") as progress:
        if a.task == "ar_nll":
            result = lm.ar_nll(texts, progress)
        else:
            result = lm.nelbo(texts, samples=a.samples, seed=a.seed, progress=progress)
    return {"task": a.task, "nats_per_token": result, "tokens": result.tokens, "texts": len(texts)}


def settings(a: Arguments) -> dict[str, Any]:
    """The keywords that `sample` and `infill` share."""
    from dlm_jax.sampling.settings import Settings
    return {field.name: getattr(a, field.name) for field in dataclasses.fields(Settings)}


@contextlib.contextmanager
def watching(lm: Any, a: Arguments) -> Iterator[Any]:
    """A recorder of the steps where they are to be drawn, and None elsewhere; a terminal shows them as they come."""
    if not (a.watch or a.gif or a.html):
        yield None
        return
    from rich.console import Console

    from dlm_jax.sampling.history import Recorder
    from dlm_jax.sampling.screen import live
    console = Console(stderr=True)
    with contextlib.ExitStack() as stack:
        screen = a.watch and console.is_terminal
        yield Recorder(stack.enter_context(live(lm.text_tokenizer().pieces, console)) if screen else None)


def show_sample(lm: Any, sample: Any, recorder: Any, a: Arguments) -> dict[str, Any]:
    """Draws what is to be drawn, prints the text, and returns what --json says."""
    facts = {"new_tokens": sample.new_tokens, "forwards": sample.forwards,
             "tokens_per_forward": round(sample.tokens_per_forward, 3)}
    moments = recorder.moments(lm.tokenizer, sample.tokens) if recorder else []
    if a.watch:
        from rich.console import Console

        from dlm_jax.sampling.render import frame
        console = Console(stderr=True)
        if not console.is_terminal:  # nothing has moved there, so the finished text is shown
            pieces = [piece or "" for piece in moments[-1].pieces]
            console.print(frame(pieces, sample.order, max(sample.order) + 1), soft_wrap=True)
    if a.gif:
        from dlm_jax.sampling.picture import write_gif
        write_gif(moments, a.gif)
    if a.html:
        from dlm_jax.sampling.page import write_page
        told = {name.replace("_", " "): value for name, value in facts.items()}
        write_page(moments, a.html, f"dlm {a.command} {a.model}", {**told, "order": a.order})
    if not a.json:
        print(sample.text)
    return {"text": sample.text, "tokens": sample.tokens, **facts, "seconds": sample.batch.seconds,
            "tokens_per_second": sample.batch.tokens_per_second, "peak_bytes": sample.batch.peak_bytes}


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


@contextlib.contextmanager
def tally(verb: str) -> Iterator[Callable[[int, int], None]]:
    """A function that, called with what is done and how much there is, shows it: as a bar on a terminal's stderr,
    elsewhere as a line now and then."""
    from rich.console import Console
    from rich.progress import Progress
    console = Console(stderr=True)
    if not console.is_terminal:
        told = time.monotonic()

        def say(done: int, total: int) -> None:
            nonlocal told
            if time.monotonic() - told >= LINE_SECONDS:
                told = time.monotonic()
                print(f"{verb} {done} of {total}", file=sys.stderr, flush=True)

        yield say
        return
    with Progress(console=console) as bar:
        task = bar.add_task(verb, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)
