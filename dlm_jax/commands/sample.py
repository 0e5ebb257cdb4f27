"""`dlm sample`: continue a prompt, or serve a file of requests."""

import argparse
import sys
from pathlib import Path
from typing import Any

from dlm_jax.commands.arguments import (
    MODEL_HELP,
    Arguments,
    add_fsdp_flag,
    add_sampling_flags,
    add_tensor_flag,
    integer_at_least,
    stdin_bytes,
    text_or_stdin,
    unicode_text,
)
from dlm_jax.commands.progress import count_progress
from dlm_jax.errors import UserError


def add_flags(parser: argparse.ArgumentParser) -> None:
    """The flags of `dlm sample`."""
    parser.add_argument("model", help=MODEL_HELP)
    parser.add_argument("--prompt", default="", type=text_or_stdin,
                        help="- reads it from stdin (default: empty, an unconditional sample)")
    parser.add_argument("--max-tokens", type=integer_at_least(1), default=64, metavar="N",
                        help="new tokens at most (default 64)")
    parser.add_argument("--prompts", metavar="FILE",
                        help='many requests: JSON lines with "id", either "prompt" or "infill", and optionally '
                             '"max_tokens"; - reads them from stdin')
    parser.add_argument("--out", metavar="FILE",
                        help="where the results of --prompts go, one per line; requests already answered there are "
                             "skipped; - writes all to stdout")
    parser.add_argument("--batch", type=integer_at_least(1), default=16, metavar="N",
                        help="requests served together (default 16)")
    parser.add_argument("--stop", type=unicode_text, metavar="TOKEN",
                        help="token that ends a text (default: the model's own)")
    add_tensor_flag(parser)
    add_fsdp_flag(parser)
    add_sampling_flags(parser)


def run(a: Arguments) -> dict[str, Any]:
    """Samples; prints the text and returns it with its cost, or returns the counts of a file of requests."""
    if a.prompts is not None or a.out is not None:
        return run_file(a)
    from dlm_jax.commands.show_sample import recording, settings_of, show_sample
    from dlm_jax.language_model import load
    lm = load(a.model, a.tensor, a.fsdp)
    with recording(lm, a) as recorder:
        sample = lm.sample(a.prompt, max_tokens=a.max_tokens, stop=a.stop, callback=recorder, **settings_of(a))
    return show_sample(lm, sample, recorder, a)


def run_file(a: Arguments) -> dict[str, Any]:
    """Serves the requests of --prompts into --out, on every host of the cluster; `-` is stdin and stdout."""
    if a.prompts is None or a.out is None or a.prompt or a.watch or a.gif or a.html:
        raise UserError("--prompts FILE and --out FILE go together, and without --prompt, --watch, --gif and --html; "
                        "give both, or neither")
    from dlm_jax.parallel.distributed import initialize
    initialize()
    import jax

    from dlm_jax.commands.sample_file import content_of, sample_file, sample_pipe
    from dlm_jax.commands.show_sample import settings_of
    from dlm_jax.language_model import load
    from dlm_jax.sampling.settings import Settings
    lm = load(a.model, a.tensor, a.fsdp).ending_with(a.stop)
    settings, host = Settings(**settings_of(a)), (jax.process_index(), jax.process_count())
    content = stdin_bytes() if a.prompts == "-" else content_of(Path(a.prompts))
    with count_progress("served") as progress:
        if a.out == "-":
            counts = sample_pipe(lm, content, sys.stdout, settings, a.max_tokens, a.batch, progress)
            print(f"dlm: {counts['served']} lines served, {counts['refused']} refused", file=sys.stderr)
            return counts if a.json else {"refused": counts["refused"], "text": None}  # stdout has the results
        counts = sample_file(lm, content, a.out, settings, a.max_tokens, a.batch, progress, host)
    if counts["refused"] and host[0] == 0:
        print(f"dlm: {counts['refused']} of the lines in {a.prompts} were refused; {a.out} says why", file=sys.stderr)
    return {"out": str(a.out), **counts} if host[0] == 0 else {}
