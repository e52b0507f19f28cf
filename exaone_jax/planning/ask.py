"""From the options of `exaone-jax plan` to a plan: defaults, search, and the compile that confirms."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from exaone_jax.config import ModelConfig, published, read_config
from exaone_jax.config.run import LoraConfig
from exaone_jax.costs.workload import workload
from exaone_jax.errors import ConfigError
from exaone_jax.parallel import MeshShape
from exaone_jax.planning.plan import (
    Plan,
    Target,
    default_context,
    default_mesh,
    make_plan,
    remedy,
    render,
    rows_of,
    target,
)
from exaone_jax.planning.search import REMATS, candidates, confirmed, search

if TYPE_CHECKING:
    from rich.console import RenderableType

_OWNER = "LGAI-EXAONE/"  # of the published repositories


@dataclass(frozen=True)
class Question:
    """The options as given; None where not."""

    mode: str = "train"
    topology: str | None = None
    chip: str | None = None
    devices: int | None = None
    mesh: str | None = None
    batch: int | None = None
    context: int | None = None
    chunk: int | None = None
    remat: str | None = None
    lora: LoraConfig | None = None
    search: bool = False
    compiles: bool = True


@dataclass(frozen=True)
class Answer:
    """plan: of the best there is. shortfall: why it is not enough; empty where it fits or there is no limit."""

    plan: Plan
    shortfall: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        return self.plan.to_dict() | {"shortfall": list(self.shortfall)}

    def render(self) -> RenderableType:
        return render(self.plan)


def answer(model: str, question: Question) -> Answer:
    """Raises ConfigError where the question names what does not exist or does not go together."""
    name, config = _model(model)
    where = target(question.topology, question.chip, question.devices)
    context = default_context(config, question.mode) if question.context is None else question.context
    if question.search:
        return _searched(name, config, where, question, context)
    mesh = default_mesh(config, question.mode, where) if question.mesh is None else MeshShape.parse(question.mesh)
    batch = rows_of(mesh, where.devices) if question.batch is None else question.batch
    remat = "full" if question.remat is None else question.remat
    remat = None if remat == "none" else remat
    work = workload(config, question.mode, batch, context, question.chunk, remat, question.lora)
    plan = make_plan(name, config, where, mesh, work)
    return _judged(_compiled(plan, config, question), config)


def lora_beside(base: str) -> LoraConfig:
    """The usual adapters beside a model kept in `base`. Raises ConfigError."""
    try:
        return LoraConfig.model_validate({"base": base})
    except ValidationError as error:
        raise ConfigError(
            f"lora: found {base!r}, {error.errors()[0]['msg'].replace('Input should be', 'expected')}"
        ) from error


def _model(name_or_path: str) -> tuple[str, ModelConfig]:
    path = Path(name_or_path)
    if path.exists():
        return str(path), read_config(path)
    name = name_or_path.removeprefix(_OWNER)
    return name, read_config(published(name))


def _judged(plan: Plan, config: ModelConfig) -> Answer:
    return Answer(plan, (remedy(plan, config),) if plan.fits is False else ())


def _searched(name: str, config: ModelConfig, where: Target, question: Question, context: int) -> Answer:
    """The first of the cheapest plans that the compiler says fits."""
    if where.chip is None:
        raise ConfigError("search: needs a chip to fit, with --topology or --chip and --devices")
    if question.mesh is not None:
        raise ConfigError(f"search: finds the mesh, and --mesh {question.mesh} gives one; expected one of the two")
    remat = None if question.remat == "none" else question.remat
    batch = 1 if question.batch is None else question.batch
    work = workload(config, question.mode, batch, context, question.chunk, remat, question.lora)
    remats = REMATS if question.remat is None else (work.remat,)
    plans = search(name, config, where, candidates(work, question.batch, remats))
    if not plans:
        mesh = default_mesh(config, question.mode, where)
        batch = rows_of(mesh, where.devices) if question.batch is None else batch
        work = replace(work, remat="full") if question.remat is None and work.mode == "train" else work
        return _judged(make_plan(name, config, where, mesh, replace(work, batch=batch)), config)
    tried = confirmed(plans, lambda plan: _compiled(plan, config, question))
    return _judged(min(tried, key=lambda plan: (not plan.fits, plan.memory.total)), config)


def _compiled(plan: Plan, config: ModelConfig, question: Question) -> Plan:
    if plan.target.topology is None or not question.compiles:
        return plan
    from exaone_jax.planning.compile import compile_for_topology

    return replace(
        plan, compiled=compile_for_topology(config, plan.work, plan.mesh, plan.target.topology, plan.estimated)
    )
