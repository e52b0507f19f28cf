"""`exaone-jax plan --search`: the meshes, batches and remat policies of a target that fit, cheapest first, by arithmetic."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace

from exaone_jax.config import ModelConfig
from exaone_jax.errors import ConfigError
from exaone_jax.parallel import MeshShape
from exaone_jax.planning.plan import Plan, Target, make_plan, rows_of
from exaone_jax.planning.workload import Workload

# The estimate errs: a plan that fills more than this much of a device by arithmetic is not proposed.
_MARGIN = 0.92
_TRAINING_ROWS = (1, 2, 4, 8)  # for each part of the batch
_SERVING_ROWS = (1, 4, 16, 64, 128, 256)  # over all devices

Works = Callable[[MeshShape], Iterable[Workload]]


def search(name: str, config: ModelConfig, where: Target, works: Works) -> list[Plan]:
    """Plans that fit, by the least time of a token if compute, HBM and links did not overlap, then by the least memory.

    Among plans that are all bound by compute, that prefers the one that sends the least.

    works: of a mesh, the batches and remat policies to try. Meshes that do not divide the model or the batch are left out.
    """
    found = []
    for mesh in meshes(config, where.devices):
        for work in works(mesh):
            try:
                plan = make_plan(name, config, where, mesh, work)
            except ConfigError:  # this mesh does not divide this model or batch: not a candidate
                continue
            if plan.hbm_bytes is not None and plan.memory.total <= _MARGIN * plan.hbm_bytes:
                found.append(plan)
    return sorted(found, key=_cost)


def candidates(work: Workload, where: Target, batch: int | None) -> Works:
    """On a mesh, some batches (of this size alone where one is given) and, in training, the remat policies."""
    policies = (None, "dots", "full") if work.mode == "train" else (None,)

    def of_mesh(mesh: MeshShape) -> list[Workload]:
        if batch is not None:
            batches = [batch]
        elif work.mode == "train":
            batches = [rows_of(mesh, where.devices) * times for times in _TRAINING_ROWS]
        else:
            batches = list(_SERVING_ROWS)
        return [replace(work, batch=rows, remat=remat) for rows in batches for remat in policies]

    return of_mesh


def meshes(config: ModelConfig, devices: int) -> Iterator[MeshShape]:
    """Every way to lay the devices along fsdp, expert, tensor and context that can divide the model's heads and experts."""
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
    return [size for size in range(1, number + 1) if number % size == 0]


def _cost(plan: Plan) -> tuple[float, int]:
    if plan.bound is None:
        raise ValueError("a search needs a chip")
    bound = plan.bound
    return (bound.compute_seconds + bound.hbm_seconds + bound.link_seconds) / plan.work.tokens, plan.memory.total
