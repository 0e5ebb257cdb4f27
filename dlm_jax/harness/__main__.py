"""`python -m dlm_jax.harness`: the command `lm_eval`, which then knows the model type `dlm_jax`.

For releases of lm-evaluation-harness that do not look for other packages' model types themselves.
"""

from lm_eval.__main__ import cli_evaluate

import dlm_jax.harness.model  # noqa: F401, registers the model type

if __name__ == "__main__":
    cli_evaluate()
