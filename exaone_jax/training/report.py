"""What a person sees of a run, and what it leaves in its directory: lines, metrics.jsonl, goodput.jsonl, loss.png."""

import json
import math
import resource
import sys
import time
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

import jax
import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from exaone_jax.costs.chips import CHIPS, Chip
from exaone_jax.training.trackers import Tracker

METRICS, GOODPUT, CURVE = "metrics.jsonl", "goodput.jsonl", "loss.png"
PHASES = ("init", "restore", "compile", "step", "data", "save", "evaluate", "sample")
# How jax names devices -> the chip whose peak they have.
_KINDS = {
    "TPU v5 lite": "v5e", "TPU v5": "v5p", "TPU v5p": "v5p", "TPU v6 lite": "v6e", "TPU v6e": "v6e", "TPU7x": "tpu7x",
    "A100-SXM4-40GB": "a100-40", "A100-SXM4-80GB": "a100-80", "H100 80GB HBM3": "h100", "H200": "h200", "B200": "b200",
}  # fmt: skip


def chip_here(device: jax.Device) -> Chip | None:
    """The chip of a device, None where its peak is not known (a CPU)."""
    name = _KINDS.get(device.device_kind.removeprefix("NVIDIA "))
    return None if name is None else CHIPS[name]


def peak_memory(device: jax.Device) -> int:
    """Bytes: the most that a device, or without one that counts this process, has held."""
    stats = device.memory_stats() if device.platform != "cpu" else None
    if stats:
        return stats["peak_bytes_in_use"]
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def step_line(figures: Mapping[str, Any]) -> str:
    """One line of a step. Its words and their order do not change."""
    mfu = "-" if figures["mfu"] is None else f"{figures['mfu']:.1%}"
    return (
        f"step {figures['step']:7d}  loss {figures['loss']:.4f}  "
        f"tokens/s/device {figures['tokens_per_second_per_device']:.0f}  "
        f"TFLOP/s/device {figures['tflops_per_second_per_device']:.4g}  MFU {mfu}  "
        f"memory {figures['memory_bytes'] / 2**30:.2f} GiB  seconds {figures['seconds']:.3f}"
    )


class Journal:
    """A file of JSON lines that a run, and the runs that go on from it, append to. Losing it loses no run."""

    def __init__(self, path: Path | None, warn: TextIO = sys.stderr):
        self._path, self._warn = path, warn

    def write(self, line: Mapping[str, Any]) -> None:
        if self._path is None:
            return
        try:
            with self._path.open("a") as file:
                file.write(json.dumps(line) + "\n")
        except OSError as error:  # a full disk: training goes on
            self._warn.write(f"warning: {self._path}: {error.strerror}\n")

    def read(self) -> list[dict[str, Any]]:
        """The lines there are; one that a kill cut off is left out."""
        if self._path is None or not self._path.exists():
            return []
        lines = []
        for line in self._path.read_text(errors="replace").splitlines():
            try:
                lines.append(json.loads(line))
            except ValueError:
                continue
        return [line for line in lines if isinstance(line, dict)]


class Clock:
    """Where the wall time of a process goes: seconds of each of PHASES; the rest is `other`."""

    def __init__(self) -> None:
        self.seconds = dict.fromkeys(PHASES, 0.0)
        self._started = time.perf_counter()

    @contextmanager
    def phase(self, name: str) -> Generator[None]:
        started = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] += time.perf_counter() - started

    def report(self, lost_steps: int, steps: int) -> dict[str, Any]:
        """goodput: the part of the wall time spent on steps that were not done before. lost: of steps done again."""
        wall = time.perf_counter() - self._started
        seconds = {name: round(value, 3) for name, value in self.seconds.items()}
        again = self.seconds["step"] * min(lost_steps, steps) / steps if steps else 0.0
        seconds |= {"lost": round(again, 3), "other": round(wall - sum(self.seconds.values()), 3)}
        goodput = (self.seconds["step"] - again) / wall
        return {"event": "goodput", "wall": round(wall, 3), "goodput": round(goodput, 4), "seconds": seconds}


class Face:
    """Prints to people and files. Other processes than the first stay silent."""

    def __init__(self, run_dir: Path, trackers: list[Tracker], speaks: bool, total: int):
        self.console = Console(quiet=not speaks, highlight=False, soft_wrap=True)
        self.metrics = Journal(run_dir / METRICS if speaks else None)
        self.events = Journal(run_dir / GOODPUT if speaks else None)
        self._trackers, self._speaks, self._total = trackers, speaks, total
        self._progress: Progress | None = None

    @contextmanager
    def live(self, done: int) -> Generator[None]:
        """At a terminal, a bar with the time left below the lines."""
        if not self.console.is_terminal:
            yield
            return
        columns = (
            TextColumn("training"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(),
            TextColumn("{task.fields[more]}"),
        )  # fmt: skip
        with Progress(*columns, console=self.console, transient=True) as progress:
            self._progress, self._task = progress, progress.add_task("", total=self._total, completed=done, more="")
            yield
        self._progress = None

    def say(self, text: str) -> None:
        self.console.print(text, markup=False)

    def step(self, figures: Mapping[str, Any]) -> None:
        self.say(step_line(figures))
        self.metrics.write(figures)
        numbers = {name: value for name, value in figures.items() if isinstance(value, float | int) and name != "step"}
        for tracker in self._trackers:
            tracker.log(figures["step"], numbers)
        if self._progress is not None:
            more = f"grad norm {figures['grad_norm']:.3g}  rate {figures['learning_rate']:.3g}"
            self._progress.update(self._task, completed=figures["step"], more=more)

    def figures(self, step: int, kind: str, figures: Mapping[str, float]) -> None:
        """Of other things than steps: evaluation."""
        self.say(f"{kind} {step:7d}  " + "  ".join(f"{name} {value:.4f}" for name, value in figures.items()))
        named = {f"{kind}/{name}": value for name, value in figures.items()}
        self.metrics.write({"step": step, **named})
        for tracker in self._trackers:
            tracker.log(step, named)

    def text(self, step: int, name: str, text: str) -> None:
        self.say(f"{name} {step:7d}  {text}")
        for tracker in self._trackers:
            tracker.text(step, name, text)

    def event(self, event: str, facts: Mapping[str, Any]) -> None:
        self.events.write({"event": event, **facts})

    def close(self) -> None:
        for tracker in self._trackers:
            tracker.close()


def expert_figures(load: np.ndarray | None) -> dict[str, Any]:
    """Of the experts' loads `[layers, E]`: least and most over the mean of their layer; and each, a part of that mean."""
    if load is None:
        return {}
    share = load / np.maximum(load.mean(axis=1, keepdims=True), 1e-9)
    each = [[round(float(x), 3) for x in layer] for layer in share]
    return {"expert_load_min": float(share.min()), "expert_load_max": float(share.max()), "expert_load": each}


def draw_curve(journal: Journal, path: Path, vocab_size: int) -> bool:
    """The losses in a run's journal as a PNG; False where matplotlib is not installed."""
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError:
        return False
    losses, held_out = {}, {}
    for line in journal.read():  # a step that was done again counts as it was the last time
        if "loss" in line:
            losses[line["step"]] = line["loss"]
        if "evaluation/loss" in line:
            held_out[line["step"]] = line["evaluation/loss"]
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    axes.plot(sorted(losses), [losses[step] for step in sorted(losses)], linewidth=1, label="training")
    if held_out:
        axes.plot(sorted(held_out), [held_out[step] for step in sorted(held_out)], "o-", label="held out")
    axes.axhline(math.log(vocab_size), color="grey", linestyle=":", linewidth=1, label="ln V")
    axes.set(xlabel="step", ylabel="loss, nats a token")
    axes.legend()
    figure.savefig(path, dpi=150)
    return True
