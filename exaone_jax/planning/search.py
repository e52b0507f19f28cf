"""`exaone-jax plan --search`: the meshes, batches and remat policies of a target that fit, cheapest first, by arithmetic."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace

from exaone_jax.config import ModelConfig
from exaone_jax.costs.chips import Chip, Topology, topologies
from exaone_jax.costs.workload import Workload
from exaone_jax.errors import ConfigError
from exaone_jax.model.stack import Remat
from exaone_jax.parallel import MeshShape
from exaone_jax.planning.plan import Plan, Target, make_plan, state_bytes

# The estimate errs: a plan that fills more than this much of a device by arithmetic is not proposed.
_MARGIN = 0.92
_CONFIRM = 3  # plans that are compiled before a search gives up
_TRAINING_ROWS = (1, 2, 4, 8)  # for each part of the batch
REMATS: tuple[Remat, ...] = (None, "dots", "full")
_SERVING_ROWS = (1, 4, 16, 64, 128, 256)  # over all devices

Works = Callable[[MeshShape], Iterable[Workload]]


def search(name: str, config: ModelConfig, where: Target, works: Works) -> list[Plan]:
    """Plans that fit, by the least time of a token if compute, HBM, links and DCN did not overlap, then by the least memory.

    Among plans that are all bound by compute, that prefers the one that sends the least.

    works: of a mesh, the batches and remat policies to try. Meshes that do not divide the model or the batch are left out.
    """
    plans = _plans(name, config, where, works)
    fitting = (plan for plan in plans if plan.hbm_bytes is not None and plan.memory.total <= _MARGIN * plan.hbm_bytes)
    return sorted(fitting, key=_cost)


def least_memory(name: str, config: ModelConfig, where: Target, works: Works) -> Plan | None:
    """The plan that needs the least, whether it fits or not; None where no mesh divides the model and the batch."""
    return min(_plans(name, config, where, works), key=lambda plan: plan.memory.total, default=None)


def _plans(name: str, config: ModelConfig, where: Target, works: Works) -> Iterator[Plan]:
    for mesh in meshes(config, where.devices, where.slices):
        for work in works(mesh):
            try:
                yield make_plan(name, config, where, mesh, work)
            except ConfigError:  # this mesh does not divide this model or batch: not a candidate
                continue


def slices(name: str, config: ModelConfig, chip: Chip, work: Workload, works: Works) -> Iterator[list[Plan]]:
    """Of each slice of a TPU that the step fits on by arithmetic, smallest first, its plans as `search` orders them.

    work: one of `works`, by which slices are passed over that cannot hold parameters, optimizer and cache. Of slices with as
    many chips the first stands for all: arithmetic knows no difference.
    """
    tried = set()
    for topology in (Topology(chip, sides) for sides in topologies(chip)):
        if topology.chips in tried or state_bytes(config, work) > topology.chips * chip.hbm_bytes:
            continue
        tried.add(topology.chips)
        if plans := search(name, config, Target(chip, topology.devices, topology), works):
            yield plans


def confirmed(plans: Iterable[Plan], compiled: Callable[[Plan], Plan]) -> list[Plan]:
    """Plans as compiled, one after the other, up to the first that fits or `_CONFIRM` of them.

    Where the compiler asks for more than the estimate, the next is one that fits with an estimate as far off.
    """
    tried: list[Plan] = []
    error = 1.0
    for plan in plans:
        if plan.hbm_bytes is None or error * plan.memory.total > plan.hbm_bytes:
            continue
        tried.append(compiled(plan))
        if tried[-1].fits or len(tried) == _CONFIRM:
            break
        error = max(error, tried[-1].memory.total / plan.memory.total)
    return tried


def candidates(work: Workload, batch: int | None, remats: tuple[Remat, ...] = REMATS) -> Works:
    """On a mesh, some batches (of this size alone where one is given) and, in training, these remat policies."""
    policies = remats if work.mode == "train" else (None,)

    def of_mesh(mesh: MeshShape) -> list[Workload]:
        if batch is not None:
            batches = [batch]
        elif work.mode == "train":
            batches = [mesh.data * mesh.fsdp * mesh.expert * times for times in _TRAINING_ROWS]
        else:
            batches = list(_SERVING_ROWS)
        return [replace(work, batch=rows, remat=remat) for rows in batches for remat in policies]

    return of_mesh


def meshes(config: ModelConfig, devices: int, num_slices: int = 1) -> Iterator[MeshShape]:
    """Every way to lay the devices along fsdp, expert, tensor and context that can divide the model's heads and experts; over
    several slices also with a copy of the model for each or for some of them together."""
    for data in _divisors(num_slices):
        for mesh in _meshes_of_a_copy(config, devices // data):
            if mesh.fsdp % (num_slices // data) == 0:
                yield mesh.model_copy(update={"data": data})


def _meshes_of_a_copy(config: ModelConfig, devices: int) -> Iterator[MeshShape]:
    experts = 1 if config.moe is None else config.moe.num_experts
    for tensor in _divisors(devices):
        if config.num_kv_heads % tensor:
            continue
        for expert in _divisors(devices // tensor):
            if experts % expert:
                continue
            for context in _divisors(devices // tensor // expert):
                fsdp = devices // tensor // expert // context
                if config.hidden_size % fsdp == 0:
                    yield MeshShape(fsdp=fsdp, expert=expert, tensor=tensor, context=context)


def _divisors(number: int) -> list[int]:
    small = [size for size in range(1, math.isqrt(number) + 1) if number % size == 0]
    return sorted({*small, *(number // size for size in small)})


def _cost(plan: Plan) -> tuple[float, int]:
    if plan.bound is None:
        raise ValueError("a search needs a chip")
    return plan.bound.one_after_the_other / plan.work.tokens, plan.memory.total
