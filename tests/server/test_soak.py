"""A server under mixed load for a while: its memory stays flat, and all pages come back."""

import json
import random
import re
import threading
import time
from pathlib import Path

import httpx
import pytest

from tests.server.processes import Server, serving
from tests.server.test_operations import figure, wait_idle

CLIENTS = 6
WARM, SOAK = 30.0, 120.0  # seconds
# What pieces of freed memory the allocator keeps for itself varies from moment to moment; a leak of a kilobyte a request shows.
MAX_GROWTH = 24 * 2**20


def resident(server: Server) -> int:
    status = Path(f"/proc/{server.process.pid}/status").read_text()
    return int(re.search(r"VmRSS:\s+(\d+) kB", status)[1]) * 1024


def one_request(http: httpx.Client, rng: random.Random) -> str:
    """One of every kind, and what became of it."""
    prompt = rng.choices(range(300, 600), k=rng.choice((3, 20, 200)))
    body = {"prompt": prompt, "max_tokens": rng.choice((1, 8, 40)), "seed": rng.randrange(100), "temperature": 1.0}
    kind = rng.choice(("whole", "stream", "leave", "refused", "chat", "scored"))
    if kind == "refused":
        assert http.post("/v1/completions", json=body | {"no_such": 1}).status_code == 400
    elif kind == "chat":
        chat = {"messages": [{"role": "user", "content": "서울?"}], "max_tokens": 12, "seed": 1}
        assert http.post("/v1/chat/completions", json=chat).status_code == 200
    elif kind in ("stream", "leave"):
        with http.stream("POST", "/v1/completions", json=body | {"stream": True, "ignore_eos": True}) as reply:
            assert reply.status_code == 200
            lines = reply.iter_lines()
            if kind == "leave":
                next(lines)
                return kind
            told = [line.removeprefix("data: ") for line in lines if line.startswith("data: ")]
            assert told[-1] == "[DONE]"
            assert json.loads(told[-2])["choices"][0]["finish_reason"] == "length"
    else:
        more = {"logprobs": 3} if kind == "scored" else {}
        assert http.post("/v1/completions", json=body | more).status_code == 200
    return kind


@pytest.mark.slow
def test_memory_stays_flat_and_pages_come_back(checkpoint: Path) -> None:
    problems: list[BaseException] = []
    counts: dict[str, int] = {}

    def client(server: Server, number: int, until: float) -> None:
        rng = random.Random(number)
        with server.client() as http:
            while time.monotonic() < until and not problems:
                try:
                    kind = one_request(http, rng)
                except BaseException as error:
                    problems.append(error)
                    raise
                counts[kind] = counts.get(kind, 0) + 1

    def load(server: Server, seconds: float) -> None:
        until = time.monotonic() + seconds
        clients = [threading.Thread(target=client, args=(server, number, until)) for number in range(CLIENTS)]
        for each in clients:
            each.start()
        for each in clients:
            each.join()
        assert not problems, problems
        wait_idle(server)

    with serving(checkpoint, "--draft-tokens", "2", "--max-num-queued-reqs", "64") as server:
        load(server, WARM)
        before, steps = resident(server), figure(server, "exaone:engine_steps_total")
        counts.clear()
        load(server, SOAK)
        grown = resident(server) - before
        assert grown < MAX_GROWTH, f"{grown / 2**20:.1f} MiB over {counts}"
        assert figure(server, "exaone:engine_steps_total") > steps
        assert len(counts) == 6, counts
        assert server.process.poll() is None
