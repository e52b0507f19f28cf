"""Serving on several hosts: real processes, each with a part of the devices, that run the same steps."""

import concurrent.futures
import contextlib
import signal
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.server.processes import Server, start

MESH = ("--mesh", "expert=2,tensor=2", "--draft-tokens", "2")


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


@contextlib.contextmanager
def two_hosts(checkpoint: Path) -> Iterator[tuple[Server, Server]]:
    """The first process and the other, with two devices each."""
    join = ("--coordinator-address", f"127.0.0.1:{free_port()}", "--num-processes", "2", "--process-id")
    servers = [start(checkpoint, *MESH, *join, str(rank), devices=2, ready=False) for rank in range(2)]
    try:
        servers[0].url = servers[0].logged("ready", 450)["url"]
        yield servers[0], servers[1]
    finally:
        for server in servers:
            server.process.kill()
            server.process.wait(60)


def body(i: int) -> dict[str, Any]:
    prompt = ["the answer", "서울 the library", "question " * 9][i % 3]
    asked = {"prompt": prompt, "max_tokens": 10 + i, "return_token_ids": True, "temperature": 0.8 * (i % 2), "seed": i}
    if i == 4:
        asked |= {"structured_outputs": {"regex": "[a-z]{3} (yes|no)"}}
    if i == 5:
        asked |= {"stop": ["er"], "logit_bias": {"60": -3.0}, "presence_penalty": 0.5}
    return asked


def answers(server: Server) -> list[tuple[list[int], str, str]]:
    def ask(i: int) -> tuple[list[int], str, str]:
        with server.client() as http:
            reply = http.post("/v1/completions", json=body(i))
        assert reply.status_code == 200, reply.text
        choice = reply.json()["choices"][0]
        return choice["token_ids"], choice["text"], choice["finish_reason"]

    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        return list(pool.map(ask, range(9)))


def test_two_processes_say_what_one_says(checkpoint: Path, server: Server):
    """Drafts, sampling, a grammar and stop strings, four requests at a time; a client that leaves; then SIGTERM to both."""
    with two_hosts(checkpoint) as (first, other):
        assert answers(first) == answers(server)
        left = {"prompt": "the", "max_tokens": 3000, "stream": True, "ignore_eos": True}
        with first.client() as http, http.stream("POST", "/v1/completions", json=left) as reply:
            next(reply.iter_lines())
        assert answers(first) == answers(server)  # what was remembered, and the cancelled one, on both
        for each in (other, first):
            each.process.send_signal(signal.SIGTERM)
        assert first.process.wait(60) == 0
        assert other.process.wait(60) == 0
        assert other.logged("stopped")["drained"]


@pytest.mark.parametrize("killed", [0, 1])
def test_a_process_that_dies_ends_the_other(checkpoint: Path, killed: int):
    with two_hosts(checkpoint) as servers:
        servers[killed].process.kill()
        if killed == 1:
            with servers[0].client() as http, contextlib.suppress(Exception):
                http.post("/v1/completions", json=body(0))
            limit = time.monotonic() + 60
            while servers[0].process.poll() is None:  # or it lives on to say so
                with servers[0].client() as http:
                    if http.get("/health").status_code == 503:
                        break
                assert time.monotonic() < limit
                time.sleep(0.1)
        else:
            assert servers[1].process.wait(60) != 0


def test_options_that_do_not_go_together(checkpoint: Path):
    alone = start(checkpoint, "--num-processes", "2", ready=False)
    assert alone.process.wait(60) == 2
    alone._reader.join(10)
    assert "coordinator, num_processes and process_id go together" in "".join(alone.noise) + str(alone.lines)
