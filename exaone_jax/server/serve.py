"""`exaone-jax serve`: load a checkpoint, compile the engine, listen, and end in good order."""

import asyncio
import contextlib
import logging
import os
import signal
import socket
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import h11
import jax
import uvicorn
from jax.sharding import Mesh
from pydantic import ValidationError
from uvicorn.protocols.http.h11_impl import H11Protocol

import exaone_jax
from exaone_jax.errors import CheckpointError, ConfigError, InputError, StorageError
from exaone_jax.inference.engine import Engine, EngineConfig
from exaone_jax.inference.lockstep import Leader, follow
from exaone_jax.inference.replicas import Replicas
from exaone_jax.inference.service import Service
from exaone_jax.inference.text import recommended_sampling, tokenizer_of
from exaone_jax.model import Transformer
from exaone_jax.parallel import MeshShape, copies, hosts, make_mesh
from exaone_jax.parallel.hosts import Hosts
from exaone_jax.server.app import make_app
from exaone_jax.server.body import MAX_BODY_BYTES
from exaone_jax.server.guard import Guard, JsonLines, log, say
from exaone_jax.server.served import Served
from exaone_jax.text import ChatTemplate, Tokenizer

HEAD_SECONDS = 30.0  # for the head of a request, so that nobody holds connections by dawdling

_CHAT_ROUTES = "/v1/chat/completions, /v1/responses"
_TEXT_ROUTES = f"{_CHAT_ROUTES}, /tokenize, /detokenize, and /v1/completions with text"


@dataclass(frozen=True)
class ServeConfig:
    """What to serve, where, and within which bounds.

    host, port: port 0 takes a free one. names: of the model in requests; the directory's name if empty. api_key_file: a key a
    line. hosts: how the processes of several hosts find each other, the first of which listens; None: there is one.
    max_waiting: requests that may wait for a place, more are refused. request_seconds: a request's deadline.
    step_seconds: of one step on the device; after that the engine is given up. shutdown_seconds: how long open requests may
    go on after SIGTERM.
    """

    model: Path
    engine: EngineConfig = field(default_factory=EngineConfig)
    names: tuple[str, ...] = ()
    dtype: str | None = None
    mesh: str | None = None
    hosts: Hosts | None = None
    host: str = "127.0.0.1"
    port: int = 8000
    api_key_file: Path | None = None
    tls_key: Path | None = None
    tls_cert: Path | None = None
    max_waiting: int = 256
    max_body_bytes: int = MAX_BODY_BYTES
    request_seconds: float | None = None
    step_seconds: float = 300.0
    shutdown_seconds: int = 30


def engine_config(**fields: object) -> EngineConfig:
    """EngineConfig; raises ConfigError that names the field, what was found and what is allowed."""
    try:
        return EngineConfig.model_validate(fields)
    except ValidationError as error:
        problems = (f"{'.'.join(map(str, e['loc']))}: {e['msg']}, found {e['input']!r}" for e in error.errors())
        raise ConfigError("engine: " + "; ".join(problems)) from error


def serve(config: ServeConfig) -> bool:
    """Serve until SIGTERM or SIGINT. Returns whether every open request could end; False: some were cut off.

    On several hosts only the first process listens. The others run the same steps until it ends, and let signals pass.

    Raises InputError for files that are missing, StorageError for a port that is taken, and what loading and compiling raise.
    """
    if config.hosts is not None:
        hosts.start(config.hosts)
    if jax.process_count() > 1 and config.mesh is None:
        raise InputError(
            f"--mesh: none given, and {jax.process_count()} processes have {jax.device_count()} devices to share"
        )
    if jax.process_index() > 0:
        return _follow(config)
    keys = _read_keys(config.api_key_file)
    _check_tls(config)
    listener = _listen(config.host, config.port)
    with contextlib.closing(listener), _logging():
        served = _load(config)
        app = make_app(served, max_body_bytes=config.max_body_bytes)
        settings = uvicorn.Config(
            Guard(app, keys),
            http=Http,
            ws="none",
            lifespan="off",
            access_log=False,
            log_config=None,
            server_header=False,
            timeout_graceful_shutdown=config.shutdown_seconds,
            ssl_keyfile=config.tls_key,
            ssl_certfile=config.tls_cert and str(config.tls_cert),
        )
        server = _Server(settings)
        server.ready = {"url": _url(listener, config.tls_key is not None), "models": served.names}
        try:
            server.run(sockets=[listener])
        finally:
            served.service.close(drain=False, timeout=10)
        drained = not (server.cut_off or served.service.stuck)
        say("stopped", drained=drained)
        if served.service.stuck:
            os._exit(1)  # the end of the interpreter would wait for what the device never finishes
    return drained


def _follow(config: ServeConfig) -> bool:
    """What every process but the first does: the same steps, until that one ends."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    with _logging():
        (engine,), _ = _load_engines(config)
        say("following", process=jax.process_index())
        follow(engine)
        say("stopped", drained=True)
    return True


class Http(H11Protocol):
    """Answers what is no HTTP with the error body of everything else, and hangs up on who does not finish a request's head."""

    _hurry: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._watch_head()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._watch_head()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        if self._hurry is not None:
            self._hurry.cancel()

    def _watch_head(self) -> None:
        """One timer for a head, however many pieces it comes in."""
        if self.conn.their_state is not h11.IDLE:
            if self._hurry is not None:
                self._hurry.cancel()
            self._hurry = None
        elif self._hurry is None:
            self._hurry = self.loop.call_later(HEAD_SECONDS, self.transport.close)

    def send_400_response(self, msg: str) -> None:
        body = b'{"error":{"message":"not an HTTP request that can be read","type":"invalid_request_error",'
        body += b'"param":null,"code":null}}'
        head = b"HTTP/1.1 400 Bad Request\r\ncontent-type: application/json\r\nconnection: close\r\ncontent-length: %d\r\n\r\n"
        self.transport.write(head % len(body) + body)
        self.transport.close()


class _Server(uvicorn.Server):
    """Stops listening at the first signal and lets open requests end; a second one cuts them off.

    uvicorn's own would die by the signal in the end, which tells nothing.
    """

    cut_off = False
    ready: dict[str, object]

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        before = {number: signal.signal(number, self.handle_exit) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def handle_exit(self, sig: int, frame: object) -> None:
        self.force_exit = self.should_exit
        self.should_exit = True

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        say("ready", **self.ready)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        say("draining", open=len(self.server_state.tasks))
        started = time.monotonic()
        await super().shutdown(sockets)
        limit = self.config.timeout_graceful_shutdown
        self.cut_off = self.force_exit or (limit is not None and time.monotonic() - started >= limit)


def _load(config: ServeConfig) -> Served:
    engines, model = _load_engines(config)
    template, no_chat = _template(config.model, engines[0].tokenizer)
    names = config.names or (config.model.resolve().name,)
    leader = Leader() if jax.process_count() > 1 else None
    services = [
        Service(engine, max_waiting=config.max_waiting, leader=leader, step_seconds=config.step_seconds)
        for engine in engines
    ]
    service = services[0] if len(services) == 1 else Replicas(services, max_waiting=config.max_waiting)
    defaults = {"temperature": 1.0, **recommended_sampling(model)}
    return Served(names, engines, service, template, no_chat, defaults, config.request_seconds, config.max_waiting)


def _load_engines(config: ServeConfig) -> tuple[list[Engine], Transformer]:
    """An engine for each copy of the model, and one of the copies."""
    started = time.monotonic()
    models = [exaone_jax.load(config.model, dtype=config.dtype, mesh=mesh) for mesh in _meshes(config.mesh)]
    loaded = time.monotonic()
    tokenizer = _tokenizer(models[0])
    engines = [Engine(model, config.engine, tokenizer=tokenizer, sharing=len(models)) for model in models]
    seconds = {"load_seconds": loaded - started, "compile_seconds": time.monotonic() - loaded}
    say("loaded", engines=len(engines), **{name: round(value, 2) for name, value in seconds.items()})
    return engines, models[0]


def _meshes(shape: str | None) -> Sequence[Mesh | None]:
    """Of each engine; None: the default device."""
    if shape is None:
        return [None]
    mesh = make_mesh(MeshShape.parse(shape))
    if jax.process_count() == 1:
        return copies(mesh)
    if mesh.shape["data"] > 1:
        raise InputError(
            f"--mesh {shape}: data={mesh.shape['data']} engines on {jax.process_count()} hosts, expected data=1 where hosts "
            "share an engine; run a server for each copy instead"
        )
    return [mesh]


def _tokenizer(model: Transformer) -> Tokenizer | None:
    try:
        return tokenizer_of(model)
    except CheckpointError as error:
        log.warning("no tokenizer", extra={"fields": {"reason": str(error), "not_served": _TEXT_ROUTES}})
        return None


def _template(path: Path, tokenizer: Tokenizer | None) -> tuple[ChatTemplate | None, str]:
    """The chat template, or why there is none."""
    if tokenizer is None:
        return None, "it has no tokenizer"
    try:
        return ChatTemplate.for_checkpoint(path, tokenizer), ""
    except (CheckpointError, ConfigError) as error:
        log.warning("no chat template", extra={"fields": {"reason": str(error), "not_served": _CHAT_ROUTES}})
        return None, str(error)


def _read_keys(file: Path | None) -> list[str]:
    if file is None:
        return []
    try:
        keys = [line.strip() for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"--api-key-file {file}: cannot be read: {error}") from error
    if not keys:
        raise InputError(f"--api-key-file {file}: holds no key; expected one a line")
    return keys


def _check_tls(config: ServeConfig) -> None:
    if config.tls_key is None and config.tls_cert is None:
        return
    if config.tls_key is None or config.tls_cert is None:
        raise InputError("--ssl-keyfile and --ssl-certfile go together; found one of them")
    for flag, file in (("--ssl-keyfile", config.tls_key), ("--ssl-certfile", config.tls_cert)):
        if not file.is_file():
            raise InputError(f"{flag} {file}: not found")


def _listen(host: str, port: int) -> socket.socket:
    """A bound socket, before any weight is read: a taken port shows at once."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
    except OSError as error:
        listener.close()
        raise StorageError(f"--host {host} --port {port}: cannot listen there: {error.strerror or error}") from error
    return listener


def _url(listener: socket.socket, tls: bool) -> str:
    host, port = listener.getsockname()[:2]
    return f"http{'s' if tls else ''}://{f'[{host}]' if ':' in host else host}:{port}"


@contextlib.contextmanager
def _logging() -> Iterator[None]:
    """JSON lines on stderr, of this server, its engine and uvicorn."""
    handler = logging.StreamHandler()
    handler.setFormatter(JsonLines())
    others = [logging.getLogger(name) for name in ("exaone_jax.inference", "uvicorn")]
    loggers = {log: logging.INFO, **dict.fromkeys(others, logging.WARNING)}
    for each, level in loggers.items():
        each.addHandler(handler)
        each.setLevel(level)
        each.propagate = False
    try:
        yield
    finally:
        for each in loggers:
            each.removeHandler(handler)
            each.propagate = True
