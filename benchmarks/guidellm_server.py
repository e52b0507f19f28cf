"""guidellm's concurrency sweep against a running server; a line of JSON for each concurrency.

    python -m venv /tmp/gl && /tmp/gl/bin/pip install guidellm==0.8.1
    exaone-jax serve --model CHECKPOINT --port 8000
    python benchmarks/guidellm_server.py --guidellm /tmp/gl/bin/guidellm --model CHECKPOINT --url http://127.0.0.1:8000

guidellm streams chat completions of synthetic texts, which it makes with the checkpoint's own tokenizer, so nothing is
downloaded, and asks for answers of a fixed length (`ignore_eos`). Times are in milliseconds. Exit code 1: a request failed or
was not completed, or an answer had another length than was asked for.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

TIMES = {"ttft": "time_to_first_token_ms", "tpot": "time_per_output_token_ms", "itl": "inter_token_latency_ms"}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--guidellm", required=True, help="the program, in an environment of its own")
    parser.add_argument("--model", type=Path, required=True, help="the checkpoint, for its tokenizer")
    parser.add_argument("--served-model-name", help="as requests name it; the checkpoint's directory if not given")
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--concurrency", type=int, nargs="+", default=[1, 2, 4, 8, 16])
    parser.add_argument("--requests", type=int, default=64, help="at each concurrency")
    parser.add_argument("--input-len", type=int, default=256)
    parser.add_argument("--output-len", type=int, default=64)
    parser.add_argument("--report", type=Path, help="where guidellm's own JSON goes, if it is to be kept")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        report = given.report or Path(folder) / "report.json"
        run(given, report.resolve())
        benchmarks = json.loads(report.read_text(encoding="utf-8"))["benchmarks"]
    rows = [row(found, streams) for found, streams in zip(benchmarks, given.concurrency, strict=True)]
    for each in rows:
        print(json.dumps(each))
    whole = all(each["completed"] == given.requests and each["failed"] == 0 for each in rows)
    return int(not whole or any(each["output_len"] != [given.output_len] * 2 for each in rows))


def run(given: argparse.Namespace, report: Path) -> None:
    """Measure; what guidellm tells of its progress goes to stderr."""
    model = given.model.resolve()
    options = {
        "backend": f"kind=openai_http,target={given.url},model={given.served_model_name or model.name}",
        "tokenizer": f"kind=hf_auto,model={model}",
        "data": f"kind=synthetic_text,prompt_tokens={given.input_len},output_tokens={given.output_len}",
        "profile": f"kind=concurrent,streams={given.concurrency[0]}",
        "constraint": f"kind=max_requests,count={given.requests}",
        "output": f"kind=json,path={report}",
    }
    command = [given.guidellm, "run", "--disable-console-interactive"]
    command += [part for name, value in options.items() for part in (f"--{name}", value)]
    command += ["--override", "profile.streams", ",".join(map(str, given.concurrency))]
    subprocess.run(command, check=True, stdout=sys.stderr, env={**os.environ, "NO_PROXY": "*"})


def row(found: dict[str, Any], streams: int) -> dict[str, Any]:
    """What there is to say of one concurrency. output_len: of the shortest and of the longest answer."""
    metrics, totals = found["metrics"], found["metrics"]["request_totals"]
    lengths = metrics["output_token_count"]["successful"]
    return {
        "concurrency": streams,
        "completed": totals["successful"],
        "failed": totals["errored"] + totals["incomplete"],
        "output_len": [lengths["min"], lengths["max"]],
        "requests_per_second": round(totals["successful"] / found["duration"], 3),
        "output_tokens_per_second": round(lengths["total_sum"] / found["duration"], 3),
        **{name: quantiles(metrics[key]["successful"]) for name, key in TIMES.items()},
        "latency": quantiles(metrics["request_latency"]["successful"], 1000),
    }


def quantiles(told: dict[str, Any], scale: float = 1) -> dict[str, float]:
    return {name: round(told["percentiles"][name] * scale, 3) for name in ("p50", "p95", "p99")}


if __name__ == "__main__":
    raise SystemExit(main())
