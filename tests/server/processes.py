"""Real server processes."""

import contextlib
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

PROGRAMS = ""  # where compiled programs are kept for the next process; conftest says

_SMALL = ("--max-num-seqs", "4", "--max-num-batched-tokens", "12", "--block-size", "8")
_SMALL += ("--kv-cache-memory-bytes", "40000000", "--port", "0", "--served-model-name", "tiny")
_RUN = "import sys; from exaone_jax.cli import main; sys.exit(main(sys.argv[1:]))"


@dataclass
class Server:
    """One process, what it logged so far, and where it listens."""

    process: subprocess.Popen[str]
    lines: list[dict[str, Any]] = field(default_factory=list)
    noise: list[str] = field(default_factory=list)
    url: str = ""

    def logged(self, event: str, timeout: float = 60.0) -> dict[str, Any]:
        """The last line of an event, once there is one."""
        limit = time.monotonic() + timeout
        while time.monotonic() < limit:
            if found := [line for line in self.lines if line["event"] == event]:
                return found[-1]
            if self.process.poll() is not None and self._reader is not None:
                self._reader.join(10)
                if not any(line["event"] == event for line in self.lines):
                    raise RuntimeError(
                        f"the server ended with {self.process.returncode}: {''.join(self.noise)[-4000:]}"
                    )
            time.sleep(0.02)
        raise TimeoutError(f"no {event} within {timeout} s: {self.lines[-3:]} {''.join(self.noise)[-2000:]}")

    _reader: threading.Thread | None = None

    def read(self) -> None:
        for line in self.process.stderr or ():
            try:
                self.lines.append(json.loads(line))
            except ValueError:
                self.noise.append(line)

    def client(self, **more: Any) -> httpx.Client:
        return httpx.Client(base_url=self.url, timeout=60, trust_env=False, **more)


def start(checkpoint: Path, *flags: str, code: str = _RUN, ready: bool = True, devices: int = 1) -> Server:
    """A server process."""
    env = {**os.environ, "JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(devices)}
    if PROGRAMS:
        env |= {"JAX_COMPILATION_CACHE_DIR": PROGRAMS, "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    command = [sys.executable, "-c", code, "serve", "--model", str(checkpoint), *_SMALL, *flags]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True, env=env)
    server = Server(process)
    server._reader = threading.Thread(target=server.read, daemon=True)
    server._reader.start()
    if ready:
        try:
            server.url = server.logged("ready", 450)["url"]
        except BaseException:
            process.kill()
            raise
    return server


@contextlib.contextmanager
def serving(checkpoint: Path, *flags: str, code: str = _RUN) -> Iterator[Server]:
    """A server that is killed at the end, if it has not ended."""
    server = start(checkpoint, *flags, code=code)
    try:
        yield server
    finally:
        server.process.kill()
        server.process.wait(60)
