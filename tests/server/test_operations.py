"""A real server process under bad input, clients that leave or do not read, bursts, and signals."""

import concurrent.futures
import contextlib
import json
import shutil
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest

from tests.server.processes import Server, serving, start
from tests.server.test_guard import BODIES

LONG: dict[str, Any] = {
    "prompt": "the answer",
    "seed": 1,
    "temperature": 1.0,
    "ignore_eos": True,
    "return_token_ids": True,
}


@pytest.fixture(scope="module")
def server(checkpoint: Path) -> Iterator[Server]:
    with serving(checkpoint, "--draft-tokens", "2", "--max-num-queued-reqs", "3") as server:
        yield server


def stream_ids(server: Server, most: int, seconds_between: float = 0.0) -> Iterator[list[int]]:
    """The token ids of a long stream as they come."""
    body = LONG | {"max_tokens": most, "stream": True}
    with server.client() as http, http.stream("POST", "/v1/completions", json=body) as reply:
        assert reply.status_code == 200, reply.read()
        for line in reply.iter_lines():
            if line.startswith("data: {"):
                found = json.loads(line.removeprefix("data: "))
                assert "error" not in found, found
                yield found["choices"][0]["token_ids"]
                time.sleep(seconds_between)


def figures(server: Server) -> dict[str, float]:
    with server.client() as http:
        text = http.get("/metrics").text
    lines = (line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
    return {name: float(value) for name, value in lines}


def figure(server: Server, name: str) -> float:
    return sum(value for key, value in figures(server).items() if key.split("{")[0] == name)


def wait_idle(server: Server, timeout: float = 30.0) -> None:
    """Until nothing runs or waits and all pages are back."""
    limit = time.monotonic() + timeout
    names = ("vllm:num_requests_running", "vllm:num_requests_waiting", "vllm:kv_cache_usage_perc")
    while any(left := [figure(server, name) for name in names]):
        assert time.monotonic() < limit, left
        time.sleep(0.05)


def raw(server: Server, data: bytes, *, read: bool = True) -> bytes:
    """What comes back for these bytes on a connection of their own."""
    parts = urlsplit(server.url)
    with socket.create_connection((parts.hostname, parts.port), timeout=30) as connection:
        with contextlib.suppress(ConnectionError):
            connection.sendall(data)
        found = b""
        while read:
            try:
                piece = connection.recv(65536)
            except ConnectionError:
                break
            found += piece
            if not piece or (b"\r\n\r\n" in found and found.split(b"\r\n\r\n", 1)[1].rstrip().endswith(b"}")):
                break
        return found


BAD_HTTP = {
    "no HTTP": b"hello\r\n\r\n",
    "a large header": b"GET /health HTTP/1.1\r\nhost: x\r\nx: " + b"y" * 2**20 + b"\r\n\r\n",
    "many headers": b"GET /health HTTP/1.1\r\nhost: x\r\n" + b"a: b\r\n" * 10_000 + b"\r\n",
    "two lengths": b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 5\r\ncontent-length: 6\r\n\r\nhello",
    "a negative length": b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: -5\r\n\r\nhello",
    "a broken chunk": b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\nzz\r\nhello\r\n",
    "64 MB": b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: 67108864\r\n\r\n{",
}
BAD_FIELDS: list[dict[str, Any]] = [
    {"prompt": [700]},
    {"prompt": [2**31]},
    {"prompt": "x", "max_tokens": 5000},
    {"prompt": [5] * 5000},
    {"prompt": "x", "logit_bias": {"699999": 1}},
    {"prompt": "x", "stop_token_ids": [700]},
    {"prompt": "x", "min_tokens": 20, "max_tokens": 10},
    {"prompt": "x", "n": 10**9},
    {"prompt": "x", "logprobs": 10**6},
    {"prompt": ["x"] * 100_000},
    {"prompt": ["x"] * 4},  # the queue has room for 3
]


def test_a_good_stream_is_not_disturbed_by_bad_requests(server: Server):
    """Token for token what it says alone, while everything that is wrong is answered with 4xx and an error body."""
    alone = [token for ids in stream_ids(server, 1000) for token in ids]
    found: list[int] = []
    ended = threading.Event()

    def listen() -> None:
        for ids in stream_ids(server, 1000, 0.002):
            found.extend(ids)
        ended.set()

    listener = threading.Thread(target=listen)
    listener.start()
    for name, data in BAD_HTTP.items():
        head, _, body = raw(server, data).partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 4"), (name, head)
        assert json.loads(body)["error"].keys() == {"message", "type", "param", "code"}, name
    with server.client() as http:
        for content in BODIES.values():
            reply = http.post("/v1/chat/completions", content=content, headers={"content-type": "application/json"})
            assert reply.status_code == 400
        for body in BAD_FIELDS:
            reply = http.post("/v1/completions", json=body)
            assert reply.status_code == 400, body
            assert reply.json()["error"]["message"]
    overlapped = not ended.is_set()
    listener.join(60)
    assert found == alone
    assert len(alone) == 1000
    assert overlapped, "the stream was to last longer than what disturbs it"
    wait_idle(server)


def test_leaving_mid_stream_ends_the_request(server: Server):
    for ids in stream_ids(server, 4000):
        if ids:
            break
    wait_idle(server)
    assert figures(server)['vllm:request_success_total{finished_reason="abort",model_name="tiny"}'] >= 1


@pytest.mark.parametrize("stream", [False, True])
def test_leaving_before_the_answer_ends_the_request(server: Server, stream: bool):
    """Also those that wait for a place."""
    body = json.dumps(LONG | {"max_tokens": 4000, "stream": stream, "n": 3}).encode()
    head = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n"
    for _ in range(2):
        raw(server, head % len(body) + body, read=False)
    wait_idle(server)


def test_leaving_while_the_prompt_is_read_ends_the_request(server: Server):
    """A prompt of 300 steps, and its client leaves after a few of them."""
    body = json.dumps({"prompt": [400 + i % 200 for i in range(3600)], "max_tokens": 400, "ignore_eos": True}).encode()
    head = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n"
    steps = figure(server, "exaone:engine_steps_total")
    parts = urlsplit(server.url)
    with socket.create_connection((parts.hostname, parts.port), timeout=30) as connection:
        connection.sendall(head % len(body) + body)
        while figure(server, "exaone:engine_steps_total") < steps + 5:
            time.sleep(0.01)
    wait_idle(server)
    assert figure(server, "exaone:engine_steps_total") < steps + 300


def test_leaving_while_a_grammar_compiles_ends_the_request(server: Server):
    parts = " & ".join(f"/(?s:.*)a(?s:.){{{i}}}(?s:.*)/" for i in range(1, 60))
    grammar = f"start: A\nA: {parts}"  # takes until it is given up
    with server.client() as http:
        with contextlib.suppress(httpx.ReadTimeout):
            http.post("/v1/completions", json={"prompt": "x", "structured_outputs": {"grammar": grammar}}, timeout=1)
        assert http.get("/health").status_code == 200
        assert http.post("/v1/completions", json={"prompt": "x", "max_tokens": 1}, timeout=20).status_code == 200
    wait_idle(server)


def test_who_does_not_read_holds_nobody_up(server: Server):
    parts = urlsplit(server.url)
    body = json.dumps(LONG | {"max_tokens": 4000, "stream": True, "logprobs": 20}).encode()
    head = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n"
    with socket.socket() as slow:
        slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        slow.connect((parts.hostname, parts.port))
        slow.sendall(head % len(body) + body)
        started = time.monotonic()
        assert len([token for ids in stream_ids(server, 50) for token in ids]) == 50
        assert time.monotonic() - started < 30
    wait_idle(server)


def test_a_burst_beyond_the_queue_is_refused_and_the_rest_served(server: Server):
    """4 run, 3 wait, the others hear 503 and when to come again."""

    def one(_: int) -> httpx.Response:
        with server.client() as http:
            return http.post("/v1/completions", json=LONG | {"max_tokens": 300})

    rejections = 'vllm:admission_rejections_total{model_name="tiny",reason="queue_full"}'
    before = figures(server).get(rejections, 0)
    with concurrent.futures.ThreadPoolExecutor(40) as pool:
        replies = list(pool.map(one, range(40)))
    served = [reply for reply in replies if reply.status_code == 200]
    refused = [reply for reply in replies if reply.status_code == 503]
    assert len(served) + len(refused) == 40
    assert len(served) >= 7 and refused
    assert all(int(reply.headers["retry-after"]) >= 1 for reply in refused)
    assert {reply.json()["error"]["code"] for reply in refused} == {"queue_full"}
    assert len({tuple(reply.json()["choices"][0]["token_ids"]) for reply in served}) == 1
    assert figures(server)[rejections] - before == len(refused)
    wait_idle(server)


@pytest.mark.parametrize(("seconds", "drained"), [("60", True), ("0", False)])
def test_sigterm_lets_open_requests_end(checkpoint: Path, seconds: str, drained: bool):
    """Up to the time that is given: then they are cut off, and the exit code says so."""
    with serving(checkpoint, "--draft-tokens", "2", "--shutdown-timeout", seconds) as server:
        most = 300 if drained else 4000
        tokens, stopped = 0, False
        with contextlib.suppress(httpx.RemoteProtocolError):
            for ids in stream_ids(server, most, 0.001):
                tokens += len(ids)
                if tokens and not stopped:
                    server.process.send_signal(signal.SIGTERM)
                    stopped = True
        assert server.process.wait(60) == (0 if drained else 1)
        assert (tokens == most) == drained
        assert server.logged("stopped")["drained"] == drained
        with pytest.raises(httpx.ConnectError), server.client() as http:
            http.get("/health")


DYING = """
import pathlib, sys
from exaone_jax.cli import main
from exaone_jax.inference.engine import Engine
step = Engine.step
def dying(self):
    if pathlib.Path(sys.argv[-1]).exists():
        raise RuntimeError("out of memory")
    return step(self)
Engine.step = dying
sys.exit(main(sys.argv[1:-1]))
"""


def test_health_tells_of_the_engines_death(checkpoint: Path, tmp_path: Path):
    """Within 2 s; open requests and new ones hear of it."""
    poison = tmp_path / "die"
    with serving(checkpoint, "--draft-tokens", "2", str(poison), code=DYING) as server, server.client() as http:
        body = LONG | {"max_tokens": 4000, "stream": True}
        with http.stream("POST", "/v1/completions", json=body) as reply:
            lines = (line for line in reply.iter_lines() if line)
            next(lines)
            poison.touch()
            died = time.monotonic()
            rest = list(lines)
        assert json.loads(rest[-2].removeprefix("data: "))["error"]["code"] == "engine_dead"
        assert rest[-1] == "data: [DONE]"
        while http.get("/health").status_code != 503:
            assert time.monotonic() - died < 2
        assert http.post("/v1/completions", json={"prompt": "x"}).json()["error"]["code"] == "engine_dead"
        assert figure(server, "vllm:num_requests_running") >= 0, "/metrics still answers"


HANGING = """
import pathlib, sys, time
from exaone_jax.cli import main
from exaone_jax.inference import engine
read = engine._read
def hanging(flight):
    while pathlib.Path(sys.argv[-1]).exists():
        time.sleep(60)
    return read(flight)
engine._read = hanging
sys.exit(main(sys.argv[1:-1]))
"""


def test_a_device_that_hangs_is_given_up(checkpoint: Path, tmp_path: Path):
    """Within the time that a step may take and an eighth: open requests, streams and new ones hear so, /health is 503, and
    SIGTERM ends the process though a thread of it hangs."""
    poison = tmp_path / "hang"
    flags = ("--draft-tokens", "2", "--step-timeout", "4", str(poison))
    with serving(checkpoint, *flags, code=HANGING) as server, server.client() as http:
        body = LONG | {"max_tokens": 4000}
        with concurrent.futures.ThreadPoolExecutor(1) as pool:
            whole = pool.submit(http.post, "/v1/completions", json=body)
            with http.stream("POST", "/v1/completions", json=body | {"stream": True}) as reply:
                lines = (line for line in reply.iter_lines() if line)
                next(lines)
                poison.touch()
                hung = time.monotonic()
                assert http.get("/health").status_code == 200
                rest = list(lines)
            assert 3 < time.monotonic() - hung < 8
        error = json.loads(rest[-2].removeprefix("data: "))["error"]
        assert error["code"] == "engine_stuck" and "within 4 s" in error["message"]
        assert rest[-1] == "data: [DONE]"
        assert whole.result().status_code == 503
        assert whole.result().json()["error"]["code"] == "engine_stuck"
        health = http.get("/health")
        assert health.status_code == 503 and "within 4 s" in health.json()["status"]
        assert http.post("/v1/completions", json={"prompt": "x"}).json()["error"]["code"] == "engine_stuck"
        assert figure(server, "vllm:num_requests_running") >= 0, "/metrics still answers"
        assert "hanging" in server.logged("the engine is stuck")["stack"]
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(20) == 1
        assert server.logged("stopped")["drained"] is False


def end_of(server: Server) -> tuple[int, str]:
    code = server.process.wait(120)
    if server._reader is not None:
        server._reader.join(10)
    return code, "".join(server.noise)


def test_what_cannot_start_says_why(checkpoint: Path, tmp_path: Path):
    """Each before a weight is read, but for the memory, which the model decides."""
    empty = tmp_path / "empty"
    empty.write_text("\n")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        cases = [
            (["--port", port], 3, f"--port {port}: cannot listen there"),
            (["--ssl-keyfile", "no.pem", "--ssl-certfile", "no.pem"], 2, "--ssl-keyfile no.pem: not found"),
            (["--ssl-keyfile", "no.pem"], 2, "go together"),
            (["--api-key-file", "no.txt"], 2, "--api-key-file no.txt: cannot be read"),
            (["--api-key-file", str(empty)], 2, "holds no key"),
            (["--max-model-len", "5000"], 2, "the model's context is 4096 tokens"),
            (["--kv-cache-memory-bytes", "1000"], 2, "bytes"),
            (["--max-num-seqs", "0"], 2, "max_requests"),
        ]
        servers = [(start(checkpoint, *flags, ready=False), code, why) for flags, code, why in cases]
        for server, code, why in servers:
            assert end_of(server)[0] == code
            assert why in end_of(server)[1], end_of(server)
            assert "Traceback" not in end_of(server)[1]


def test_without_a_tokenizer_token_ids_are_served(checkpoint: Path, tmp_path: Path):
    bare = tmp_path / "bare"
    bare.mkdir()
    for name in ("config.json", "model.safetensors"):
        shutil.copy(checkpoint / name, bare / name)
    with serving(bare, "--draft-tokens", "2") as server, server.client() as http:
        assert "/v1/chat/completions" in server.logged("no tokenizer")["not_served"]
        body = {"prompt": [5, 6, 7], "max_tokens": 4, "temperature": 0, "return_token_ids": True}
        assert len(http.post("/v1/completions", json=body).json()["choices"][0]["token_ids"]) == 4
        chat = {"messages": [{"role": "user", "content": "x"}]}
        refused = [("/v1/chat/completions", chat), ("/tokenize", {"prompt": "x"}), ("/detokenize", {"tokens": [5]})]
        refused += [("/v1/completions", body | more) for more in ({"prompt": "x"}, {"echo": True}, {"stop": "x"})]
        for path, wrong in refused:
            reply = http.post(path, json=wrong)
            assert reply.status_code == 400, (path, reply.text)
            assert "tokenizer" in reply.json()["error"]["message"]


def test_tls(checkpoint: Path, tmp_path: Path):
    key, cert = tmp_path / "key.pem", tmp_path / "cert.pem"
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "1", "-subj", "/CN=localhost"]
    try:
        subprocess.run([*command, "-keyout", str(key), "-out", str(cert)], check=True, capture_output=True)
    except FileNotFoundError:
        pytest.skip("there is no openssl to make a certificate with")
    flags = ("--draft-tokens", "2", "--ssl-keyfile", str(key), "--ssl-certfile", str(cert))
    with serving(checkpoint, *flags) as server, server.client(verify=False) as http:
        assert server.url.startswith("https://")
        assert http.get("/health").status_code == 200
