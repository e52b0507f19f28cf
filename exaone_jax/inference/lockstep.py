"""One engine on several hosts: process 0 takes the requests, and every process runs the same steps.

What a step does follows from the requests that came before it and from what earlier steps said, never from a clock. So before
each step process 0 tells the others what has come since the last one. It does so on lines of their own: a collective would wait
on the devices behind the step that runs.
"""

import json
import secrets
import socket
import time
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from exaone_jax.errors import ConfigError
from exaone_jax.inference.engine import Engine
from exaone_jax.inference.sampling import SamplingParams
from exaone_jax.inference.scheduler import Request

_LONGEST = 512  # bytes that tell where process 0 listens


class LockstepError(RuntimeError):
    """The processes no longer do the same, or one of them is gone."""


class Leader:
    """Process 0's lines to all others, which come to `follow` at the same time.

    Raises ConfigError where they do not come within `timeout` seconds.
    """

    def __init__(self, timeout: float = 60.0):
        self._lines: list[socket.socket] = []
        secret, missing = secrets.token_hex(16), jax.process_count() - 1
        deadline = time.monotonic() + timeout
        with socket.create_server(("", 0)) as server:
            _told({"address": _own_address(), "port": server.getsockname()[1], "secret": secret})
            while len(self._lines) < missing:
                server.settimeout(max(deadline - time.monotonic(), 0.001))
                try:
                    line, _ = server.accept()
                except TimeoutError:
                    found = f"{len(self._lines)} of {missing} other processes came within {timeout:g} s"
                    raise ConfigError(f"serving on several hosts: {found}") from None
                line.settimeout(timeout)
                if secrets.compare_digest(_line_of(line), secret):
                    line.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                    self._lines.append(line)
                else:
                    line.close()

    def announce(self, arrived: Sequence[Request], cancelled: Sequence[int], digest: int) -> None:
        """What comes before the next step, and Engine.digest. Raises LockstepError where a process is gone."""
        new = [
            {
                "number": request.id,
                "prompt": request.tokens[: request.prompt_length],
                "params": request.params.model_dump(mode="json"),
                "cache_salt": request.cache_salt,
            }
            for request in arrived
        ]
        self._say({"arrived": new, "cancelled": list(cancelled), "digest": digest})

    def end(self) -> None:
        """No step comes any more."""
        self._say({"end": True})

    def close(self) -> None:
        for line in self._lines:
            line.close()

    def _say(self, message: dict[str, Any]) -> None:
        text = json.dumps(message).encode() + b"\n"
        try:
            for line in self._lines:
                line.sendall(text)
        except OSError as error:
            raise LockstepError(f"a process that runs the same steps is gone: {error}") from error


def follow(engine: Engine, timeout: float = 60.0) -> None:
    """Run the steps that process 0 runs, until it says that no more come.

    Raises LockstepError where it goes away without a word, or where this process has said other tokens than it.
    """
    place = _told({})
    with socket.create_connection((place["address"], place["port"]), timeout) as line:
        line.sendall(place["secret"].encode() + b"\n")
        line.settimeout(None)
        with line.makefile("rb") as reader:
            for text in reader:
                message = json.loads(text)
                if "end" in message:
                    return
                _step(engine, message)
    raise LockstepError("process 0 went away")


def _step(engine: Engine, message: dict[str, Any]) -> None:
    if message["digest"] != engine.digest:
        raise LockstepError(f"process {jax.process_index()} has drawn other tokens than process 0")
    for new in message["arrived"]:
        params = SamplingParams.model_validate(new["params"])
        engine.add(engine.prepare(new["prompt"], params, cache_salt=new["cache_salt"], number=new["number"]))
    for number in message["cancelled"]:
        engine.cancel(number)
    engine.step()


def _told(place: dict[str, Any]) -> dict[str, Any]:
    """What process 0 gives, for every process."""
    text = np.zeros(_LONGEST, np.uint8)
    given = json.dumps(place).encode()
    text[: len(given)] = np.frombuffer(given, np.uint8)
    return json.loads(bytes(np.asarray(multihost_utils.broadcast_one_to_all(text))).rstrip(b"\0"))


def _own_address() -> str:
    """By which other hosts reach this one."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))  # sends nothing: it only finds the way out (TEST-NET-1, RFC 5737)
        except OSError:
            return "127.0.0.1"  # no network: all processes are here
        return str(probe.getsockname()[0])


def _line_of(line: socket.socket) -> str:
    with line.makefile("rb") as reader:
        return reader.readline(_LONGEST).decode(errors="replace").rstrip("\n")
