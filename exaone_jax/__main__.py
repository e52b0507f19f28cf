"""`python -m exaone_jax` is `exaone-jax`."""

import sys

from exaone_jax.cli import main

sys.exit(main())
