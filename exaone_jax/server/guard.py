"""The outermost layer: who may come in, how much they may send in headers, and one line of log for each request."""

import hashlib
import hmac
import json
import logging
import secrets
import time
from collections.abc import Collection
from datetime import UTC, datetime
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from exaone_jax.server.errors import ApiError

OPEN_PATHS = frozenset(("/", "/health", "/version", "/metrics"))  # everything else needs a key, where there are keys
_MAX_HEADERS, _MAX_HEADER_BYTES = 100, 16 << 10

log = logging.getLogger("exaone_jax.server")


class JsonLines(logging.Formatter):
    """One JSON object a line; a record's `fields` beside its message."""

    def format(self, record: logging.LogRecord) -> str:
        line = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "event": record.getMessage(),
            **getattr(record, "fields", {}),
        }
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=False)


def say(event: str, **fields: object) -> None:
    """Log an event."""
    log.info(event, extra={"fields": fields})


class Guard:
    """An ASGI application around another. keys: the API keys, any of which lets in; none: all may come in.

    Keys are compared as digests in constant time. Nothing of a body is ever logged.
    """

    def __init__(self, app: ASGIApp, keys: Collection[str]):
        self._app, self._keys = app, [_digest(key.encode()) for key in keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started, status = time.monotonic(), 0
        fields: dict[str, Any] = {}
        scope.setdefault("state", {})["log"] = fields
        number = secrets.token_hex(8)

        async def noting(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message.get("headers", ()), (b"x-request-id", number.encode())]
            await send(message)

        try:
            if (error := self._refusal(scope)) is not None:
                await error.response(scope, receive, noting)
            else:
                await self._app(scope, receive, noting)
        except Exception:
            if not status:
                raise
            log.exception("unfinished", extra={"fields": {"id": number}})
        finally:
            job = fields.pop("job", None)
            tokens = {} if job is None else {**_tokens(job)}
            seconds = round(time.monotonic() - started, 4)
            known = {name: value for name, value in fields.items() if value is not None}
            method, path = scope["method"], scope["path"][:200]
            say("request", id=number, method=method, path=path, status=status, seconds=seconds, **tokens, **known)

    def _refusal(self, scope: Scope) -> ApiError | None:
        headers: list[tuple[bytes, bytes]] = scope["headers"]
        if len(headers) > _MAX_HEADERS or sum(len(name) + len(value) for name, value in headers) > _MAX_HEADER_BYTES:
            return ApiError(431, f"more than {_MAX_HEADERS} headers or {_MAX_HEADER_BYTES} bytes of them")
        if not self._keys or scope["path"] in OPEN_PATHS or scope["method"] == "OPTIONS":
            return None
        given = [value for name, value in headers if name == b"authorization"]
        scheme, _, key = given[0].partition(b" ") if len(given) == 1 else (b"", b"", b"")
        digest = _digest(key.strip())
        matches = [hmac.compare_digest(digest, known) for known in self._keys]  # all of them: no early end
        if scheme.lower() == b"bearer" and any(matches):
            return None
        challenge = {"WWW-Authenticate": "Bearer"}
        return ApiError(
            401, "a valid API key is needed: Authorization: Bearer KEY", code="invalid_api_key", headers=challenge
        )


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()


def _tokens(job: Any) -> dict[str, Any]:
    usage = job.usage
    return {
        "prompt_tokens": usage.prompt_tokens,
        "cached_tokens": usage.cached_tokens,
        "completion_tokens": usage.completion_tokens,
        "finish_reasons": job.finish_reasons,
    }
