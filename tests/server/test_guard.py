"""Who may come in, what bodies may be, and how long a request may take."""

import asyncio
import contextlib
import json
import socket
import time
from typing import Any

import httpx
import pytest
import uvicorn

from exaone_jax.inference.service import EngineDiedError, OverloadedError
from exaone_jax.server import body as body_module
from exaone_jax.server import serve as serve_module
from exaone_jax.server.app import make_app
from exaone_jax.server.guard import Guard
from exaone_jax.server.serve import Http
from tests.server.scripted import ScriptedService, client, served

KEY = "sk-엑사원-1"


def assert_error(reply: httpx.Response, status: int) -> dict[str, Any]:
    assert reply.status_code == status, reply.text
    error = reply.json()["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    return error


def call(method: str, path: str, *, keys: list[str] | None = None, service: Any = None, **more: Any) -> httpx.Response:
    async def go() -> httpx.Response:
        async with client(served(service or ScriptedService(["hi"])), keys or []) as http:
            return await http.request(method, path, **more)

    return asyncio.run(go())


@pytest.mark.parametrize(
    "path",
    ["/v1/models", "//v1/models", "/v1//models", "/%761/models", "/v1/models/", "/tokenize", "/openapi.json", "/nope"],
)
@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"authorization": "Bearer wrong"},
        {"authorization": "Bearer"},
        {"authorization": f"Basic {KEY}".encode()},
        {"authorization": KEY.encode()},
        {"authorization": f"Bearer {KEY}x".encode()},
    ],
    ids=str,
)
def test_without_a_key_nothing_is_served(path, headers):
    error = assert_error(call("GET", path, keys=[KEY, "other"], headers=headers), 401)
    assert error["code"] == "invalid_api_key"


@pytest.mark.parametrize("path", ["/health", "/version", "/metrics"])
def test_a_few_pages_need_no_key(path):
    assert call("GET", path, keys=[KEY]).status_code == 200


@pytest.mark.parametrize("key", [KEY, "other"])
@pytest.mark.parametrize("scheme", ["Bearer", "bearer"])
def test_any_key_lets_in(key, scheme):
    headers = {"authorization": f"{scheme} {key}".encode()}
    assert call("GET", "/v1/models", keys=[KEY, "other"], headers=headers).status_code == 200


def test_two_keys_in_one_request_are_none():
    headers = [("authorization", b"Bearer a"), ("authorization", b"Bearer b")]
    assert_error(call("GET", "/v1/models", keys=["a"], headers=headers), 401)


@pytest.mark.parametrize("headers", [{f"x-{i}": "1" for i in range(200)}, {"x": "y" * 20_000}], ids=["many", "large"])
def test_headers_are_bounded(headers):
    assert_error(call("GET", "/v1/models", headers=headers), 431)


BODIES = {
    "empty": b"",
    "text": b"hello",
    "null": b"null",
    "list": b"[]",
    "string": b'"x"',
    "number": b"5",
    "cut short": b'{"prompt": "x"',
    "two": b'{"prompt": "x"}{}',
    "not UTF-8": b'{"prompt": "\xed\x95"}',
    "UTF-16": '{"prompt": "x"}'.encode("utf-16"),
    "twice": b'{"prompt": "x", "prompt": "y"}',
    "twice inside": b'{"prompt": "x", "stream_options": {"include_usage": true, "include_usage": false}}',
    "NaN": b'{"prompt": "x", "temperature": NaN}',
    "Infinity": b'{"prompt": "x", "temperature": Infinity}',
    "1e999": b'{"prompt": "x", "temperature": 1e999}',
    "deep": b'{"prompt": ' + b"[" * 10_000 + b"]" * 10_000 + b"}",
    "half a character": b'{"prompt": "\\ud800"}',
    "digits": b'{"prompt": "x", "seed": ' + b"1" * 10_000 + b"}",
}


@pytest.mark.parametrize("body", BODIES.values(), ids=BODIES)
def test_a_body_that_is_no_json_object_is_refused(body):
    headers = {"content-type": "application/json"}
    for path in ("/v1/completions", "/v1/chat/completions", "/tokenize", "/detokenize"):
        assert_error(call("POST", path, content=body, headers=headers), 400)


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x"])
def test_a_body_of_another_type_is_refused(kind):
    assert_error(call("POST", "/v1/completions", content=b'{"prompt": "x"}', headers={"content-type": kind}), 400)


def test_nul_is_a_character():
    assert call("POST", "/v1/completions", json={"prompt": "a\x00b", "user": "\x00"}).status_code == 200


@pytest.mark.parametrize("announced", [True, False])
def test_a_body_is_bounded(announced):
    """Whether its size is announced or it comes in chunks."""

    async def pieces():
        for _ in range(200):
            yield b" " * 1000

    async def go() -> httpx.Response:
        app: Any = Guard(make_app(served(ScriptedService(["hi"])), max_body_bytes=100_000), [])
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://server") as http:
            content = b" " * 200_000 if announced else pieces()
            return await http.post("/v1/completions", content=content, headers={"content-type": "application/json"})

    assert_error(asyncio.run(go()), 413)


def test_a_body_that_stalls_is_given_up(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(body_module, "_SECONDS", 0.05)

    async def pieces():
        yield b"{"
        await asyncio.sleep(30)

    assert_error(call("POST", "/v1/completions", content=pieces(), headers={"content-type": "application/json"}), 408)


class Silent(ScriptedService):
    """Takes requests and never says anything."""

    def submit(self, *args: Any, **more: Any) -> int:
        return next(self._numbers)


class Refusing(ScriptedService):
    def __init__(self, error: Exception):
        super().__init__([""])
        self.error = error

    def submit(self, *args: Any, **more: Any) -> int:
        raise self.error


@pytest.mark.parametrize("stream", [False, True])
def test_a_request_that_takes_too_long_is_ended(stream):
    service = Silent([""])

    async def go() -> httpx.Response:
        async with client(served(service, request_seconds=0.1)) as http:
            return await http.post("/v1/completions", json={"prompt": "x", "n": 2, "stream": stream})

    reply = asyncio.run(go())
    if stream:
        assert reply.status_code == 200
        lines = reply.text.split("\n\n")
        assert json.loads(lines[0].removeprefix("data: "))["error"]["code"] == "deadline_exceeded"
        assert lines[-2] == "data: [DONE]"
    else:
        assert assert_error(reply, 504)["code"] == "deadline_exceeded"
    assert sorted(service.cancelled) == [0, 1]


@pytest.mark.parametrize("stream", [False, True])
def test_a_full_queue_says_when_to_come_again(stream):
    body = {"prompt": "x", "stream": stream}
    reply = call("POST", "/v1/completions", json=body, service=Refusing(OverloadedError("9 requests wait")))
    assert assert_error(reply, 503)["code"] == "queue_full"
    assert int(reply.headers["retry-after"]) >= 1


def test_a_dead_engine_is_said_to_be_unavailable():
    reply = call("POST", "/v1/completions", json={"prompt": "x"}, service=Refusing(EngineDiedError("gone")))
    assert assert_error(reply, 503)["code"] == "engine_dead"


def test_an_error_of_the_servers_own_tells_nothing_of_the_inside(caplog: pytest.LogCaptureFixture):
    reply = call("POST", "/v1/completions", json={"prompt": "x"}, service=Refusing(ValueError("/secret/path")))
    assert assert_error(reply, 500)["message"] == "internal error"
    assert "/secret/path" in caplog.text


def test_a_choice_too_many_cancels_those_before():
    class OneOnly(Silent):
        def submit(self, *args: Any, **more: Any) -> int:
            if (number := next(self._numbers)) == 2:
                raise OverloadedError("full")
            return number

    service = OneOnly([""])
    assert_error(call("POST", "/v1/completions", json={"prompt": "x", "n": 3}, service=service), 503)
    assert sorted(service.cancelled) == [0, 1]


@contextlib.asynccontextmanager
async def listening():
    """The app on a port of its own, behind the server's own protocol."""
    settings = uvicorn.Config(
        Guard(make_app(served(ScriptedService(["hi"]))), []), http=Http, lifespan="off", log_config=None
    )
    server, listener = uvicorn.Server(settings), socket.create_server(("127.0.0.1", 0))
    with contextlib.closing(listener):
        running = asyncio.create_task(server.serve([listener]))
        while not server.started:
            await asyncio.sleep(0.01)
        yield listener.getsockname()[1]
        server.should_exit = True
        await running


def test_who_does_not_finish_a_head_is_hung_up_on(monkeypatch: pytest.MonkeyPatch):
    """Whether nothing comes at all or a little at a time, first or after a request; who is answered slowly is not."""
    monkeypatch.setattr(serve_module, "HEAD_SECONDS", 0.5)
    whole = b"GET /health HTTP/1.1\r\nhost: x\r\n\r\n"

    async def dawdle(port: int, begin: bytes) -> bytes:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(begin)
        reading = asyncio.create_task(reader.read())
        for _ in range(100):
            if reading.done():
                break
            with contextlib.suppress(ConnectionError):
                writer.write(b"a")
            await asyncio.sleep(0.05)
        writer.close()
        return await asyncio.wait_for(reading, 5)

    async def body_in_pieces(port: int) -> bytes:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        body = b'{"prompt": "x"}'
        head = (
            b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n"
        )
        writer.write(head % len(body))
        for byte in body:
            await asyncio.sleep(0.08)
            writer.write(bytes([byte]))
        found = await reader.readuntil(b"\r\n\r\n")
        writer.close()
        return found

    async def main() -> None:
        async with listening() as port:
            found = await asyncio.gather(
                dawdle(port, b""),
                dawdle(port, b"GET / HTTP/1.1\r\nx: "),
                dawdle(port, whole + b"GET /"),
                body_in_pieces(port),
            )
            assert [reply[:12] for reply in found] == [b"", b"", b"HTTP/1.1 200", b"HTTP/1.1 200"]

    asyncio.run(main())


SLOW_TO_REFUSE = {
    "a name twice, among many": b'{"prompt":"x",' + b",".join(b'"%d":0' % i for i in range(300_000)) + b',"7":1}',
    "no token ids": b'{"prompt": [' + b"1.5," * 1_000_000 + b"1.5]}",
    "no token ids, in lists": b'{"prompt": [' + b",".join([b"[" + b"1.5," * 5000 + b"1]"] * 200) + b"]}",
    "a long bias": b'{"prompt":"x","logit_bias":{' + b",".join(b'"a%d":"x"' % i for i in range(300_000)) + b"}}",
    "fields": b'{"prompt":"x",' + b",".join(b'"a%d":0' % i for i in range(300_000)) + b"}",
    "stop strings": b'{"prompt":"x","stop":[' + b'"s",' * 1_000_000 + b'"s"]}',
    "messages": b'{"messages":[' + b"1," * 60_000 + b"1]}",
    "brackets": b"[" * 4_000_000,
    "objects": b'{"prompt":"x","a":[' + b"{}," * 1_000_000 + b"1]}",
}


@pytest.mark.parametrize("body", SLOW_TO_REFUSE.values(), ids=SLOW_TO_REFUSE)
def test_what_is_wrong_a_million_times_is_refused_soon(body: bytes):
    """Each took 5 s to hours where every error was told, or every name compared with every other."""
    path = "/v1/chat/completions" if b"messages" in body else "/v1/completions"
    started = time.monotonic()
    assert_error(call("POST", path, content=body, headers={"content-type": "application/json"}), 400)
    assert time.monotonic() - started < 10
