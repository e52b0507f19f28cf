"""A grammar from a client is compiled in a process of its own first, which it may crash or hold up.

llguidance bounds most of what it does, but a long chain of rules overflows its stack and takes the whole process along, and
some intersections of expressions never come to an end.
"""

import contextlib
import json
import signal
import subprocess
import sys
import threading
import weakref
from collections.abc import Sequence
from pathlib import Path

from exaone_jax.errors import InputError

_CHILD = Path(__file__).with_name("grammar_child.py")
_AT_ONCE = 4


class Rehearsal:
    """Processes that compile grammars for one vocabulary, started when they are needed. Any thread may use it.

    Args:
        tokens: the bytes of each. special: ids of those that are of no text. ends: ids that end a text.
        seconds: that a grammar may take.
    """

    def __init__(self, tokens: Sequence[bytes], special: Sequence[int], ends: Sequence[int], *, seconds: int = 10):
        first = {
            "tokens": [token.hex() for token in tokens],
            "special": [*special],
            "ends": [*ends],
            "seconds": seconds,
        }
        self._first = json.dumps(first)
        self._places = threading.BoundedSemaphore(_AT_ONCE)
        self._idle: list[_Child] = []
        weakref.finalize(self, _end_all, self._idle)

    def check(self, kind: str, text: str) -> None:
        """Raises InputError for a grammar that the process does not survive. What else is wrong with it is not told."""
        with self._places:
            child = self._take()
            if child.ask(json.dumps([kind, text])) == "done":
                self._idle.append(child)
                return
        why = (
            "it takes too long to compile" if child.end() == -signal.SIGALRM else "it nests too deeply, or is too large"
        )
        raise InputError(f"grammar: {why}")

    def _take(self) -> "_Child":
        try:
            return self._idle.pop()
        except IndexError:
            child = _Child()
        if child.ask(self._first) != "ready":
            raise RuntimeError(f"the process that compiles grammars has ended with {child.end()}")
        return child


class _Child:
    """A process, and its pipes."""

    def __init__(self) -> None:
        command, pipe = [sys.executable, "-P", str(_CHILD)], subprocess.PIPE
        self._process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL, text=True)

    def ask(self, line: str) -> str:
        """What it answers; empty where it has ended."""
        if self._process.stdin is None or self._process.stdout is None:
            raise RuntimeError("a process without pipes")
        try:
            self._process.stdin.write(line + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            return ""
        return self._process.stdout.readline().strip()

    def end(self) -> int:
        """Let it end, if it has not; its exit code."""
        for pipe in (self._process.stdin, self._process.stdout):
            with contextlib.suppress(BrokenPipeError):
                if pipe is not None:
                    pipe.close()
        return self._process.wait()


def _end_all(children: list[_Child]) -> None:
    while children:
        children.pop().end()
