"""Data parallelism as clients see it: one server process with two engines."""

import concurrent.futures
import json
import signal
import time
from pathlib import Path

import pytest

from exaone_jax.errors import InputError
from exaone_jax.server import serve
from tests.server.processes import Server, start
from tests.server.test_hosts import answers
from tests.server.test_operations import LONG, figures, wait_idle

# As the server, but the second engine dies when the file of the last argument exists.
DYING = """
import pathlib, sys
from exaone_jax.cli import main
from exaone_jax.inference.engine import Engine
made, init, step = [], Engine.__init__, Engine.step
def counted(self, *args, **more):
    made.append(self)
    init(self, *args, **more)
def dying(self):
    if self is made[1] and pathlib.Path(sys.argv[-1]).exists():
        raise RuntimeError("out of memory")
    return step(self)
Engine.__init__, Engine.step = counted, dying
sys.exit(main(sys.argv[1:-1]))
"""
FLAGS = ("--mesh", "data=2", "--draft-tokens", "2")


def test_two_engines_say_what_one_says_until_one_dies(checkpoint: Path, server: Server, tmp_path: Path):
    """Each takes its part; when one dies, /health says so within 2 s, and whoever waits for either hears of it."""
    poison = tmp_path / "die"
    both = start(checkpoint, *FLAGS, str(poison), code=DYING, devices=2)
    try:
        assert both.logged("loaded")["engines"] == 2
        assert answers(both) == answers(server)
        wait_idle(both)
        counted = figures(both)
        for engine in ("0", "1"):
            labels = f'{{engine="{engine}",model_name="tiny"}}'
            assert counted[f"vllm:generation_tokens_total{labels}"] > 0
            assert counted[f'exaone:kv_pool_usage{{engine="{engine}",model_name="tiny",window="global"}}'] == 0.0

        def last_of_a_stream() -> str:
            with both.client() as http:
                body = LONG | {"max_tokens": 4000, "stream": True}
                with http.stream("POST", "/v1/completions", json=body) as reply:
                    return [line for line in reply.iter_lines() if line][-2]

        with concurrent.futures.ThreadPoolExecutor(2) as pool, both.client() as http:
            streams = [pool.submit(last_of_a_stream) for _ in range(2)]
            while min(figures(both)[f'vllm:num_requests_running{{engine="{i}",model_name="tiny"}}'] for i in "01") < 1:
                assert not any(stream.done() for stream in streams)
            poison.touch()
            died = time.monotonic()
            while http.get("/health").status_code != 503:
                assert time.monotonic() - died < 2
            assert http.post("/v1/completions", json={"prompt": "x"}).json()["error"]["code"] == "engine_dead"
            both.process.send_signal(signal.SIGTERM)
            ends = [json.loads(stream.result().removeprefix("data: ")) for stream in streams]
        assert sorted("error" in end for end in ends) == [False, True]  # the other's ends as it would have
        assert both.process.wait(60) == 0
    finally:
        both.process.kill()
        both.process.wait(60)


def test_hosts_share_no_copies(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(serve.jax, "process_count", lambda: 2)
    with pytest.raises(InputError, match=r"data=2 engines on 2 hosts, expected data=1.*a server for each copy"):
        serve._meshes("data=2,tensor=-1")
    (mesh,) = serve._meshes("tensor=-1")
    assert mesh is not None and mesh.shape["tensor"] == mesh.size
