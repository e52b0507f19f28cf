"""The engine in a thread of its own, for callers in other threads and in event loops."""

import asyncio
import contextlib
import dataclasses
import itertools
import logging
import sys
import threading
import traceback
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence

from exaone_jax.inference.engine import Engine, Load, Update
from exaone_jax.inference.lockstep import Leader
from exaone_jax.inference.sampling import SamplingParams
from exaone_jax.inference.scheduler import Request

log = logging.getLogger(__name__)

OnUpdate = Callable[[Update | Exception], None]

_LOOKS = 8  # of the watchdog, in the time that a step may take


class OverloadedError(RuntimeError):
    """As many requests wait as may."""


class EngineDiedError(RuntimeError):
    """The engine's thread has ended: nothing is served any more."""


class EngineStuckError(EngineDiedError):
    """A step of the engine has not come back in time: nothing is served any more."""


class Service:
    """Runs an engine. Everything here may be called from any thread.

    Args:
        engine: which nobody else steps.
        max_waiting: requests that may wait for a place; more are refused.
        leader: of the other processes that run the same steps; None: there are none.
        step_seconds: a step that has not come back after that (and an eighth) is given up, with all requests; None: never.
            Time in which the process is stopped does not count.
    """

    def __init__(
        self,
        engine: Engine,
        *,
        max_waiting: int = 256,
        leader: Leader | None = None,
        step_seconds: float | None = None,
    ):
        self._engine, self._max_waiting, self._leader = engine, max_waiting, leader
        self._wake = threading.Condition()
        self._arrived: deque[tuple[Request, OnUpdate]] = deque()
        self._cancelled: deque[int] = deque()
        self._listeners: dict[int, OnUpdate] = {}
        self._closing = self._draining = False
        self._error: BaseException | None = None
        self._stuck = ""  # why the engine was given up
        self._step: int | None = None  # the number of the one that runs
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()
        if step_seconds is not None:
            threading.Thread(target=self._watch, args=(step_seconds,), name="engine watchdog", daemon=True).start()

    @property
    def alive(self) -> bool:
        """Whether requests are served: the engine's thread runs, and none of its steps was given up."""
        return self._thread.is_alive() and not self._stuck

    @property
    def stuck(self) -> str:
        """Why the engine was given up, if it was; its thread may hang for ever."""
        return self._stuck

    def load(self) -> Load:
        """How busy the engine is, with what it has not heard of yet."""
        load = self._engine.load()
        return dataclasses.replace(load, waiting=load.waiting + len(self._arrived))

    def submit(
        self, prompt: str | Sequence[int], params: SamplingParams, on_update: OnUpdate, *, cache_salt: str = ""
    ) -> int:
        """Queue a request and return its number. on_update hears every Update, the last with its finish_reason, or the
        EngineDiedError that ends it; it is called in the engine's thread and must not wait.

        Raises InputError for what cannot be served, OverloadedError where too many wait, EngineDiedError.
        """
        request = self._engine.prepare(prompt, params, cache_salt=cache_salt)
        with self._wake:
            if self._closing or self._draining or not self.alive:
                raise self._end("the engine takes no more requests") from self._error
            if (waiting := self.load().waiting) >= self._max_waiting:
                raise OverloadedError(f"{waiting} requests wait already, and at most {self._max_waiting} may")
            self._arrived.append((request, on_update))
            self._wake.notify()
        return request.id

    def cancel(self, number: int) -> None:
        """End a request; its listener hears "cancelled", unless it has heard the end before."""
        with self._wake:
            self._cancelled.append(number)
            self._wake.notify()

    async def stream(
        self, prompt: str | Sequence[int], params: SamplingParams, *, cache_salt: str = ""
    ) -> AsyncIterator[Update]:
        """The updates of one request; leaving the iterator early cancels it. Raises as `submit`."""
        loop, updates = asyncio.get_running_loop(), asyncio.Queue[Update | Exception]()

        def tell(update: Update | Exception) -> None:
            with contextlib.suppress(RuntimeError):  # the loop is closed, and nobody listens any more
                loop.call_soon_threadsafe(updates.put_nowait, update)

        number = self.submit(prompt, params, tell, cache_salt=cache_salt)
        ended = False
        try:
            while not ended:
                update = await updates.get()
                if isinstance(update, Exception):
                    ended = True
                    raise update
                ended = update.finish_reason is not None
                yield update
        finally:
            if not ended:
                self.cancel(number)

    def stop(self, *, drain: bool = True) -> None:
        """Take no more requests and let the thread end: when all are done, or at once, and those still running hear so."""
        with self._wake:
            self._draining, self._closing = True, not drain
            self._wake.notify()

    def close(self, *, drain: bool = True, timeout: float | None = None) -> None:
        """`stop`, and wait for the end of the thread."""
        self.stop(drain=drain)
        self._thread.join(0 if self._stuck else timeout)

    def _run(self) -> None:
        try:
            for step in itertools.count():
                if not self._take():
                    break
                self._step = step
                for update in self._engine.step():
                    self._tell(update)
                self._step = None
            if self._leader is not None:
                self._leader.end()
        except BaseException as error:
            self._error = error
            raise
        finally:
            self._ended.set()
            self._hang_up()
            if self._leader is not None:
                self._leader.close()

    def _watch(self, seconds: float) -> None:
        """Give the engine up when it is seen at one step for so long. Looks are counted and not seconds: a process that was
        stopped for a while is not stuck."""
        step, looks = None, 0
        while not self._ended.wait(seconds / _LOOKS):
            now = self._step
            looks = looks + 1 if now is not None and now == step else 0
            step = now
            if looks == _LOOKS:
                self._stuck = f"a step of the engine has not ended within {seconds:g} s"
                log.error("the engine is stuck", extra={"fields": {"reason": self._stuck, "stack": self._stack()}})
                self._hang_up()
                return

    def _stack(self) -> str:
        """Where the engine's thread is."""
        frame = sys._current_frames().get(self._thread.ident or 0)
        return "" if frame is None else "".join(traceback.format_stack(frame))

    def _take(self) -> bool:
        """Wait for work and hand it to the engine; False when there will be none any more."""
        with self._wake:
            while not (self._closing or self._arrived or self._engine.busy):
                if self._draining:
                    return False
                self._wake.wait()
            arrived, cancelled = list(self._arrived), list(self._cancelled)
            self._arrived.clear()
            self._cancelled.clear()
            for request, on_update in arrived:
                self._listeners[request.id] = on_update
                self._engine.add(request)
            for number in cancelled:
                self._engine.cancel(number)
            closing = self._closing
        if self._leader is not None and not closing:
            self._leader.announce([request for request, _ in arrived], cancelled, self._engine.digest)
        return not closing

    def _tell(self, update: Update) -> None:
        ended = update.finish_reason is not None
        with self._wake:
            if self._stuck:
                return  # it came back after all, and all who listened were told that it would not
            listener = self._listeners.pop(update.request) if ended else self._listeners[update.request]
        listener(update)

    def _hang_up(self) -> None:
        """Tell all who still listen that nothing more comes."""
        with self._wake:
            self._closing = True
            left = [*self._listeners.values(), *(on_update for _, on_update in self._arrived)]
            self._listeners.clear()
            self._arrived.clear()
        for listener in left:
            listener(self._end("the engine has ended"))

    def _end(self, otherwise: str) -> EngineDiedError:
        return EngineStuckError(self._stuck) if self._stuck else EngineDiedError(otherwise)
