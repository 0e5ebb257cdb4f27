"""`dlm train`: adapt a model as a config file describes, or resume a run."""

import argparse
import dataclasses
import os
from typing import Any

from dlm_jax.commands.arguments import CONFIG_HELP, Arguments, step_range
from dlm_jax.commands.progress import show_log
from dlm_jax.errors import UserError


def add_flags(parser: argparse.ArgumentParser) -> None:
    """The flags of `dlm train`."""
    parser.add_argument("--config", required=True, help=CONFIG_HELP)
    parser.add_argument("--workdir", help="directory of the run")
    parser.add_argument("--print-config", action="store_true",
                        help="print the config with its overrides and defaults as JSON, and train nothing")
    parser.add_argument("--profile-steps", "--profile_steps", type=step_range, metavar="FIRST:LAST",
                        help="trace these steps into the work directory's profile/, for TensorBoard or Perfetto")
    parser.epilog = "Override any key of the config with --config.group.key=value, such as --config.train.steps=100."


def run(a: Arguments) -> dict[str, Any]:
    """Trains; returns the outcome on the first process, and nothing on the others."""
    from dlm_jax.adapt import adapt
    from dlm_jax.config import load_config, to_json
    from dlm_jax.parallel.distributed import initialize, is_primary
    config = load_config(a.config, a.overrides)
    if a.print_config:
        text = to_json(config)
        if not a.json:
            print(text)
        return {"text": text}
    if a.workdir is None:
        raise UserError("--workdir says where the run lives; name a directory")
    initialize()
    show_log()
    keep_compiled_programs(a.workdir)
    outcome = {"workdir": str(a.workdir), **dataclasses.asdict(adapt(config, a.workdir, a.profile_steps))}
    return outcome if is_primary() else {}


def keep_compiled_programs(workdir: str) -> None:
    """Caches compiled programs in the work directory, where a restarted run finds them, unless the user has chosen
    another place."""
    import jax
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        jax.config.update("jax_compilation_cache_dir", f"{workdir.removeprefix('file://')}/compiled")
