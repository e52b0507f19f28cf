"""Saves a state whose every number is that of its step, as fast as it can, until it is killed.

python -m tests.training.save_program FOLDER
"""

import itertools
import sys
from pathlib import Path

import jax
import numpy as np

from exaone_jax.training.saves import Saver, saved_steps
from exaone_jax.training.setup import Setup, set_up
from exaone_jax.training.step import TrainState
from tests.training.runs import small_run


def state_of(step: int, setup: Setup) -> TrainState:
    return jax.tree.map(lambda x: jax.device_put(np.full(x.shape, step, x.dtype), x.sharding), setup.like)


def checkpoints(folder: Path) -> Path:
    return folder / "run" / "checkpoints"


def main() -> None:
    folder = Path(sys.argv[1])
    setup = set_up(small_run(folder))
    saver = Saver(checkpoints(folder), setup.identity, {}, 2, lambda event, facts: None)
    for step in itertools.count(max(saved_steps(checkpoints(folder)), default=0) + 1):
        saver.save(state_of(step, setup), step)
        print(step, flush=True)


if __name__ == "__main__":
    main()
