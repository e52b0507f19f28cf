"""The training step of every published model, compiled for a TPU slice: it computes and sends what arithmetic says.

Each takes minutes. `python -m tests.planning.test_compiled_steps [NAME ...]` prints the rows of the table in docs/planning.md.
"""

import dataclasses
import importlib.util
import sys

import pytest

from exaone_jax.config import published, read_config
from exaone_jax.costs.workload import workload
from exaone_jax.parallel import MeshShape
from exaone_jax.planning.plan import Plan, gib, make_plan, target


@dataclasses.dataclass(frozen=True)
class Case:
    """A step over rows of 8,192 tokens, or of what the model has, with remat "full"."""

    model: str
    topology: str
    mesh: str
    batch: int


# Of models of one shape (Deep as 3.5, 4.0.1 as 4.0) the first is compiled.
CASES = [
    Case("EXAONE-3.0-7.8B-Instruct", "v5p:2x2x4", "fsdp=16", 16),
    Case("EXAONE-3.5-2.4B-Instruct", "v6e:4x4", "fsdp=16", 16),
    Case("EXAONE-3.5-7.8B-Instruct", "v6e:4x8", "fsdp=32", 32),
    Case("EXAONE-3.5-32B-Instruct", "v5p:4x4x4", "fsdp=16,tensor=4", 32),
    Case("EXAONE-4.0-1.2B", "v6e:2x4", "fsdp=8", 8),
    Case("EXAONE-4.0-32B", "v5p:4x4x4", "fsdp=16,tensor=4", 32),
    Case("EXAONE-4.5-33B", "v5p:4x4x4", "fsdp=32,context=2", 32),
    Case("K-EXAONE-236B-A23B", "v5p:8x8x8", "fsdp=16,expert=8,context=4", 128),
    Case("K-EXAONE-2.0-750B-A37B", "v5p:8x8x16", "fsdp=16,expert=16,context=4", 256),
]


def compiled(case: Case) -> Plan:
    from exaone_jax.planning.compile import compile_for_topology

    config, where = read_config(published(case.model)), target(case.topology, None, None)
    context = min(8192, config.max_position_embeddings)
    work = workload(config, "train", case.batch, context, remat="full")
    plan = make_plan(case.model, config, where, MeshShape.parse(case.mesh), work)
    if where.topology is None:
        raise ValueError("a case names a topology")
    found = compile_for_topology(config, work, plan.mesh, where.topology, plan.estimated)
    return dataclasses.replace(plan, compiled=found)


def flops_ratio(plan: Plan) -> float:
    """Compiled FLOPs over those of the model and of what remat computes again."""
    if plan.compiled_flops is None:
        raise ValueError(f"{plan.compiled.notes if plan.compiled else 'not compiled'}")
    return plan.compiled_flops / (plan.flops.model + plan.flops.recomputed)


def sent_ratio(plan: Plan) -> float:
    """Bytes sent over the least for this mesh."""
    return sum(plan.sent.values()) / sum(plan.least_sent.values())


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed")
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.model)
def test_it_computes_and_sends_what_arithmetic_says(case: Case):
    plan = compiled(case)
    assert plan.fits, gib(plan.memory.total)
    assert abs(flops_ratio(plan) - 1) <= 0.1
    assert sent_ratio(plan) <= 1.5
    # The estimate is of what must be alive; the compiler also gathers weights ahead of their use where a chip has room, and drops
    # what it need not keep: found are 0.85 to 1.22.
    assert 0.8 < plan.estimated.total / plan.memory.total < 1.3


def row(plan: Plan) -> str:
    sent, least = sum(plan.sent.values()), sum(plan.least_sent.values())
    cells = (
        plan.model,
        plan.target,
        str(plan.mesh),
        plan.work.batch,
        f"{flops_ratio(plan):.3f}",
        f"{sent / 2**30:.1f}",
        f"{least / 2**30:.1f}",
        f"{sent / least:.2f}",
        f"{plan.estimated.total / 2**30:.1f}",
        f"{plan.memory.total / 2**30:.1f}",
    )
    return f"| {' | '.join(map(str, cells))} |"


if __name__ == "__main__":
    for each in CASES:
        if len(sys.argv) == 1 or each.model in sys.argv[1:]:
            print(row(compiled(each)), flush=True)
