"""A step that never ends, under a watchdog of one second: python -m tests.training.hang_program REPORT"""

import sys
import threading
from pathlib import Path

from exaone_jax.training.faults import Watchdog


def a_step_that_never_ends() -> None:
    threading.Event().wait()


with Watchdog(1.0, Path(sys.argv[1])).watching() as watchdog:
    watchdog.beat()
    a_step_that_never_ends()
