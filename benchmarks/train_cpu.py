"""Training on this machine's CPU: a step beside transformers + torch, and what a run pays beside its steps.

    python -m benchmarks.train_cpu [--parts step run] [--dtype float32 bfloat16] [--model hybrid global moe]
                                   [--steps 120] [--every 30] [--tiny]

`step`: forward, backward and AdamW of the same model, batch, dtype and threads, in processes that take turns; tokens a second
and their ratio, exaone_jax / transformers.
`run`: a dense float32 model trained as `exaone-jax train` does, and what it left in metrics.jsonl and goodput.jsonl: what a step
waited for its data, and for each save what training waited for it and by how much the steps that were taken while it was
written were longer than the median of the others. Both are told as a part of those steps' time, and of all steps from one
save to the next. Where the disk is slower than the steps between two saves, no other steps are left, and it says so.
--tiny: a moment's work, which shows that it runs and measures nothing.
"""

import argparse
import json
import statistics
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from rich.table import Table

from benchmarks.machine import describe
from benchmarks.transformers_cpu import ROWS, Row, exaone, save_random, transformers_torch
from benchmarks.turns import Side, compare
from exaone_jax.config.run import parse_run
from exaone_jax.training.loop import train

SKIPPED = 5  # first steps of a run: compiled, and on fresh memory
TINY_SHAPE = dict(
    num_hidden_layers=4, hidden_size=128, intermediate_size=256, num_attention_heads=2, num_key_value_heads=1
)
SHAPES = {"moe": dict(num_hidden_layers=4)}  # of twelve layers, both sides' float32 states together are over 24 GB
TINY_ROWS = [Row("train", 1, 64, 1)]


def steps(console: Console, kinds: list[str], dtypes: list[str], tiny: bool) -> None:
    console.print(describe(transformers=version("transformers"), torch=version("torch")))
    console.print("tokens/s: exaone_jax, transformers; ratio")
    rows = TINY_ROWS if tiny else [row for row in ROWS if row.family == "train"]
    for dtype in dtypes:
        for kind in kinds:
            with tempfile.TemporaryDirectory() as directory:
                save_random(directory, kind, dtype, **(TINY_SHAPE if tiny else SHAPES.get(kind, {})))
                for row in rows:
                    with (
                        Side(exaone, directory, dtype, row) as ours,
                        Side(transformers_torch, directory, dtype, row) as theirs,
                    ):
                        mine, other, _, _ = compare(ours, theirs, row.repeats)
                    tokens = row.batch * row.length
                    console.print(
                        f"{dtype}, {kind}, {row.name}: {tokens / mine:,.0f}, {tokens / other:,.0f}; {other / mine:.2f}"
                    )


def configuration(folder: Path, count: int, every: int, tiny: bool) -> dict[str, Any]:
    """Of some 9 million parameters a layer, on this package's own source."""
    size, layers, context = (64, 1, 64) if tiny else (768, 4, 512)
    model = {
        "model_type": "exaone4", "vocab_size": 640, "hidden_size": size, "intermediate_size": 4 * size,
        "num_heads": size // 64, "num_kv_heads": 1, "head_dim": 64, "layers": [{"norm": "post"}] * layers,
        "max_position_embeddings": 1024, "dtype": "float32",
    }  # fmt: skip
    return {
        "run_dir": str(folder), "steps": count, "model": model, "tokenizer": "bytes", "context": context, "batch_size": 4,
        "data": {"sources": [{"path": str(Path(__file__).parents[1] / "exaone_jax/**/*.py"), "format": "text"}]},
        "dtype": "float32", "remat": "none", "mesh": "data=1", "optimizer": {"learning_rate": 1e-3},
        "save": {"every": every},
    }  # fmt: skip


class Saves(NamedTuple):
    """Seconds, of a save on average. beside: of the steps taken while it was written; longer: than as many others."""

    waited: float
    written: float
    beside: float
    longer: float


def saves(seconds: list[float], written: dict[int, float], waited: float, usual: float) -> Saves:
    """Of the saves that had training beside them. seconds: of each step; written: of each save in its thread, by step."""
    beside, count = 0.0, 0
    for step, duration in written.items():
        left = duration
        for second in seconds[step:]:
            if left <= 0:
                break
            beside, left, count = beside + second, left - second, count + 1
    n = len(written)
    return Saves(waited / n, statistics.mean(written.values()), beside / n, (beside - usual * count) / n)


def usual_step(seconds: list[float], written: dict[int, float]) -> float:
    """The median of the steps with no save beside them; NaN where there is none."""
    free, left = [], 0.0
    for step, second in enumerate(seconds):
        left = written.get(step, left)
        if left <= 0 and step >= SKIPPED:
            free.append(second)
        left -= second
    return statistics.median(free) if free else float("nan")


def run(console: Console, count: int, every: int, tiny: bool) -> None:
    with tempfile.TemporaryDirectory() as directory:
        folder = Path(directory) / "run"
        train(parse_run(configuration(folder, count, every, tiny), "benchmark"))
        metrics, events = (
            [json.loads(line) for line in (folder / name).read_text().splitlines()]
            for name in ("metrics.jsonl", "goodput.jsonl")
        )
        state = sum(path.stat().st_size for path in next((folder / "checkpoints").iterdir()).rglob("*"))
    seconds = [line["seconds"] for line in metrics if "loss" in line]
    written = {event["step"]: event["seconds"] for event in events if event["event"] == "saved"}
    phases = next(event["seconds"] for event in events if event["event"] == "goodput")
    last = written.pop(count)  # no training beside it: the run waited for all of it
    usual = usual_step(seconds, written)
    found = saves(seconds, written, max(0.0, phases["save"] - last), usual)
    table = Table(title=describe())
    for name in ("", "seconds", f"of {every} steps", "of the steps beside it"):
        table.add_column(name, justify="right" if name else "left")

    def row(name: str, value: float) -> None:
        table.add_row(name, f"{value:.4f}", f"{value / (usual * every):.2%}", f"{value / found.beside:.2%}")

    table.add_row("a step, median without a save beside it", f"{usual:.4f}", "", "")
    data = phases["data"] / count
    table.add_row("waiting for data, a step", f"{data:.5f}", f"{data / usual:.2%}", "")
    table.add_row("a save, in its thread", f"{found.written:.4f}", "", "")
    row("  training waits for it", found.waited)
    row("  steps beside it, longer by", found.longer)
    row("  both", found.waited + found.longer)
    console.print(table)
    console.print(f"{state / 1e6:,.0f} MB a saved step; {len(written)} saves with training beside them")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=["step", "run"], default=["step", "run"])
    parser.add_argument("--dtype", nargs="+", choices=["float32", "bfloat16"], default=["float32", "bfloat16"])
    parser.add_argument("--model", nargs="+", choices=["hybrid", "global", "moe"], default=["hybrid", "global", "moe"])
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--every", type=int, default=30)
    parser.add_argument("--tiny", action="store_true")
    args = parser.parse_args()
    if args.steps <= args.every:
        parser.error(
            f"--steps {args.steps}: expected more than --every {args.every}, for a save with training beside it"
        )
    console = Console(width=120)
    if "step" in args.parts:
        steps(console, args.model, args.dtype, args.tiny)
    if "run" in args.parts:
        run(console, args.steps, args.every, args.tiny)


if __name__ == "__main__":
    main()
