"""A small dense model and a small K-EXAONE learn Python: each overfits a few files, then generalises from the whole library.

    python -m scripts.learning_curves [--models dense sparse] [--steps 250 900] [--out docs]

Trains as `exaone-jax train` does, on a CPU, on the source of Python's standard library; every 25th file is held out. On a few
files the training loss goes to nothing while the held-out loss rises; on the library, with the same model and recipe, both
fall together. Writes learning-curves.json and learning-curves.png. Exit code 1 where that is not what came out.
"""

import argparse
import json
import math
import tempfile
import time
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from benchmarks.machine import describe
from exaone_jax.config.run import parse_run
from exaone_jax.text import Tokenizer, train_bpe
from exaone_jax.training.loop import train
from scripts.demo import Corpus, gather, write_text

CHARACTERS = {"few files": 60_000, "library": 6_000_000}
VOCABULARY, CONTEXT, BATCH, POINTS = 2048, 256, 8, 14
LOCAL, GLOBAL = {"window": 64}, {"rope": False}


def model_of(kind: str, tokenizer: Tokenizer) -> dict[str, Any]:
    """`dense`: EXAONE 4.0's post-norm layers. `sparse`: K-EXAONE's, 8 experts of which 2 answer, and an MTP layer. Both LLLG."""
    shared = {
        "vocab_size": tokenizer.vocab_size, "hidden_size": 128, "intermediate_size": 384, "num_heads": 4, "num_kv_heads": 2,
        "head_dim": 32, "rope_theta": 1e4, "max_position_embeddings": 1024, "bos_token_id": tokenizer.bos_id,
        "eos_token_ids": list(tokenizer.eos_ids), "pad_token_id": tokenizer.pad_id, "dtype": "float32",
    }  # fmt: skip
    if kind == "dense":
        layers = [spec | {"norm": "post"} for spec in (LOCAL, LOCAL, LOCAL, GLOBAL)]
        return shared | {"model_type": "exaone4", "layers": layers}
    experts = {"num_experts": 8, "num_experts_per_tok": 2, "num_shared_experts": 1, "intermediate_size": 96}
    layers = [LOCAL, *(spec | {"moe": True} for spec in (LOCAL, LOCAL, GLOBAL))]
    return shared | {"model_type": "exaone_moe", "layers": layers, "moe": experts, "mtp_layer": {}}


def learn(kind: str, corpus: Corpus, tokenizer: Tokenizer, steps: int, folder: Path) -> dict[str, Any]:
    """Losses in nats a token: of each step, and of held-out rows by step."""
    folder.mkdir()
    tokenizer.save(folder / "tokenizer")
    run = {
        "run_dir": str(folder / "run"), "steps": steps, "model": model_of(kind, tokenizer),
        "tokenizer": str(folder / "tokenizer"), "data": write_text(corpus, folder / "text").model_dump() | {"epochs": None},
        "context": CONTEXT, "batch_size": BATCH, "mesh": "data=1", "dtype": "float32", "remat": "none",
        "optimizer": {"name": "muon", "learning_rate": 8e-3, "warmup": 0.05, "decay": 0.3},
        "router_bias_rate": 1e-2, "save": {"every": None}, "evaluate": {"every": max(1, steps // POINTS), "rows": 64},
    }  # fmt: skip
    started = time.perf_counter()
    train(parse_run(run, "learning curves"))
    lines = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    return {
        "seconds": round(time.perf_counter() - started),
        "tokens": CONTEXT * BATCH * steps,
        "training": [round(line["loss"], 4) for line in lines if "loss" in line],
        "held_out": {line["step"]: round(line["evaluation/loss"], 4) for line in lines if "evaluation/loss" in line},
    }


def problems(name: str, few: dict[str, Any], library: dict[str, Any]) -> list[str]:
    """What is not as it must be."""
    overfit, held = list(few["held_out"].values()), list(library["held_out"].values())
    last, best = sum(library["training"][-20:]) / 20, min(overfit)
    wrong = {
        f"few files: training loss {few['training'][-1]} at the end, expected below 0.5": few["training"][-1] > 0.5,
        f"few files: held-out loss {overfit[-1]} at the end, expected above its best {best} + 0.5": overfit[-1]
        < best + 0.5,
        f"library: held-out loss {held[-1]}, expected below the best of a few files {best} - 1": held[-1] > best - 1,
        f"library: held-out loss {held[-1]}, expected within 0.5 of the training loss {last:.2f}": held[-1]
        > last + 0.5,
    }
    return [f"{name}, {text}" for text, true in wrong.items() if true]


def draw(found: dict[str, Any], path: Path) -> None:
    figure = Figure(figsize=(10, 4.2), layout="constrained")
    for axes, (name, curves) in zip(
        figure.subplots(1, len(found), sharey=True, squeeze=False)[0], found.items(), strict=True
    ):
        for (amount, curve), colour in zip(curves.items(), ("tab:red", "tab:blue"), strict=True):
            steps = [int(step) for step in curve["held_out"]]
            training = curve["training"]
            axes.plot(
                range(1, len(training) + 1),
                training,
                color=colour,
                linewidth=0.7,
                alpha=0.6,
                label=f"{amount}, training",
            )
            axes.plot(
                steps, list(curve["held_out"].values()), "o-", color=colour, markersize=3, label=f"{amount}, held out"
            )
        axes.axhline(math.log(VOCABULARY), color="grey", linestyle=":", linewidth=1)
        axes.set(xlabel=f"step of {BATCH} x {CONTEXT} tokens", title=name)
    figure.axes[0].set_ylabel("loss, nats a token (dotted: ln V)")
    figure.axes[0].legend(fontsize="small")
    figure.savefig(path, dpi=110)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=["dense", "sparse"], default=["dense", "sparse"])
    parser.add_argument("--steps", nargs=2, type=int, default=[250, 900], metavar=("FEW", "LIBRARY"))
    parser.add_argument("--out", type=Path, default=Path("docs"))
    args = parser.parse_args()
    texts = {amount: gather(characters) for amount, characters in CHARACTERS.items()}
    tokenizer = train_bpe(texts["library"].train, VOCABULARY)
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        for kind in args.models:
            name = {"dense": "EXAONE 4.0's layers", "sparse": "K-EXAONE's layers"}[kind]
            found[name] = {
                amount: learn(kind, texts[amount], tokenizer, steps, Path(folder) / f"{kind}-{steps}")
                for amount, steps in zip(CHARACTERS, args.steps, strict=True)
            }
    command = "python -m scripts.learning_curves"
    body = {"command": command, "machine": describe(), "vocabulary": tokenizer.vocab_size, "runs": found}
    (args.out / "learning-curves.json").write_text(json.dumps(body) + "\n")
    draw(found, args.out / "learning-curves.png")
    wrong = [text for name, curves in found.items() for text in problems(name, *curves.values())]
    print("\n".join(wrong) or "overfitted a few files, and generalised from the library")
    return bool(wrong)


if __name__ == "__main__":
    raise SystemExit(main())
