"""The routes."""

from importlib import resources
from typing import Any

from fastapi import APIRouter, FastAPI, Request, Response
from fastapi.responses import HTMLResponse, JSONResponse

import exaone_jax
from exaone_jax.server.body import MAX_BODY_BYTES, StrictRoute
from exaone_jax.server.chat import chat_completion
from exaone_jax.server.completions import completion
from exaone_jax.server.errors import install
from exaone_jax.server.protocol import (
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    ResponsesRequest,
    TokenizeRequest,
)
from exaone_jax.server.responses import response
from exaone_jax.server.served import Served
from exaone_jax.server.stream import ClientGone
from exaone_jax.server.tokens import detokenize, tokenize

_PAGE = (resources.files("exaone_jax.server") / "page.html").read_text(encoding="utf-8")
_PAGE_MAY = (
    "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; connect-src 'self'; base-uri 'none'"
)

_ERROR = {"description": "OpenAI's error body", "content": {"application/json": {"schema": {"type": "object"}}}}
_ERRORS: dict[int | str, dict[str, Any]] = {"4XX": _ERROR, "5XX": _ERROR}


def make_app(served: Served, *, max_body_bytes: int = MAX_BODY_BYTES) -> FastAPI:
    """The application that serves a model; `Guard` goes around it."""
    app = _App(served, title="exaone-jax", version=exaone_jax.__version__, docs_url=None, redoc_url=None)
    app.state.max_body_bytes = max_body_bytes
    install(app)

    @app.exception_handler(ClientGone)
    async def gone(request: Request, error: ClientGone) -> Response:
        return Response(status_code=499)  # nobody reads it

    app.include_router(_generation(served))
    app.include_router(_about(served))
    return app


class _App(FastAPI):
    """Its OpenAPI says which models there are."""

    def __init__(self, served: Served, **more: Any):
        super().__init__(**more)
        self._names = served.names

    def openapi(self) -> dict[str, Any]:
        found = super().openapi()
        for schema in found["components"]["schemas"].values():
            if "model" in schema.get("properties", {}):
                schema["properties"]["model"] = {"enum": [*self._names, None]}
        return found


def _generation(served: Served) -> APIRouter:
    router = APIRouter(route_class=StrictRoute, responses=_ERRORS)

    @router.post("/v1/chat/completions")
    async def chat(asked: ChatRequest, request: Request) -> Response:
        return await chat_completion(served, asked, request)

    @router.post("/v1/completions")
    async def complete(asked: CompletionRequest, request: Request) -> Response:
        return await completion(served, asked, request)

    @router.post("/v1/responses")
    async def respond(asked: ResponsesRequest, request: Request) -> Response:
        return await response(served, asked, request)

    @router.post("/tokenize")
    async def to_ids(asked: TokenizeRequest) -> Response:
        return await tokenize(served, asked)

    @router.post("/detokenize")
    async def to_text(asked: DetokenizeRequest) -> Response:
        return JSONResponse(await detokenize(served, asked))

    return router


def _about(served: Served) -> APIRouter:
    router = APIRouter(responses=_ERRORS)

    def thinking() -> dict[str, Any]:
        """What the page must know of the template."""
        rules, reads = (None, ()) if served.template is None else (served.template.rules, served.template.variables)
        return {
            "thinks_by_default": rules is not None and rules.thinks_by_default,
            "can_choose_thinking": "enable_thinking" in reads,
        }

    chat = thinking()

    def card(name: str) -> dict[str, Any]:
        about = {
            "root": served.names[0],
            "max_model_len": served.max_length,
            "vocab_size": served.engine.config.vocab_size,
        }
        return {"id": name, "object": "model", "created": served.created, "owned_by": "exaone-jax", **about, **chat}

    @router.get("/v1/models")
    async def models() -> Response:
        return JSONResponse({"object": "list", "data": [card(name) for name in served.names]})

    @router.get("/v1/models/{name:path}")
    async def model(name: str) -> Response:
        return JSONResponse(card(served.check_model(name)))

    @router.get("/", response_class=HTMLResponse)
    async def page() -> Response:
        return HTMLResponse(_PAGE, headers={"Content-Security-Policy": _PAGE_MAY})

    @router.get("/version")
    async def version() -> Response:
        return JSONResponse({"version": exaone_jax.__version__})

    @router.get("/health")
    async def health() -> Response:
        if served.service.alive:
            return JSONResponse({"status": "ok"})
        return JSONResponse({"status": served.service.stuck or "the engine has ended"}, 503)

    @router.get("/metrics")
    async def metrics() -> Response:
        return Response(served.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    return router
