"""`exaone-jax plan`: what a step needs on given chips, by arithmetic and, for a TPU topology, from the compiled program."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

from exaone_jax.config import ModelConfig
from exaone_jax.costs.chips import CHIPS, Chip, Topology, chip_named, topologies
from exaone_jax.costs.flops import StepFlops, step_flops
from exaone_jax.costs.workload import Workload
from exaone_jax.errors import ConfigError
from exaone_jax.model.stack import Remat
from exaone_jax.parallel import MESH_AXES, MeshShape
from exaone_jax.planning.collectives import least_bytes, least_dcn_bytes
from exaone_jax.planning.inputs import device_bytes, step_inputs
from exaone_jax.planning.memory import Memory, abstract_mesh, estimate
from exaone_jax.planning.roofline import Bound, bound, least_hbm_bytes

if TYPE_CHECKING:
    from rich.console import RenderableType

    from exaone_jax.planning.compile import Compiled

_TRAIN_CONTEXT = 8192
_SLICES = (2, 4, 8)  # that are tried where one is not enough


@dataclass(frozen=True)
class Target:
    """Where a step is to run. topology: for TPUs that are to be compiled for; chip None: no limit to compare with."""

    chip: Chip | None
    devices: int
    topology: Topology | None = None

    @property
    def slices(self) -> int:
        return 1 if self.topology is None else self.topology.slices

    def __str__(self) -> str:
        if self.topology is not None:
            return str(self.topology)
        return f"{self.devices:,} x {'device' if self.chip is None else self.chip.name}"


@dataclass(frozen=True)
class Plan:
    """Memory is of one device, FLOPs are of all devices, `sent` is what one device sends, by kind of collective,
    and `dcn` what of it leaves its slice.

    compiled: the figures of the compiled program, whose memory, `sent` and `dcn` then are the plan's; None where all is
        arithmetic.
    """

    model: str
    target: Target
    mesh: MeshShape
    work: Workload
    estimated: Memory
    flops: StepFlops
    least_sent: dict[str, int]
    least_dcn: dict[str, int]
    least_hbm_bytes: int
    compiled: Compiled | None = None

    @property
    def memory(self) -> Memory:
        return self.estimated if self.compiled is None else self.compiled.memory

    @property
    def sent(self) -> dict[str, int]:
        return self.least_sent if self.compiled is None else self.compiled.sent

    @property
    def dcn(self) -> dict[str, int]:
        return self.least_dcn if self.compiled is None else self.compiled.dcn

    @property
    def hbm_bytes(self) -> int | None:
        """That a device has."""
        return None if self.target.chip is None else self.target.chip.hbm_bytes_per_device

    @property
    def fits(self) -> bool | None:
        return None if self.hbm_bytes is None else self.memory.total <= self.hbm_bytes

    @property
    def compiled_flops(self) -> int | None:
        """Of all devices."""
        if self.compiled is None or self.compiled.flops is None:
            return None
        return self.compiled.flops * self.target.devices

    @property
    def bound(self) -> Bound | None:
        """With the collectives of the compiled program where there is one, else the least there can be."""
        if self.target.chip is None:
            return None
        flops = self.flops.model + self.flops.recomputed
        sent, dcn = sum(self.sent.values()), sum(self.dcn.values())
        return bound(self.target.chip, self.target.devices, flops, self.flops.model, self.least_hbm_bytes, sent, dcn)

    def to_dict(self) -> dict[str, Any]:
        """As JSON. Bytes are of a chip, also where it has two jax devices."""
        chip, work = self.target.chip, self.work
        per_chip = 1 if chip is None else chip.devices

        def of_a_chip(memory: Memory) -> dict[str, int]:
            return {name: per_chip * size for name, size in memory.to_dict().items()}

        return {
            "model": self.model,
            "mode": work.mode,
            "topology": None if self.target.topology is None else str(self.target.topology),
            "chip": None if chip is None else chip.name,
            "chips": self.target.devices // per_chip,
            "devices": self.target.devices,
            "mesh": self.mesh.model_dump(),
            "batch": work.batch,
            "context": work.context,
            "chunk": work.chunk,
            "remat": work.remat,
            "lora": None if work.lora is None else work.lora.model_dump(mode="json"),
            "fits": self.fits,
            "fits_on": [name for name, each in CHIPS.items() if self.memory.total <= each.hbm_bytes_per_device],
            "bytes_per_chip": of_a_chip(self.memory),
            "estimated_bytes_per_chip": of_a_chip(self.estimated),
            "hbm_bytes_per_chip": None if chip is None else chip.hbm_bytes,
            "model_flops": self.flops.model,
            "recomputed_flops": self.flops.recomputed,
            "forward_flops": asdict(self.flops.forward),
            "compiled_flops": self.compiled_flops,
            "collective_bytes": {kind: per_chip * size for kind, size in self.sent.items()},
            "least_collective_bytes": {kind: per_chip * size for kind, size in self.least_sent.items()},
            "dcn_bytes": {kind: per_chip * size for kind, size in self.dcn.items()},
            "least_dcn_bytes": {kind: per_chip * size for kind, size in self.least_dcn.items()},
            "bound": None if self.bound is None else self.bound.to_dict(),
            "compile_seconds": None if self.compiled is None else self.compiled.seconds,
            "kernels": None if self.compiled is None else self.compiled.kernels,
            "notes": [] if self.compiled is None else list(self.compiled.notes),
        }


def target(topology: str | None, chip: str | None, devices: int | None) -> Target:
    """Raises ConfigError where the options contradict each other or name what does not exist."""
    if topology is not None:
        if chip is not None or devices is not None:
            raise ConfigError(
                "plan: found --topology with --chip or --devices, expected the topology alone, which says both"
            )
        parsed = Topology.parse(topology)
        return Target(parsed.chip, parsed.devices, parsed)
    if devices is not None and devices < 1:
        raise ConfigError(f"devices: found {devices}, expected at least one")
    return Target(None if chip is None else chip_named(chip), devices or 1)


def default_mesh(config: ModelConfig, mode: str, where: Target) -> MeshShape:
    """Training: weights over all (fsdp). Serving: heads over as many as the key-value heads divide, experts or else copies
    over the rest."""
    if mode == "train":
        return MeshShape(fsdp=where.devices)
    devices = where.devices // where.slices
    tensor = math.gcd(devices, config.num_kv_heads)
    expert = 1 if config.moe is None else math.gcd(devices // tensor, config.moe.num_experts)
    return MeshShape(data=where.devices // tensor // expert, expert=expert, tensor=tensor)


def make_plan(name: str, config: ModelConfig, where: Target, mesh: MeshShape, work: Workload) -> Plan:
    """By arithmetic alone. Raises ConfigError where the mesh does not match the devices and their slices, or does not divide
    the model."""
    sizes, across = mesh.sizes(where.devices), mesh.across(where.devices, where.slices)
    shape = MeshShape(**dict(zip(MESH_AXES, sizes, strict=True)))
    inputs = step_inputs(config, work, abstract_mesh(sizes))
    return Plan(
        model=name,
        target=where,
        mesh=shape,
        work=work,
        estimated=estimate(config, work, inputs),
        flops=step_flops(config, work),
        least_sent=least_bytes(config, work, inputs),
        least_dcn=least_dcn_bytes(work, inputs, dict(zip(MESH_AXES, across, strict=True))),
        least_hbm_bytes=least_hbm_bytes(config, work, inputs),
    )


def rows_of(mesh: MeshShape, devices: int) -> int:
    """The least batch that gives every device a row: data x fsdp x expert."""
    return math.prod(mesh.sizes(devices)[:3])


def default_context(config: ModelConfig, mode: str) -> int:
    """Training: 8,192 or what the model has. Serving: all that it has."""
    return min(_TRAIN_CONTEXT, config.max_position_embeddings) if mode == "train" else config.max_position_embeddings


def remedy(plan: Plan, config: ModelConfig) -> str:
    """Of a plan that does not fit: by how much, and what would fit, by arithmetic."""
    chip = plan.target.chip
    if chip is None or plan.hbm_bytes is None:
        raise ValueError("a plan without a chip has no limit to exceed")
    over = plan.memory.total - plan.hbm_bytes
    words = f"does not fit: {gib(plan.memory.total)} of {gib(plan.hbm_bytes)} a device, {gib(over)} too much"
    reason = no_slice_holds(config, chip, plan.work) if plan.target.slices == 1 else None
    attempts = [_more_slices] if reason else [_smaller_batch, _other_mesh, _offloaded, _more_chips, _more_slices]
    found = next(filter(None, (attempt(plan, config) for attempt in attempts)), None)
    more = "more slices" if plan.target.slices > 1 or reason else "up to 64 times as many chips"
    return "; ".join(filter(None, (words, reason, found or f"no mesh of {more} was found that fits")))


def no_slice_holds(config: ModelConfig, chip: Chip, work: Workload) -> str | None:
    """Why not even the largest slice of a TPU holds what a step keeps; None where one does, and for a GPU."""
    if not chip.dimensions:
        return None
    largest = Topology(chip, topologies(chip)[-1])
    have, need = largest.chips * chip.hbm_bytes, state_bytes(config, work)
    kept = "parameters, gradients and optimizer" if work.mode == "train" else "parameters, keys and values"
    return f"{kept} take {gib(need)} and {largest}, the largest slice, has {gib(have)}" if need > have else None


def state_bytes(config: ModelConfig, work: Workload) -> int:
    """What all devices together must hold at the least: parameters, gradients, optimizer, keys and values."""
    inputs = step_inputs(config, work, abstract_mesh((1, 1, 1, 1, 1)))
    gradients = inputs.params if work.mode == "train" else None
    return device_bytes((inputs.params, inputs.router_biases, inputs.frozen, inputs.opt_state, gradients, inputs.kv))


def _smaller_batch(plan: Plan, config: ModelConfig) -> str | None:
    rows = rows_of(plan.mesh, plan.target.devices) if plan.work.mode == "train" else 1
    batch = plan.work.batch // 2
    while batch >= rows:
        if batch % rows == 0:
            work = replace(plan.work, batch=batch)
            if make_plan(plan.model, config, plan.target, plan.mesh, work).fits:
                return f"--batch {batch} would fit"
        batch //= 2
    return None


def _other_mesh(plan: Plan, config: ModelConfig, remat: Remat = None) -> str | None:
    """Also with `remat`, if given."""
    from exaone_jax.planning.search import search

    work = replace(plan.work, remat=remat) if remat else plan.work
    best = search(plan.model, config, plan.target, _same_work(work))
    return f"{_options(best[0], plan)} would fit" if best else None


def _offloaded(plan: Plan, config: ModelConfig) -> str | None:
    """With what enters each layer kept in the host's memory."""
    return _other_mesh(plan, config, "offload") if plan.work.mode == "train" else None


def _more_chips(plan: Plan, config: ModelConfig) -> str | None:
    chip, devices = plan.target.chip, plan.target.devices
    if chip is None or plan.target.slices > 1:
        return None
    if chip.dimensions:
        larger = [Topology(chip, sides) for sides in topologies(chip)]
        targets = [Target(chip, each.devices, each) for each in larger if devices < each.devices <= 64 * devices]
    else:
        targets = [Target(chip, devices * 2**power) for power in range(1, 7)]
    return _first_that_fits(targets, plan, config, plan.work)


def _more_slices(plan: Plan, config: ModelConfig) -> str | None:
    """Of those that there are already, or else of the largest that exists."""
    if plan.target.chip is None or not plan.target.chip.dimensions:
        return None
    chip, now = plan.target.chip, plan.target.topology
    sides = now.sides if now is not None and now.slices > 1 else topologies(chip)[-1]
    more = [Topology(chip, sides, count) for count in _SLICES if count > plan.target.slices]
    works = [plan.work]
    if plan.work.mode == "train":
        works = [replace(plan.work, remat="full"), replace(plan.work, remat="offload")]
    tries = (([Target(chip, each.devices, each)], work) for each in more for work in works)
    return next(filter(None, (_first_that_fits(where, plan, config, work) for where, work in tries)), None)


def _first_that_fits(targets: list[Target], plan: Plan, config: ModelConfig, work: Workload) -> str | None:
    from exaone_jax.planning.search import search

    tried = set()
    for where in targets:
        if where.devices in tried:
            continue
        tried.add(where.devices)
        if best := search(plan.model, config, where, _same_work(work)):
            return f"{where} would fit with {_options(best[0], plan)}"
    return None


def _same_work(work: Workload) -> Callable[[MeshShape], list[Workload]]:
    """Also with all recomputed; where a mesh has more parts than the batch rows, a row for each."""

    def works(mesh: MeshShape) -> list[Workload]:
        if work.mode != "train":
            return [work]
        same = replace(work, batch=max(work.batch, mesh.data * mesh.fsdp * mesh.expert))
        return [same] if same.remat == "full" else [same, replace(same, remat="full")]

    return works


def _options(found: Plan, plan: Plan) -> str:
    """Of the command line, that make `found` of `plan`."""
    batch = f" --batch {found.work.batch}" if found.work.batch != plan.work.batch else ""
    remat = f" --remat {found.work.remat}" if found.work.remat != plan.work.remat else ""
    return f"--mesh {found.mesh}{batch}{remat}"


def gib(size: float) -> str:
    return f"{size / 2**30:,.2f} GiB"


def render(plan: Plan) -> RenderableType:
    """The plan for people."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    work, chip = plan.work, plan.target.chip
    title = Text(f"{plan.model}: {work.mode} on {plan.target}, {plan.mesh}", style="bold cyan")
    table = Table()
    table.add_column("a device" if chip is None or chip.devices > 1 else "a chip")
    table.add_column("estimate", justify="right")
    if plan.compiled is not None:
        table.add_column("compiled", justify="right")
    columns = [memory.to_dict() for memory in (plan.estimated, *([plan.compiled.memory] if plan.compiled else []))]
    for name in columns[0]:
        if any(column[name] for column in columns):
            table.add_row(name, *(gib(column[name]) for column in columns), end_section=name == "temporaries")
    if plan.hbm_bytes is not None:
        verdict = "fits" if plan.fits else "does not fit"
        table.add_row(f"HBM: {verdict}", *["" for _ in columns[1:]], gib(plan.hbm_bytes))
    lines = Table.grid(padding=(0, 2))
    lines.add_column(style="bold")
    lines.add_column(overflow="fold")
    for label, value in _lines(plan):
        lines.add_row(label, Text(value))
    return Group(title, table, lines)


def _lines(plan: Plan) -> list[tuple[str, str]]:
    work, flops = plan.work, plan.flops
    step = f"{work.batch:,} rows x {work.chunk:,} tokens"
    step += "" if work.mode == "train" else f", at the end of {work.context:,}"
    step += f", remat {work.remat or 'none'}" if work.mode == "train" else ""
    step += "" if work.lora is None else f", adapters of rank {work.lora.rank} beside {work.lora.base}"
    rows = [("step", step), ("model FLOPs", f"{flops.model:.4g} ({flops.model / work.tokens:.4g} a token)")]
    if flops.recomputed:
        rows.append(("recomputed", f"{flops.recomputed:.4g} more"))
    if plan.compiled_flops is not None:
        ratio = plan.compiled_flops / (flops.model + flops.recomputed)
        rows.append(("compiled FLOPs", f"{plan.compiled_flops:.4g}: {ratio:.2f} of model + recomputed"))
    kinds = ", ".join(f"{kind} {gib(size)}" for kind, size in plan.sent.items()) or "none"
    rows.append(("collectives" if plan.compiled else "collectives, least", f"{kinds} sent by a device"))
    if plan.target.slices > 1:
        kinds = ", ".join(f"{kind} {gib(size)}" for kind, size in plan.dcn.items()) or "none"
        rows.append(("  between slices", f"{kinds} of these; least {gib(sum(plan.least_dcn.values()))}"))
    if plan.compiled is not None:
        rows.append(("  least", f"{gib(sum(plan.least_sent.values()))}; compiled {gib(sum(plan.sent.values()))}"))
        kernels = ", ".join(f"{count} x {name}" for name, count in plan.compiled.kernels.items()) or "none"
        rows.append(("kernels", kernels))
    if plan.bound is not None:
        rate = work.tokens / plan.bound.seconds
        text = f"at least {plan.bound.seconds * 1e3:,.3g} ms a step, at most {rate:,.0f} tokens/s and {plan.bound.mfu:.1%} MFU"
        rows.append(
            ("bound", f"{text}; limited by {plan.bound.limited_by}. A bound from published peaks, not a forecast")
        )
    if plan.compiled is not None:
        rows.append(("compiled in", f"{plan.compiled.seconds:.0f} s"))
        rows += [("note", note) for note in plan.compiled.notes]
    if plan.target.chip is None:
        fitting = [name for name, chip in CHIPS.items() if plan.memory.total <= chip.hbm_bytes_per_device]
        rows.append(("fits on", ", ".join(fitting) or "no chip known here; try --devices or --mesh"))
    return rows
