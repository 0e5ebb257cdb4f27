"""Benchmarks as a user runs them, at sizes that take seconds."""

import importlib
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
NAMES = [file.stem for file in BENCHMARKS.glob("*.py")]


@pytest.fixture(scope="module")
def benchmark_modules() -> Iterator[Callable]:
    """Imports a benchmark by name."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCHMARKS))
        yield importlib.import_module
    for name in NAMES:
        sys.modules.pop(name, None)


@pytest.fixture(scope="module")
def main(benchmark_modules) -> Iterator[Callable[..., None]]:
    """Runs the `main()` of a benchmark with command-line arguments, on one core and in this process, so that what
    benchmarks share is imported and compiled once."""
    cache = jax.config.jax_compilation_cache_dir
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "sched_getaffinity", lambda process: {0}, raising=False)

        def run(name: str, *arguments: object) -> None:
            patch.setattr(sys, "argv", [f"{name}.py", *map(str, arguments)])
            benchmark_modules(name).main()

        yield run
    jax.config.update("jax_compilation_cache_dir", cache)


@pytest.fixture
def printed(main, capsys) -> Callable[..., str]:
    """What a benchmark prints on stdout."""
    def run(name: str, *arguments: object) -> str:
        main(name, *arguments)
        return capsys.readouterr().out

    return run
