"""Real processes that find each other over loopback."""

import json
import re
import socket
import subprocess
import sys

import pytest

from exaone_jax.errors import ConfigError
from exaone_jax.parallel.hosts import Hosts


def launch(processes: int, devices: int, *more: str, ranks: list[int] | None = None) -> list[subprocess.Popen[str]]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        coordinator = f"127.0.0.1:{free.getsockname()[1]}"
    program = [sys.executable, "-m", "tests.parallel.hosts_program", coordinator, str(processes)]
    return [
        subprocess.Popen(
            [*program, str(rank), str(devices), *more], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        for rank in (range(processes) if ranks is None else ranks)
    ]


def finish(running: list[subprocess.Popen[str]]) -> list[tuple[int, str, str]]:
    try:
        texts = [process.communicate(timeout=480) for process in running]
    finally:
        for process in running:
            process.kill()
    return [(process.returncode, *text) for process, text in zip(running, texts, strict=True)]


def test_any_number_of_processes_computes_the_same():
    """1 x 4, 2 x 2 and 4 x 1 processes x devices train to the same bits."""
    found = []
    for processes in (1, 2, 4):
        for code, out, errors in finish(launch(processes, 4 // processes)):
            assert code == 0, errors
            found.append(json.loads(out.splitlines()[-1]))
    assert found[0]["devices"] == 4
    assert found[0]["losses"][1] < found[0]["losses"][0]
    assert all(other == found[0] for other in found[1:])


def test_a_process_that_never_joins_is_named():
    ((code, _, errors),) = finish(launch(2, 1, "5", ranks=[0]))
    assert code != 0
    assert "ConfigError: hosts: 1 of 2 processes joined within 5 s; missing: process 1" in errors, errors


def test_a_coordinator_that_is_not_there_is_named():
    ((code, _, errors),) = finish(launch(2, 1, "2", ranks=[1]))
    assert code != 0
    assert re.search(r"ConfigError: hosts: process 0 at 127.0.0.1:\d+ did not answer within 2 s", errors), errors


def test_two_processes_of_one_number_are_refused():
    running = launch(3, 1, "60", ranks=[0, 1, 1])
    for code, _, errors in finish(running):
        assert code != 0
        assert "a process says that it is number 1 of 3, which is taken or none" in errors, errors


def test_processes_of_different_versions_are_refused():
    running = launch(2, 1, "60", "1.0", ranks=[0])
    port = running[0].args[3]
    program = [*running[0].args[:3], port, "2", "1", "1", "60", "2.0"]
    running.append(subprocess.Popen(program, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True))
    for code, _, errors in finish(running):
        assert code != 0
        assert "the processes of one run need the same versions" in errors
        assert "process 0: jax 1.0" in errors and "process 1: jax 2.0" in errors


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"coordinator": "10.0.0.1:1"}, "go together"),
        ({"coordinator": "10.0.0.1", "num_processes": 2, "process_id": 0}, "must be ADDRESS:PORT, found '10.0.0.1'"),
        ({"coordinator": "a:1", "num_processes": 2, "process_id": 2}, r"process_id must be in \[0, 2\).*found 2"),
        ({"timeout": 0}, "timeout must be at least a second, found 0"),
    ],
)
def test_wrong_addresses_are_refused(fields: dict, message: str):
    with pytest.raises(ConfigError, match=message):
        Hosts(**fields)
