"""Where a run's figures go besides its own files: one protocol, an adapter each for TensorBoard, W&B and ClearML."""

import importlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol

from exaone_jax.errors import ConfigError


class Tracker(Protocol):
    """Figures and texts by step. Only process 0 has trackers."""

    def log(self, step: int, figures: Mapping[str, float]) -> None: ...

    def text(self, step: int, name: str, text: str) -> None: ...

    def close(self) -> None: ...


class TensorBoard:
    """Event files under `run_dir/tensorboard`."""

    def __init__(self, run_dir: Path, config: Mapping[str, Any]):
        del config
        self._writer = _package("tensorboardX", "tensorboard").SummaryWriter(str(run_dir / "tensorboard"))

    def log(self, step: int, figures: Mapping[str, float]) -> None:
        for name, value in figures.items():
            self._writer.add_scalar(name, value, step)

    def text(self, step: int, name: str, text: str) -> None:
        self._writer.add_text(name, text, step)

    def close(self) -> None:
        self._writer.close()


class WandB:
    """A run of Weights & Biases; WANDB_PROJECT, WANDB_MODE and the like are its own environment."""

    def __init__(self, run_dir: Path, config: Mapping[str, Any]):
        self._wandb = _package("wandb", "wandb")
        # The id is the run directory's, so that a resumed run goes on in the same curve.
        identity = str(run_dir.resolve()).strip("/").replace("/", "-")[-64:]
        self._run = self._wandb.init(dir=str(run_dir), config=dict(config), id=identity, resume="allow")

    def log(self, step: int, figures: Mapping[str, float]) -> None:
        self._run.log(dict(figures), step=step)

    def text(self, step: int, name: str, text: str) -> None:
        self._run.log({name: self._wandb.Html(f"<pre>{_escaped(text)}</pre>")}, step=step)

    def close(self) -> None:
        self._run.finish()


class ClearML:
    """A ClearML task named after the run directory."""

    def __init__(self, run_dir: Path, config: Mapping[str, Any]):
        task = _package("clearml", "clearml").Task
        self._task = task.init(project_name="exaone-jax", task_name=run_dir.name, continue_last_task=True)
        self._task.connect(dict(config))

    def log(self, step: int, figures: Mapping[str, float]) -> None:
        for name, value in figures.items():
            self._task.get_logger().report_scalar(title=name, series=name, value=value, iteration=step)

    def text(self, step: int, name: str, text: str) -> None:
        self._task.get_logger().report_text(f"step {step}, {name}: {text}")

    def close(self) -> None:
        self._task.close()


_TRACKERS = {"tensorboard": TensorBoard, "wandb": WandB, "clearml": ClearML}


def open_trackers(names: Sequence[str], run_dir: Path, config: Mapping[str, Any]) -> list[Tracker]:
    """Raises ConfigError that says what to install where a package is missing."""
    return [_TRACKERS[name](run_dir, config) for name in names]


def _package(name: str, extra: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise ConfigError(f"trackers: {extra} needs the package {name}: pip install 'exaone-jax[{extra}]'") from error


def _escaped(text: str) -> str:
    return text.replace("&", "&amp;").replace("<", "&lt;")
