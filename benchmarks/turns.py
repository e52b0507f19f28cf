"""Two sides of a comparison, each in a process of its own, that take turns.

A process holds its side's weights, caches and threads, and nothing of the other's: several gigabytes alive beside it cost
either side up to 30 % of its speed when they shared one process.
"""

import multiprocessing
import statistics
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

PAUSE = 0.5  # seconds: threads of the side that has just run may still spin

Run = Callable[[], tuple[float, Any]]  # seconds, and what came out


class Side:
    """A process that calls `prepare(*args)` once, and what that returned twice a turn."""

    def __init__(self, prepare: Callable[..., Run], *args: Any) -> None:
        context = multiprocessing.get_context("spawn")  # a fork would copy locks that other threads hold
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, prepare, args), daemon=True)
        self._process.start()
        theirs.close()
        self._connection.recv()

    def turn(self) -> tuple[float, Any]:
        """Run twice; the second counts. A virtual machine takes free memory back while the other side runs, and the first
        run pays for having it again: not what a loop of training steps or requests sees."""
        time.sleep(PAUSE)
        for _ in range(2):
            self._connection.send(None)
            result = self._connection.recv()
        return result

    def __enter__(self) -> "Side":
        return self

    def __exit__(self, *_: object) -> None:
        self._connection.close()
        self._process.join()


def _serve(connection: Connection, prepare: Callable[..., Run], args: tuple[Any, ...]) -> None:
    """Answer until the parent closes its end. An exception ends the process, and the parent's `recv` with EOFError."""
    run = prepare(*args)
    connection.send(None)
    while True:
        try:
            connection.recv()
        except EOFError:
            return
        connection.send(run())


def compare(ours: Side, theirs: Side, repeats: int) -> tuple[float, float, Any, Any]:
    """Median seconds of both over turns, and what each gave last."""
    turns = [(ours.turn(), theirs.turn()) for _ in range(repeats)]
    mine, other = ([seconds for seconds, _ in side] for side in zip(*turns, strict=True))
    return statistics.median(mine), statistics.median(other), turns[-1][0][1], turns[-1][1][1]
