"""Small runs for tests: a model of every kind of layer, bytes for tokens, and a text that is learnt quickly."""

import json
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from exaone_jax.config.run import RunConfig, parse_run

DENSE = {
    "model_type": "exaone4",
    "vocab_size": 618,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_heads": 2,
    "num_kv_heads": 1,
    "head_dim": 8,
    "layers": [{"norm": "post"}],
    "max_position_embeddings": 64,
    "dtype": "float32",
}
SPARSE = DENSE | {
    "model_type": "exaone_moe",
    "layers": [{"window": 5}, {"rope": False, "moe": True}],
    "moe": {"num_experts": 4, "num_experts_per_tok": 2, "num_shared_experts": 1, "intermediate_size": 8},
    "mtp_layer": {},
}


@cache
def text_file() -> Path:
    """One for all runs of a process: a run goes on only in the data it was started with."""
    path = Path(tempfile.mkdtemp(prefix="exaone-jax-text-")) / "text.jsonl"
    lines = [f"line {n}: " + "abcdefgh"[: n % 7 + 1] * (n % 5 + 1) for n in range(120)]
    path.write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    return path


def raw_run(folder: Path, **changes: Any) -> dict[str, Any]:
    """A run on all devices there are, which need 8 rows."""
    return {
        "run_dir": str(folder / "run"),
        "steps": 6,
        "model": DENSE,
        "tokenizer": "bytes",
        "data": {"sources": [{"path": str(text_file())}], "epochs": None},
        "context": 16,
        "batch_size": 8,
        "dtype": "float32",
        "remat": "none",
        "mesh": "data=-1",
        "optimizer": {"learning_rate": 1e-2, "warmup": 2},
        "save": {"every": 2},
        "guard": {"window": 8},
    } | changes


def small_run(folder: Path, **changes: Any) -> RunConfig:
    return parse_run(raw_run(folder, **changes), "test")


def yaml_file(folder: Path, **changes: Any) -> Path:
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(raw_run(folder, **changes)))
    return path
