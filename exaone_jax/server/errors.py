"""What goes wrong, as HTTP tells it: a status and OpenAI's body {"error": {"message", "type", "param", "code"}}."""

import contextlib
import logging
import re
from collections.abc import Iterator, Mapping

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from exaone_jax.errors import InputError, TooLongError
from exaone_jax.inference.service import EngineDiedError, EngineStuckError, OverloadedError

_TYPES = {401: "authentication_error", 404: "not_found_error", 503: "overloaded_error", 504: "timeout_error"}
_RETRY_AFTER = "1"  # seconds: a place is free as soon as any request ends
_LONGEST = 500  # characters of a message: it may quote what was sent


class ApiError(HTTPException):
    """An answer that is an error. param: the field that is wrong; code: a word for programs."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ):
        super().__init__(status, message, headers)
        self.message, self.param, self.code = message, param, code

    @property
    def body(self) -> dict[str, object]:
        kind = _TYPES.get(self.status_code, "invalid_request_error" if self.status_code < 500 else "server_error")
        message = self.message.encode("utf-8", "replace").decode()  # what was sent may hold half a character
        if len(message) > _LONGEST:
            message = f"{message[:_LONGEST]}…"
        return {"error": {"message": message, "type": kind, "param": self.param, "code": self.code}}

    @property
    def response(self) -> JSONResponse:
        return JSONResponse(self.body, self.status_code, headers=self.headers)


def refused(param: str, message: str, *, code: str | None = None) -> ApiError:
    """400 that names a field."""
    return ApiError(400, f"{param}: {message}", param=param, code=code)


@contextlib.contextmanager
def grammar_of(field: str | None) -> Iterator[None]:
    """What is wrong with a grammar is told of the request's field that it comes from."""
    try:
        yield
    except InputError as error:
        if field is None or not str(error).startswith("grammar: "):
            raise
        raise refused(field, str(error).removeprefix("grammar: ")) from error


_FIELD = re.compile(r"(?:sampling parameters: )?([a-z_]+)((?:\[\d+\]|\.\w+)*)(?::| has )|the (prompt) ")


def api_error(error: Exception) -> ApiError:
    """What an exception means to a client. One that is none of a client's doing tells nothing of the inside."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, InputError):
        named = _FIELD.match(str(error))
        code = "context_length_exceeded" if isinstance(error, TooLongError) else None
        return ApiError(400, str(error), param=named and (named[3] or named[1] + named[2]), code=code)
    if isinstance(error, OverloadedError):
        return ApiError(503, str(error), code="queue_full", headers={"Retry-After": _RETRY_AFTER})
    if isinstance(error, EngineStuckError):
        return ApiError(503, str(error), code="engine_stuck")
    if isinstance(error, EngineDiedError):
        return ApiError(503, "the engine has ended", code="engine_dead")
    if isinstance(error, TimeoutError):
        return ApiError(504, "the request took longer than the server allows", code="deadline_exceeded")
    if isinstance(error, HTTPException):
        return ApiError(error.status_code, str(error.detail), headers=error.headers)
    if isinstance(error, RequestValidationError):
        return _invalid(error)
    logging.getLogger("exaone_jax.server").error("internal error", exc_info=error)
    return ApiError(500, "internal error", code="internal_error")


def _invalid(error: RequestValidationError) -> ApiError:
    """The first of the problems that the request's model found."""
    problem = error.errors()[0]
    where = [str(part) for part in problem["loc"] if part not in ("body", "query", "path")]
    param = where[0] if where else None
    if problem["type"] == "extra_forbidden":
        return ApiError(400, f"{'.'.join(where)}: this field is not supported", param=param, code="unsupported_field")
    if problem["type"] == "value_error" and not where:
        message = str(problem["ctx"]["error"])  # of fields that do not agree; it names the first itself
        named = _FIELD.match(message)
        return ApiError(400, message, param=named and named[1])
    if problem["type"] == "json_invalid" or not where:
        return ApiError(400, f"the body must be a JSON object: {problem['msg']}")
    return ApiError(400, f"{'.'.join(where)}: {problem['msg']}", param=param)


async def _answer(request: Request, error: Exception) -> JSONResponse:
    return api_error(error).response


def install(app: FastAPI) -> None:
    """Answer every exception of the app's routes with OpenAI's body."""
    for kind in (HTTPException, RequestValidationError, InputError, OverloadedError, EngineDiedError, TimeoutError):
        app.add_exception_handler(kind, _answer)
    app.add_exception_handler(Exception, _answer)
