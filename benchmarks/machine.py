"""What a table's figures were measured on."""

import datetime
import os
import platform
from pathlib import Path

import jax


def processor() -> str:
    """The processor's name as Linux tells it."""
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor() or "unknown processor"


def describe(**versions: str) -> str:
    """One line: processor, cores, date, versions of jax and of the named peers."""
    today = datetime.datetime.now(tz=datetime.UTC).date().isoformat()
    peers = "".join(f", {name} {version}" for name, version in versions.items())
    cores = len(os.sched_getaffinity(0))
    return f"{processor()}, {cores} cores, {today}, Python {platform.python_version()}, jax {jax.__version__}{peers}"
