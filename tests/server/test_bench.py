"""`exaone-jax bench serve` against a real server, and its definitions against figures worked out by hand."""

import json
from pathlib import Path

import pytest

from exaone_jax.cli import main
from exaone_jax.errors import InputError
from exaone_jax.server import bench
from tests.server.processes import Server


def test_the_figures_of_a_run():
    done = [
        bench.Timing(prompt_tokens=10, output_tokens=5, ttft=0.1, latency=0.5, gaps=[0.1, 0.3]),
        bench.Timing(prompt_tokens=20, output_tokens=1, ttft=0.3, latency=0.3),
        bench.Timing(error="lost"),
    ]
    load = bench.Load("http://x", [("x", 5)], goodput={"ttft": 200, "e2el": 600})
    found = bench.report(load, done, 2.0)
    assert (found["completed"], found["failed"], found["errors"]) == (2, 1, ["lost"])
    assert (found["total_input_tokens"], found["total_output_tokens"]) == (30, 6)
    assert found["request_throughput"] == 1.0
    assert found["output_throughput"] == 3.0
    assert found["total_token_throughput"] == 18.0
    assert found["request_goodput"] == 0.5
    assert found["ttft_ms"]["mean"] == pytest.approx(200)
    assert found["tpot_ms"]["mean"] == pytest.approx(100), (
        "(500 - 100) / 4, of the one request that has more than a token"
    )
    assert found["itl_ms"]["p50"] == pytest.approx(200)
    assert found["e2el_ms"]["std"] == pytest.approx(100)


def test_acceptance_is_what_the_counters_grew_by():
    prefix = "vllm:spec_decode_num_"
    names = ["drafts_total{}", "draft_tokens_total{}", "accepted_tokens_total{}"]
    names += ['accepted_tokens_per_pos_total{position="0"}', 'accepted_tokens_per_pos_total{position="1"}']
    before = dict(zip((prefix + name for name in names), (10, 20, 5, 4, 1), strict=True))
    after = dict(zip((prefix + name for name in names), (20, 40, 18, 13, 5), strict=True))
    spec = bench._acceptance(before, after)["speculation"]
    assert spec["acceptance_rate"] == 13 / 20
    assert spec["acceptance_length"] == 1 + 13 / 10
    assert spec["per_position"] == [0.9, 0.4]
    assert bench._acceptance({}, {})["speculation"] is None


def test_arrivals_are_a_poisson_process():
    at = bench._arrivals(2000, 50.0, 0)
    assert at == sorted(at) and at == bench._arrivals(2000, 50.0, 0)
    assert at[-1] == pytest.approx(40, rel=0.1)
    assert bench._arrivals(3, None, 0) == [0.0] * 3


def test_against_a_real_server(server: Server, capsys: pytest.CaptureFixture[str]):
    flags = ["--num-prompts", "8", "--input-len", "12", "--output-len", "10", "--max-concurrency", "3"]
    flags += ["--request-rate", "200", "--goodput", "ttft:60000", "--goodput", "tpot:0.000001"]
    assert main(["bench", "serve", "--url", server.url, *flags, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["completed"], found["failed"]) == (8, 0)
    assert (found["total_input_tokens"], found["total_output_tokens"]) == (96, 80)
    assert found["request_goodput"] == 0
    for name in ("ttft_ms", "tpot_ms", "itl_ms", "e2el_ms"):
        assert 0 < found[name]["p50"] <= found[name]["p99"]
    assert found["ttft_ms"]["mean"] < found["e2el_ms"]["mean"]
    assert 0 <= found["speculation"]["acceptance_rate"] <= 1
    assert found["speculation"]["acceptance_length"] == pytest.approx(1 + sum(found["speculation"]["per_position"]))


def test_a_dataset(server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    file = tmp_path / "prompts.jsonl"
    file.write_text('{"prompt": "서울", "max_tokens": 3}\n{"prompt": [5, 6]}\n', encoding="utf-8")
    assert main(["bench", "serve", "--url", server.url, "--dataset", str(file), "--output-len", "4"]) == 0
    assert "total output tokens" in (out := capsys.readouterr().out)
    assert " 7.00" in out


def test_what_cannot_be_measured_is_said(server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["bench", "serve", "--url", "http://127.0.0.1:9"]) == 2
    assert main(["bench", "serve", "--url", server.url, "--goodput", "itl:5"]) == 2
    assert main(["bench", "serve", "--url", server.url, "--goodput", "ttft"]) == 2
    assert main(["bench", "serve", "--url", server.url, "--model", "nobody"]) == 2
    assert "nobody" in capsys.readouterr().err
    (tmp_path / "bad").write_text("{}\n")
    with pytest.raises(InputError, match="bad:1: expected"):
        bench.read_prompts(tmp_path / "bad", 5)
