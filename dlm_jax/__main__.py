"""`python -m dlm_jax` is `dlm`."""

import sys

from dlm_jax.commands.main import main

if __name__ == "__main__":
    sys.exit(main())
