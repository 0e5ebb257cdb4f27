"""`dlm export --adapter`: what a run with adapters has trained, as a directory of PEFT's."""

from pathlib import Path

from dlm_jax.convert.peft import write_peft
from dlm_jax.errors import UserError
from dlm_jax.files import new_directory
from dlm_jax.opening import ADAPTED_BASE


def export_adapter(workdir: Path, out: Path) -> None:
    """Writes the adapters of a work directory, and what was trained whole beside them, to the new directory `out`.

    Raises `UserError` where `workdir` is not that of a run with adapters.
    """
    if not (workdir / ADAPTED_BASE).is_dir():
        raise UserError(f"{workdir} is not the work directory of a run with lora.rank above 0; leave out --adapter")
    from dlm_jax.training.checkpoint import read_trained  # Orbax is slow to import
    bundle, lora = read_trained(workdir)
    with new_directory(out) as partial:
        write_peft(partial, bundle.params, bundle.config, lora, bundle.card.base_model)
