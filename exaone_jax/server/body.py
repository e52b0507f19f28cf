"""Reads a request's body: so many bytes, in so much time, and strictly JSON."""

import asyncio
import json
import math
from collections import Counter
from collections.abc import Callable, Coroutine
from typing import Any

from fastapi import Request, Response
from fastapi.routing import APIRoute

from exaone_jax.server.errors import ApiError

MAX_BODY_BYTES = 16 << 20
_LONG = 1 << 16  # bytes that take long enough to parse that others would notice
_SECONDS = 30.0  # a body that stalls holds a connection no longer


class _StrictRequest(Request):
    async def body(self) -> bytes:
        if not hasattr(self, "_body"):
            try:
                async with asyncio.timeout(_SECONDS):
                    self._body = await self._read()
            except TimeoutError as error:
                raise ApiError(408, f"the body did not come within {_SECONDS:.0f} s") from error
        return self._body

    async def _read(self) -> bytes:
        limit: int = self.app.state.max_body_bytes
        announced = self.headers.get("content-length", "0")
        size = int(announced) if announced.isdecimal() else 0
        pieces: list[bytes] = []
        if size <= limit:
            size = 0
            async for piece in self.stream():
                pieces.append(piece)
                size += len(piece)
                if size > limit:
                    break
        if size > limit:
            # What is left of the body is not read: the connection cannot be used again.
            raise ApiError(413, f"the body has more than {limit} bytes", headers={"Connection": "close"})
        return b"".join(pieces)

    async def json(self) -> Any:
        body = await self.body()
        return parse_json(body) if len(body) < _LONG else await asyncio.to_thread(parse_json, body)


def parse_json(raw: bytes) -> Any:
    """The value of a JSON text; raises ApiError for NaN, infinities, a name twice in an object, and half characters."""
    try:
        value = json.loads(
            raw.decode("utf-8"), parse_constant=_refuse, parse_float=_finite, object_pairs_hook=_without_duplicates
        )
        if b"\\u" in raw:
            json.dumps(value, ensure_ascii=False).encode()  # a lone surrogate cannot be UTF-8
    except RecursionError as error:
        raise ApiError(400, "the body is not JSON: nested too deep") from error
    except ValueError as error:
        reason = "a lone surrogate" if isinstance(error, UnicodeEncodeError) else str(error)
        raise ApiError(400, f"the body is not JSON: {reason}") from error
    return value


def _refuse(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text[:40]} is too large a number")
    return value


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        counts = Counter(name for name, _ in pairs)
        twice = next(name for name, count in counts.items() if count > 1)
        raise ValueError(f"the name {twice[:100]!r} comes twice in one object")
    return found


class StrictRoute(APIRoute):
    """A route whose body is read as above."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()

        async def strict(request: Request) -> Response:
            return await handle(_StrictRequest(request.scope, request.receive))

        return strict
