"""Real processes, real signals: what a run is after any of them ends, at any moment."""

import random
import subprocess
import sys
import time
from pathlib import Path

import pytest

from exaone_jax.training.saves import read_step, saved_steps, step_folder, sweep
from exaone_jax.training.setup import set_up
from tests.training.runs import small_run
from tests.training.save_program import checkpoints, state_of

TIMEOUT = 400


def check_latest(folder: Path) -> int:
    """The latest saved step, every number of it checked."""
    import jax
    import numpy as np

    setup = set_up(small_run(folder))
    sweep(checkpoints(folder))
    latest = saved_steps(checkpoints(folder))[0]
    found = read_step(step_folder(checkpoints(folder), latest), setup.like, setup.identity)
    expected = state_of(latest, setup)
    jax.tree.map(np.testing.assert_array_equal, found, expected)
    return latest


@pytest.mark.parametrize("kills", [2, pytest.param(25, marks=pytest.mark.slow)])
def test_a_kill_at_any_moment_leaves_a_good_step(kills: int, tmp_path: Path) -> None:
    rng = random.Random(kills)
    for _ in range(kills):
        process = subprocess.Popen(
            [sys.executable, "-m", "tests.training.save_program", str(tmp_path)], stdout=subprocess.PIPE, text=True
        )
        said = int(process.stdout.readline())  # the save of this step has begun
        said = int(process.stdout.readline())  # and that of the one before is done
        time.sleep(rng.uniform(0, 1.0))
        process.kill()
        said = max([said, *map(int, process.communicate()[0].split())])
        assert check_latest(tmp_path) >= said - 1


def test_a_step_that_hangs_shows_its_stacks(tmp_path: Path) -> None:
    report = tmp_path / "stacks.txt"
    command = [sys.executable, "-m", "tests.training.hang_program", str(report)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT)
    assert done.returncode == 76
    for text in (done.stderr, report.read_text()):
        assert "no step finished within 1 s" in text and "a_step_that_never_ends" in text
