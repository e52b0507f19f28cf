"""Data parallelism: several services of one model, each with an engine on devices of its own, as one."""

import threading
import time
from collections.abc import Sequence

from exaone_jax.inference.sampling import SamplingParams
from exaone_jax.inference.service import EngineDiedError, EngineStuckError, OnUpdate, OverloadedError, Service


class Replicas:
    """What `Service` is, of several engines. A request goes to the engine that has the fewest; of those, to the emptiest pools.

    Requests of one prompt may go to several engines, each of which then computes it and remembers its own pages. When one
    engine dies, the others end what they have and nothing more is taken.

    Args:
        services: each would take `max_waiting` waiting requests itself.
        max_waiting: requests that may wait for a place in all of them together; more are refused.
    """

    def __init__(self, services: Sequence[Service], *, max_waiting: int = 256):
        self._services, self._max_waiting = list(services), max_waiting
        self._lock = threading.Lock()
        self._coming = [0] * len(services)  # requests that are being prepared for each

    @property
    def alive(self) -> bool:
        return all(service.alive for service in self._services)

    @property
    def stuck(self) -> str:
        return next((service.stuck for service in self._services if service.stuck), "")

    def submit(
        self, prompt: str | Sequence[int], params: SamplingParams, on_update: OnUpdate, *, cache_salt: str = ""
    ) -> int:
        """As `Service.submit`. The number is not the one in the updates, which is the engine's own."""
        with self._lock:
            if not self.alive:
                raise EngineStuckError(self.stuck) if self.stuck else EngineDiedError("an engine has ended")
            waiting = sum(service.load().waiting for service in self._services) + sum(self._coming)
            if waiting >= self._max_waiting:
                raise OverloadedError(f"{waiting} requests wait already, and at most {self._max_waiting} may")
            index = min(range(len(self._services)), key=self._work)
            self._coming[index] += 1
        try:
            number = self._services[index].submit(prompt, params, on_update, cache_salt=cache_salt)
        finally:
            with self._lock:
                self._coming[index] -= 1
        return number * len(self._services) + index

    def cancel(self, number: int) -> None:
        """As `Service.cancel`."""
        number, index = divmod(number, len(self._services))
        self._services[index].cancel(number)

    def close(self, *, drain: bool = True, timeout: float | None = None) -> None:
        """As `Service.close`: all engines end at the same time."""
        end = None if timeout is None else time.monotonic() + timeout
        for service in self._services:
            service.stop(drain=drain)
        for service in self._services:
            service.close(drain=drain, timeout=None if end is None else max(0.0, end - time.monotonic()))

    def _work(self, index: int) -> tuple[int, float]:
        load = self._services[index].load()
        return load.waiting + load.running + self._coming[index], max(load.pages.values(), default=0.0)
