"""`dlm doctor`: what is installed here, what works with it, and the command that mends what does not.

Its output is what a bug report needs.
"""

import argparse
import importlib.metadata
import os
import platform
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

from dlm_jax import __version__
from dlm_jax.commands.arguments import Arguments, available_cores

PACKAGE = "dlm-jax"
SHOWN = ("jax", "jaxlib", "libtpu", "flax", "optax", "orbax-checkpoint", "grain", "tokenizers", "safetensors", "numpy")
COMPILE_TIMEOUT = 120  # seconds

# What an extra is for, in the words of a person who lacks it.
EXTRAS = {
    "torch": "exports are checked against PyTorch, and `dlm demo` shows it", "eval": "`dlm eval --tasks`",
    "serve": "`dlm serve`", "completion": "`dlm completion`", "gguf": "`dlm export --layout gguf`",
    "beam": "`dlm prepare --beam`", "gcs": "work directories at gs://", "s3": "work directories at s3://",
    "wandb": "log.wandb", "tpu": "TPUs, and `dlm aot` for them", "gpu": "NVIDIA GPUs, and `dlm aot` for them"}

# Runs apart, because a device that hangs or a driver that crashes must not take the report with it.
TRY = """
import jax, jax.numpy as jnp
devices = jax.devices()
x = jnp.ones((128, 128))
assert float(jax.jit(lambda x: x @ x)(x)[0, 0]) == 128
stats = devices[0].memory_stats() or {}
print(len(devices), devices[0].platform, devices[0].device_kind, stats.get("bytes_limit", 0), sep="|")
"""


def add_flags(parser: argparse.ArgumentParser) -> None:
    """`dlm doctor` has no flags of its own."""


def run(a: Arguments) -> dict[str, Any]:
    """The report, as printed."""
    return {"dlm-jax": __version__, "python": f"{platform.python_version()} ({sys.executable})",
            "system": f"{platform.platform()}, {available_cores()} cores, {memory()} of memory",
            **{name: version for name in SHOWN if (version := installed(name))},
            "devices": devices(),
            **{f"extra {name}": extra(name, purpose) for name, purpose in EXTRAS.items()},
            "jax settings": settings() or None}


def installed(name: str) -> str | None:
    """The version of a package, or None."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def memory() -> str:
    """The machine's memory."""
    try:
        return f"{os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 2**30:.0f} GiB"
    except (ValueError, OSError):  # not every system says
        return "unknown size"


def devices(run: Callable[..., Any] = subprocess.run) -> str:
    """The devices that jax finds, once they have multiplied two matrices; otherwise what to do."""
    start = time.monotonic()
    try:
        done = run([sys.executable, "-c", TRY], capture_output=True, text=True, timeout=COMPILE_TIMEOUT)
    except subprocess.TimeoutExpired:
        return (f"no answer within {COMPILE_TIMEOUT} s; another process may hold the device: end it, or set "
                "JAX_PLATFORMS=cpu to do without")
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
        return f"broken ({reason}); set JAX_PLATFORMS=cpu to do without, or reinstall jax for this device"
    count, kind, name, limit = done.stdout.strip().splitlines()[-1].split("|")
    size, seconds = f", {int(limit) / 2**30:.0f} GiB each" if int(limit) else "", time.monotonic() - start
    return f"{count} x {name} ({kind}{size}), a product compiled and ran in {seconds:.1f} s{hint(kind)}"


def hint(kind: str) -> str:
    """What to do if there is a GPU here that jax does not use."""
    if kind == "cpu" and shutil.which("nvidia-smi") and os.environ.get("JAX_PLATFORMS", "") != "cpu":
        return "; there is an NVIDIA driver that jax does not use: pip install 'dlm-jax[gpu]'"
    return ""


def extra(name: str, purpose: str) -> str:
    """Whether the packages of an extra are there; if not, for what they are needed, and how to get them."""
    missing = [package for package in packages_of(name) if installed(package) is None]
    if not missing:
        return "installed"
    return f"without {', '.join(missing)}; for {purpose}: pip install '{PACKAGE}[{name}]'"


def packages_of(name: str) -> list[str]:
    """The packages that an extra requires."""
    found = []
    for requirement in importlib.metadata.requires(PACKAGE) or []:
        package, _, marker = requirement.partition(";")
        match = re.match(r"([\w.-]+)(?:\[([\w,-]+)\])?", package.strip())
        if match and re.search(rf"extra == ['\"]{name}['\"]", marker):
            plugin = {"tpu": "libtpu", "cuda13": "jax-cuda13-plugin"}.get(match[2] or "")
            found.append(plugin or match[1])
    return found


def settings() -> str:
    """The environment's settings for jax and its compilers, which change what runs."""
    names = sorted(name for name in os.environ if re.match(r"(JAX|XLA|LIBTPU|TPU|CUDA_VISIBLE)", name))
    return ", ".join(f"{name}={os.environ[name]}" for name in names)
