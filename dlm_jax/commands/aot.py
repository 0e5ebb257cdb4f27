"""`dlm aot`: plan a run without its devices, by compiling the real training step ahead of time."""

import argparse
import dataclasses
from typing import Any

from dlm_jax.commands.arguments import CONFIG_HELP, Arguments, integer_at_least
from dlm_jax.commands.progress import show_log
from dlm_jax.errors import UserError
from dlm_jax.models.shapes import SHAPES


def add_flags(parser: argparse.ArgumentParser) -> None:
    """The flags of `dlm aot`."""
    parser.add_argument("--config", required=True, help=CONFIG_HELP)
    parser.add_argument("--topology", required=True,
                        help="TPUs by name or shape, v5p-128, v5p:4x4x4, v6e:4x8, tpu7x-8, or GPUs, h200:8, h200:16")
    parser.add_argument("--slices", type=integer_at_least(1), default=1, metavar="N",
                        help="number of TPU slices of that topology (default 1)")
    parser.add_argument("--search", action="store_true",
                        help="find the model.remat, train.grad_accum_steps and mesh that fit and run fastest (compiles "
                             "dozens of programs)")
    parser.add_argument("--timeline", metavar="FILE",
                        help="write a page that shows where a layer's time goes, forward and backward")
    parser.add_argument("--task", choices=("train", "sample"), default="train",
                        help="what to plan: the training step (default), or sampling from its model in bf16")
    parser.add_argument("--batch", type=integer_at_least(1), metavar="N", help="sequences to sample (default 8)")
    parser.add_argument("--length", type=integer_at_least(2), metavar="N",
                        help="tokens of a sequence to sample, half of them prompt (default 2048)")
    parser.add_argument("--tensor", type=integer_at_least(1), metavar="N",
                        help="devices that share each weight by heads and columns in sampling (default 1)")
    parser.add_argument("--fsdp", type=integer_at_least(1), metavar="N",
                        help="devices that gather the weights of each layer from each other in sampling (default 1)")
    parser.epilog = ("Override keys of the config as for `train`. The shapes of these bases are known, so they need "
                     f"not be downloaded: {', '.join(SHAPES)}.")


def run(a: Arguments) -> dict[str, Any]:
    """Compiles; returns the report of the compiler."""
    from dlm_jax.aot.report import aot
    from dlm_jax.aot.search import search
    from dlm_jax.config import load_config
    config = load_config(a.config, a.overrides)
    chosen = {name: value for name in ("batch", "length", "tensor", "fsdp") if (value := getattr(a, name)) is not None}
    if a.task == "sample":
        if a.search or a.timeline or a.slices > 1:
            raise UserError("--search, --timeline and --slices are for the training step; leave them out to plan "
                            "sampling")
        from dlm_jax.aot.sampling import aot_sampling
        return dataclasses.asdict(aot_sampling(config, a.topology, **chosen))
    if chosen:
        raise UserError(f"--{next(iter(chosen))} is for --task sample; a training step has its batch, length and mesh "
                        "in the config")
    if not a.search:
        return dataclasses.asdict(aot(config, a.topology, a.slices, a.timeline))
    if a.timeline:
        raise UserError("--timeline draws one program and --search compiles many; draw the one it finds afterwards")
    show_log()
    return dataclasses.asdict(search(config, a.topology, a.slices)[0])
