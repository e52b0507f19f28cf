"""Answers that end when their client leaves: whole ones, and server-sent events."""

import asyncio
import contextlib
import json
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine
from typing import Any, TypeVar

from fastapi import Request, Response
from starlette.types import Receive, Scope, Send

from exaone_jax.server.errors import api_error

T = TypeVar("T")
DONE = "data: [DONE]\n\n"


def event(value: object, name: str | None = None) -> str:
    """One server-sent event."""
    data = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    return f"event: {name}\ndata: {data}\n\n" if name else f"data: {data}\n\n"


class ClientGone(Exception):
    """Nobody waits for the answer any more."""


async def whole(request: Request, answer: Coroutine[Any, Any, T], deadline: float | None) -> T:
    """What `answer` returns. Raises ClientGone if the client leaves before, TimeoutError after the deadline (loop time)."""
    return await _unless_gone(request.receive, _by(answer, deadline))


async def _by(answer: Awaitable[T], deadline: float | None) -> T:
    async with asyncio.timeout_at(deadline):
        return await answer


async def _unless_gone(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    working, leaving = asyncio.ensure_future(work), asyncio.ensure_future(_gone(receive))
    try:
        await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientGone
        return working.result()
    finally:
        working.cancel()
        leaving.cancel()
        await asyncio.gather(working, leaving, return_exceptions=True)


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class EventStream(Response):
    """Sends events as they come. A failure is told as an event, for the status has been sent.

    close: is called at the end, however that comes. deadline: loop time. end: what comes last.
    """

    def __init__(self, events: AsyncGenerator[str], close: Callable[[], None], deadline: float | None, end: str = DONE):
        super().__init__(
            media_type="text/event-stream", headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
        )
        del self.headers["content-length"]
        self._events, self._close, self._deadline, self._end = events, close, deadline, end

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            with contextlib.suppress(ClientGone):
                await _unless_gone(receive, self._send(send))
        finally:
            self._close()
            await self._events.aclose()

    async def _send(self, send: Send) -> None:
        async def write(text: str, *, more: bool = True) -> None:
            await send({"type": "http.response.body", "body": text.encode(), "more_body": more})

        try:
            await _by(self._send_events(write), self._deadline)
        except Exception as error:  # noqa: BLE001 (told to the client; api_error logs what is a fault of ours)
            await write(event(api_error(error).body))
        await write(self._end, more=False)

    async def _send_events(self, write: Any) -> None:
        async for text in self._events:
            await write(text)
