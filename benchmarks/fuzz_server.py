"""schemathesis over a running server's own OpenAPI, in all modes: no answer may be 5xx, and none undocumented.

    python -m venv /tmp/fuzz && /tmp/fuzz/bin/pip install schemathesis==4.32.5
    exaone-jax serve --model CHECKPOINT --max-model-len 64 --port 8000
    /tmp/fuzz/bin/python benchmarks/fuzz_server.py --url http://127.0.0.1:8000 [--seconds 300] [--examples 100] [--seed 1]

A short context keeps each answer short. Exit code 0: nothing was found. It needs the environment that has schemathesis, and
none of this project's.
"""

import argparse
import subprocess
import sys
from pathlib import Path

# Bad bodies must be refused, and what the OpenAPI says must hold; a 5xx is the failure that counts.
CHECKS = "not_a_server_error,status_code_conformance,negative_data_rejection,unsupported_method"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--seconds", type=int, default=300)
    parser.add_argument("--examples", type=int, default=100, help="of each path")
    parser.add_argument("--seed", type=int, default=1)
    given = parser.parse_args()
    command = [str(Path(sys.executable).with_name("st")), "run", f"{given.url}/openapi.json", "--mode", "all"]
    command += ["--checks", CHECKS, "--continue-on-failure", "--request-timeout", "60", "--no-color"]
    command += ["-n", str(given.examples), "--max-time", str(given.seconds), "--seed", str(given.seed)]
    return subprocess.run(command).returncode


if __name__ == "__main__":
    raise SystemExit(main())
