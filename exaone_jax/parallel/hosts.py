"""Starting one process a host, and checking that all are there and run the same code."""

import contextlib
import dataclasses
import importlib.metadata
import json
import platform
import re
import socket
import time

import jax
import numpy as np

from exaone_jax.errors import ConfigError

# What must be the same everywhere: hosts that compile different programs hang in the first collective.
_LIBRARIES = ("jax", "jaxlib", "flax", "exaone-jax")
_LONGEST = 4096  # bytes of one process's answer
_PATIENCE = 10.0  # seconds for an answer on an open line


@dataclasses.dataclass(frozen=True)
class Hosts:
    """How the processes of a run find each other. All None: as the environment says (Cloud TPU, GKE, Slurm, MPI).

    coordinator: "address:port" of process 0, reachable by all. num_processes, process_id: of how many, and which is this.
    timeout: seconds to wait for every process to join. heartbeat: seconds of silence after which a process counts as dead, and
        the others end.
    """

    coordinator: str | None = None
    num_processes: int | None = None
    process_id: int | None = None
    timeout: int = 300
    heartbeat: int = 100

    def __post_init__(self) -> None:
        given = [value is not None for value in (self.coordinator, self.num_processes, self.process_id)]
        if any(given) and not all(given):
            raise ConfigError(
                f"hosts: coordinator, num_processes and process_id go together, found {self.coordinator}, "
                f"{self.num_processes}, {self.process_id}"
            )
        if self.coordinator is not None and not re.fullmatch(r".+:\d+", self.coordinator):
            raise ConfigError(f"hosts: coordinator must be ADDRESS:PORT, found {self.coordinator!r}")
        if self.num_processes is not None and not 0 <= (self.process_id or 0) < self.num_processes:
            raise ConfigError(
                f"hosts: process_id must be in [0, {self.num_processes}), the number of processes; found {self.process_id}"
            )
        if self.timeout < 1:
            raise ConfigError(f"hosts: timeout must be at least a second, found {self.timeout}")
        if self.heartbeat < 1:
            raise ConfigError(f"hosts: heartbeat must be at least a second, found {self.heartbeat}")


ENVIRONMENT = Hosts()


def start(hosts: Hosts = ENVIRONMENT) -> None:
    """Join the other processes of this run, before anything else asks jax for devices.

    With a coordinator given, a roll call comes first: jax itself would abort a process that waits in vain, without a word of
    whom it waits for. In an environment that jax knows, it is left to wait.

    Raises ConfigError where processes do not join in time, with their numbers, where the environment names no cluster, or
    where versions differ, with what each process has.
    """
    if hosts.coordinator is not None and hosts.num_processes is not None and hosts.process_id is not None:
        roll_call(hosts.coordinator, hosts.num_processes, hosts.process_id, hosts.timeout)
    try:
        jax.distributed.initialize(
            hosts.coordinator,
            hosts.num_processes,
            hosts.process_id,
            initialization_timeout=hosts.timeout,
            heartbeat_timeout_seconds=hosts.heartbeat,
        )
    except (RuntimeError, ValueError) as error:
        raise ConfigError(f"hosts: cannot start: {error}") from error
    if hosts.coordinator is None:
        _compare_by_collective()


def versions() -> dict[str, str]:
    """Of Python and of the libraries that decide what is compiled."""
    found = {"python": platform.python_version()}
    for name in _LIBRARIES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:  # run from a checkout
            found[name] = "not installed"
    return found


def roll_call(coordinator: str, num_processes: int, process_id: int, timeout: float) -> None:
    """Returns when all processes have told process 0 their number and versions, and these are one of each and the same."""
    host, _, port = coordinator.rpartition(":")
    deadline = time.monotonic() + timeout
    if process_id == 0:
        problem = _call(int(port), num_processes, timeout, deadline)
    else:
        problem = _answer((host.strip("[]"), int(port)), process_id, timeout, deadline)
    if problem:
        raise ConfigError(problem)


def _call(port: int, num_processes: int, timeout: float, deadline: float) -> str:
    """What process 0 does: hear everybody, then tell all the same. Returns what is wrong, or nothing."""
    heard: dict[int, dict[str, str]] = {0: versions()}
    lines: list[socket.socket] = []
    with contextlib.ExitStack() as open_lines, _server(port) as server:
        problem = ""
        while len(heard) < num_processes and not problem:
            server.settimeout(max(deadline - time.monotonic(), 0.001))
            try:
                line, _ = server.accept()
            except TimeoutError:
                missing = ", ".join(str(rank) for rank in range(num_processes) if rank not in heard)
                problem = (
                    f"hosts: {len(heard)} of {num_processes} processes joined within {timeout:g} s; "
                    f"missing: process {missing}"
                )
                break
            lines.append(open_lines.enter_context(line))
            rank, told = _read_answer(line)
            if rank in heard or not 0 < rank < num_processes:
                problem = f"hosts: a process says that it is number {rank} of {num_processes}, which is taken or none"
            heard[rank] = told
        problem = problem or _differences(heard)
        for line in lines:
            line.sendall(problem.encode() + b"\n")
            line.settimeout(_PATIENCE)
            line.recv(1)  # until it hangs up, so that the port is free when jax wants it
    return problem


def _server(port: int) -> socket.socket:
    try:
        return socket.create_server(("", port), backlog=4096)
    except OSError as error:
        raise ConfigError(f"hosts: process 0 cannot listen on port {port}: {error.strerror}") from error


def _read_answer(line: socket.socket) -> tuple[int, dict[str, str]]:
    line.settimeout(_PATIENCE)
    with line.makefile("rb") as reader:
        said = reader.readline(_LONGEST)
    try:
        answer = json.loads(said)
        return int(answer["process"]), {str(name): str(version) for name, version in answer["versions"].items()}
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ConfigError(f"hosts: something that is no process of this run called: {said[:80]!r}") from error


def _answer(address: tuple[str, int], process_id: int, timeout: float, deadline: float) -> str:
    """What the others do. Returns what process 0 found wrong, or nothing."""
    while True:
        try:
            line = socket.create_connection(address, timeout=max(deadline - time.monotonic(), 0.001))
            break
        except OSError as error:
            if time.monotonic() >= deadline:
                return f"hosts: process 0 at {address[0]}:{address[1]} did not answer within {timeout:g} s: {error}"
            time.sleep(0.2)
    with line, line.makefile("rwb") as stream:
        stream.write(json.dumps({"process": process_id, "versions": versions()}).encode() + b"\n")
        stream.flush()
        line.settimeout(timeout + _PATIENCE)  # process 0 waits for the others no longer than that
        try:
            verdict = stream.readline()
        except TimeoutError:
            verdict = b""
    return verdict.decode().rstrip("\n") if verdict else "hosts: process 0 went away during the roll call"


def _differences(heard: dict[int, dict[str, str]]) -> str:
    if len({json.dumps(told, sort_keys=True) for told in heard.values()}) <= 1:
        return ""
    told = (f"process {rank}: {', '.join(map(' '.join, sorted(heard[rank].items())))}" for rank in sorted(heard))
    return f"hosts: the processes of one run need the same versions, found {'; '.join(told)}"


def _compare_by_collective() -> None:
    from jax.experimental import multihost_utils

    mine = np.zeros(_LONGEST, np.uint8)
    told = np.frombuffer(json.dumps(versions()).encode(), np.uint8)
    mine[: len(told)] = told
    every = np.asarray(multihost_utils.process_allgather(mine)).reshape(jax.process_count(), -1)
    if problem := _differences({rank: json.loads(bytes(row).rstrip(b"\0")) for rank, row in enumerate(every)}):
        raise ConfigError(problem)
