"""Real processes, real signals: what a run is after any of them ends, at any moment."""

import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from flax import nnx

from exaone_jax.checkpoints.convert import save_hf
from exaone_jax.model import Transformer
from exaone_jax.training.saves import read_step, saved_steps, step_folder, sweep
from exaone_jax.training.setup import set_up
from tests.training.runs import small_run, yaml_file
from tests.training.save_program import checkpoints, state_of

Process = subprocess.Popen[str]
TIMEOUT = 400


def start(folder: Path, *overrides: str, processes: int = 1, devices: int = 1, gloo: bool = False) -> list[Process]:
    """The command line in so many processes of so many devices, over the `run.yaml` of a folder.

    gloo: also one process sums over its devices as several do, in gloo's order and not in that of XLA:CPU's own collectives.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        coordinator = f"127.0.0.1:{free.getsockname()[1]}"
    environment = os.environ | {"JAX_NUM_CPU_DEVICES": str(devices)}
    command = [sys.executable, "-m", "exaone_jax", "train", str(folder / "run.yaml"), *overrides]
    started = []
    for rank in range(processes):
        hosts = f"hosts={{coordinator: '{coordinator}', num_processes: {processes}, process_id: {rank}, heartbeat: 10}}"
        arguments = [*command, hosts] if gloo or processes > 1 else command
        started.append(
            subprocess.Popen(
                arguments, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, bufsize=1
            )
        )
    return started


def finish(running: list[Process]) -> list[tuple[int, str, str]]:
    try:
        texts = [process.communicate(timeout=TIMEOUT) for process in running]
    finally:
        for process in running:
            process.kill()
    return [(process.returncode, *text) for process, text in zip(running, texts, strict=True)]


def until_step(process: Process, step: int) -> None:
    """Read the lines of a run until that step."""
    for line in process.stdout or ():
        if re.match(rf"step +{step} ", line):
            return
    raise AssertionError(f"step {step} never came: {process.communicate()[1]}")


def final(found: tuple[int, str, str]) -> str:
    code, out, errors = found
    assert code == 0, errors
    return out.splitlines()[-1]


def test_processes_and_devices_do_not_matter(tmp_path: Path) -> None:
    """1 x 4, and 2 x 2 that stops half way and goes on as 4 x 1: the same parameters, hash for hash."""
    straight, parts = tmp_path / "straight", tmp_path / "parts"
    for folder in (straight, parts):
        folder.mkdir()
        yaml_file(folder, mesh="fsdp=4")
    expected = final(finish(start(straight, devices=4, gloo=True))[0])
    assert re.fullmatch(r"final loss \d\.\d+ sha256 [0-9a-f]{64}", expected)
    halves = finish(start(parts, "stop_after=3", processes=2, devices=2))
    assert [code for code, _, _ in halves] == [0, 0], halves
    assert "step " not in halves[1][1]  # one process speaks; gloo prints a word of its own
    ended = finish(start(parts, processes=4, devices=1))
    assert "going on from" in ended[0][1]
    assert final(ended[0]) == expected


@pytest.mark.slow
def test_adapters_are_the_same_of_any_processes(tmp_path: Path) -> None:
    """Beside a base in 4 bits: hash for hash, and in PEFT's file byte for byte."""
    config = set_up(small_run(tmp_path)).model
    save_hf(nnx.state(Transformer(config, rngs=nnx.Rngs(3))), config, tmp_path / "base")
    changes = {"model": None, "init_from": str(tmp_path / "base"), "lora": {"rank": 2, "base": "nf4"}, "mesh": "fsdp=4"}
    straight, parts = tmp_path / "straight", tmp_path / "parts"
    for folder in (straight, parts):
        folder.mkdir()
        yaml_file(folder, **changes)
    expected = final(finish(start(straight, devices=4, gloo=True))[0])
    halves = finish(start(parts, "stop_after=3", processes=2, devices=2))
    assert [code for code, _, _ in halves] == [0, 0], halves
    assert final(finish(start(parts, processes=4, devices=1))[0]) == expected
    files = [folder / "run" / "adapter" / "adapter_model.safetensors" for folder in (straight, parts)]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_sigterm_to_one_process_stops_all_at_one_step(tmp_path: Path) -> None:
    yaml_file(tmp_path, mesh="fsdp=4", steps=100000, save={"every": 50000})
    running = start(tmp_path, processes=2, devices=2)
    until_step(running[0], 3)
    running[1].send_signal(signal.SIGTERM)
    ended = finish(running)
    assert [code for code, _, _ in ended] == [75, 75], ended
    stopped = int(re.search(r"stopped after step (\d+), which is saved", ended[0][1])[1])
    assert saved_steps(checkpoints(tmp_path)) == [stopped]
    assert "SIGTERM: the run ends with this step saved" in ended[1][2]
    shutil.rmtree(tmp_path / "run")
    again = finish(start(tmp_path, f"stop_after={stopped}", devices=4, gloo=True))
    assert final(again[0]) == ended[0][1].splitlines()[-1]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_while_a_step_is_saved(number: signal.Signals, tmp_path: Path) -> None:
    yaml_file(tmp_path, steps=100000, save={"every": 1, "keep": 2})
    running = start(tmp_path)
    until_step(running[0], 5)
    running[0].send_signal(number)
    ((code, out, errors),) = finish(running)
    assert code == 75, errors
    latest = saved_steps(checkpoints(tmp_path))[0]
    assert f"stopped after step {latest}, which is saved" in out
    ((code, out, errors),) = finish(start(tmp_path, f"stop_after={latest + 1}"))
    assert code == 0, errors
    assert out.startswith("going on from") and "again" not in out.splitlines()[0]


def test_a_second_signal_ends_at_once(tmp_path: Path) -> None:
    yaml_file(tmp_path, steps=100000, save={"every": 1, "keep": 2})
    running = start(tmp_path)
    until_step(running[0], 3)
    running[0].send_signal(signal.SIGSTOP)  # so that both are there before either is heard
    running[0].send_signal(signal.SIGTERM)
    running[0].send_signal(signal.SIGINT)
    running[0].send_signal(signal.SIGCONT)
    ((code, _, _),) = finish(running)
    assert code in (128 + signal.SIGINT, 128 + signal.SIGTERM)
    ((code, out, errors),) = finish(start(tmp_path, f"stop_after={saved_steps(checkpoints(tmp_path))[0] + 1}"))
    assert code == 0, errors
    assert out.startswith("going on from")


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


@pytest.mark.slow
def test_the_death_of_a_process_ends_the_others(tmp_path: Path) -> None:
    """SIGKILL to one of two while steps are saved: the other ends by itself, and the run goes on to the same end."""
    yaml_file(tmp_path, mesh="fsdp=4", steps=100000, save={"every": 1, "keep": 2})
    running = start(tmp_path, processes=2, devices=2)
    until_step(running[0], 3)
    running[1].kill()
    killed = time.monotonic()
    running[0].stdout.read()
    assert running[0].wait(TIMEOUT) != 0
    assert time.monotonic() - killed < 60  # the heartbeat is 10 s
    finish(running)
    end = saved_steps(checkpoints(tmp_path))[0] + 3
    resumed = finish(start(tmp_path, f"stop_after={end}", processes=2, devices=2))
    shutil.rmtree(tmp_path / "run")
    assert final(resumed[0]) == final(finish(start(tmp_path, f"stop_after={end}", devices=4, gloo=True))[0])


@pytest.mark.slow
def test_a_restart_finds_its_step_compiled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = tmp_path / "cache"
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(cache))
    monkeypatch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
    yaml_file(tmp_path)
    final(finish(start(tmp_path, "stop_after=3"))[0])
    steps = {path.name for path in cache.glob("*train_step*-cache")}
    assert len(steps) == 1
    final(finish(start(tmp_path))[0])
    assert {path.name for path in cache.glob("*train_step*-cache")} == steps
