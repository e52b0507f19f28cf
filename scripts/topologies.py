"""The table of docs/topologies.md: every published model on the smallest TPU slice that fits, compiled ahead of time.

    python -m scripts.topologies                                   # what is missing or was made from other code; hours
    python -m scripts.topologies --models K-EXAONE-236B-A23B --chips v5p,v6e --steps decode --again
    python -m scripts.topologies --render                          # only the page, from docs/topologies.json
    python -m scripts.topologies --models K-EXAONE-2.0-750B-A37B --chips v6e --steps train \\
        --given 4xv6e:16x16 fsdp=32,expert=4,tensor=8 128 offload   # a plan found by hand, here over four slices

It needs libtpu and no TPU. For each cell arithmetic finds the slices that fit, smallest first, and each one's meshes, cheapest
first; the compiler has the last word, in a process of its own, for libtpu ends a process where it finds a fault in itself. The
file is written after each cell, so that a run can be ended and taken up again.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, replace
from functools import cache
from importlib import metadata
from itertools import islice
from pathlib import Path
from typing import Any

from exaone_jax.config import ModelConfig, published, published_names, read_config
from exaone_jax.costs.chips import CHIPS, Chip, Topology, topologies
from exaone_jax.costs.workload import POLICIES, Workload, workload
from exaone_jax.parallel import MeshShape
from exaone_jax.planning.compile import Compiled
from exaone_jax.planning.memory import Memory
from exaone_jax.planning.plan import Plan, Target, gib, make_plan, no_slice_holds, target
from exaone_jax.planning.search import candidates, confirmed, least_memory, slices

ROOT = Path(__file__).parents[1]
DATA, PAGE = ROOT / "docs" / "topologies.json", ROOT / "docs" / "topologies.md"
TPUS = tuple(name for name, chip in CHIPS.items() if chip.dimensions)
SHORT, LONG = 8192, 262144  # tokens of a training row
SERVED_ROWS = 8  # at full context
SLICES = 4  # that are compiled for before a cell is given up
FAILURES = 2  # of the compiler itself on one slice
# What decides the program that is compiled.
SOURCES = ("exaone_jax/config", "exaone_jax/model", "exaone_jax/parallel", "exaone_jax/training", "pallas_kernels")
_ENVIRONMENT = {**os.environ, "JAX_PLATFORMS": "cpu"}  # what runs beside the compiler needs no TPU
Row = dict[str, Any]


@dataclass(frozen=True)
class Cell:
    """model: the first by name of those that share a configuration. step: a key of `steps`."""

    model: str
    chip: str
    step: str

    @property
    def config(self) -> ModelConfig:
        return _config(self.model)

    @property
    def work(self) -> Workload:
        mode, context = steps(self.config)[self.step]
        return workload(self.config, mode, 1 if mode == "train" else SERVED_ROWS, context)


@cache
def _config(model: str) -> ModelConfig:
    return read_config(published(model))


def steps(config: ModelConfig) -> dict[str, tuple[str, int]]:
    """Mode and context of each step of the table."""
    longest = config.max_position_embeddings
    found = {"train": ("train", min(SHORT, longest)), "prefill": ("prefill", longest), "decode": ("decode", longest)}
    return found | ({"train at 256K": ("train", LONG)} if longest >= LONG else {})


@cache
def models() -> dict[str, tuple[str, ...]]:
    """Published models that differ, and the names of those that share each one's configuration."""
    names: dict[ModelConfig, list[str]] = {}
    for name in published_names():
        names.setdefault(_config(name), []).append(name)
    return {same[0]: tuple(same) for same in names.values()}


def cells() -> list[Cell]:
    """What compiles quickly first."""
    order = ("decode", "prefill", "train", "train at 256K")
    return [
        Cell(model, chip, step)
        for step in order
        for model in models()
        for chip in TPUS
        if step in steps(_config(model))
    ]


class CompilerFailure(Exception):
    """libtpu did not come back with an answer, or with one that was not hoped for: of a plan, for a reason."""

    def __init__(self, plan: Plan, reason: str):
        super().__init__(f"{_named(plan)}: {reason}")
        self.plan, self.reason = plan, reason


def find(cell: Cell, limit: float) -> Row:
    """The row of the smallest slice that the compiler agrees to; or why there is none."""
    config, chip, work = cell.config, CHIPS[cell.chip], cell.work
    works = candidates(work, None if work.mode == "train" else SERVED_ROWS)
    refused: list[str] = []
    for plans in islice(slices(cell.model, config, chip, work, works), SLICES):
        row = _first_that_compiles(plans, limit, refused)
        if row is not None:
            return row | {"refused": refused}
    why = "not found yet: see what was refused" if refused else _why_not(cell, chip, config, work)
    return {"topology": None, "why": why, "refused": refused}


def compile_given(cell: Cell, limit: float, topology: str, mesh: str, batch: str, remat: str) -> Row:
    """The row of a plan that was found by hand, where a search would take too long. may_do: a smaller slice that has room by
    arithmetic. Of several slices it says why one is not enough.

    Raises ConfigError where it is no plan of this cell, and CompilerFailure where it does not compile or does not fit.
    """
    config, kept = cell.config, None if remat == "none" else remat
    work = workload(config, cell.work.mode, int(batch), cell.work.context, remat=kept)
    plan = make_plan(cell.model, config, target(topology, None, None), MeshShape.parse(mesh), work)
    row, compiled = _compile(plan, limit)
    if not compiled.fits:
        raise CompilerFailure(plan, f"needs {_asked(compiled)}")
    more = {"why": _why_not(cell, CHIPS[cell.chip], config, work)} if plan.target.slices > 1 else _may_do(cell, plan)
    return row | more | {"given": True, "refused": []}


def _may_do(cell: Cell, plan: Plan) -> Row:
    """The smallest slice that has room by arithmetic, where that is smaller than the plan's."""
    works = candidates(plan.work, None, POLICIES)
    first = next(slices(cell.model, cell.config, CHIPS[cell.chip], plan.work, works), [plan])[0].target
    return {"may_do": str(first)} if first.devices < plan.target.devices else {}


def _first_that_compiles(plans: list[Plan], limit: float, refused: list[str]) -> Row | None:
    answers: list[Row] = []

    def compiled(plan: Plan) -> Plan:
        row, found = _compile(plan, limit)
        answers.append(row)
        return found

    for _ in range(FAILURES):
        try:
            tried = confirmed(plans, compiled)
        except CompilerFailure as failure:
            refused.append(str(failure))
            plans = [plan for plan in plans if plan.mesh != failure.plan.mesh]
            continue
        refused += [f"{_named(plan)}: {_asked(plan)}" for plan in tried if not plan.fits]
        return answers[-1] if tried and tried[-1].fits else None
    return None


def _asked(plan: Plan) -> str:
    return f"{gib(plan.memory.total)} of {gib(plan.hbm_bytes or 0)} a device"


def _named(plan: Plan) -> str:
    remat = f", remat {plan.work.remat or 'none'}" if plan.work.mode == "train" else ""
    return f"{plan.target}, {plan.mesh}, batch {plan.work.batch}{remat}"


def _compile(plan: Plan, limit: float) -> tuple[Row, Plan]:
    """`exaone-jax plan` of this plan: its JSON, and the plan with what the compiler says of its memory."""
    try:
        done = subprocess.run(
            _command(plan), capture_output=True, text=True, check=False, timeout=limit, cwd=ROOT, env=_ENVIRONMENT
        )
    except subprocess.TimeoutExpired:
        raise CompilerFailure(plan, f"not compiled within {limit:,.0f} s") from None
    if done.returncode not in (0, 1):
        said = [line for line in done.stderr.splitlines() if "Check failed" in line] or done.stderr.splitlines()[-1:]
        raise CompilerFailure(plan, f"the compiler ended with code {done.returncode}: {''.join(said[:1])[:300]}")
    row = json.loads(done.stdout)
    devices = plan.target.devices // row["chips"]
    parts = {name: size // devices for name, size in row["bytes_per_chip"].items() if name != "total"}
    return row, replace(plan, compiled=Compiled(Memory(**parts), None, {}, {}, row["compile_seconds"], ()))


def _command(plan: Plan) -> list[str]:
    work = plan.work
    options = [
        "--topology",
        str(plan.target),
        "--mode",
        work.mode,
        "--batch",
        str(work.batch),
        "--context",
        str(work.context),
    ]
    options += ["--mesh", str(plan.mesh)] if plan.target.devices > 1 else []
    options += ["--remat", work.remat or "none"] if work.mode == "train" else []
    return [sys.executable, "-m", "exaone_jax", "plan", plan.model, *options, "--json"]


def _why_not(cell: Cell, chip: Chip, config: ModelConfig, work: Workload) -> str:
    if reason := no_slice_holds(config, chip, work):
        return reason
    largest = Topology(chip, topologies(chip)[-1])
    works = candidates(work, None if work.mode == "train" else SERVED_ROWS)
    least = least_memory(cell.model, config, Target(chip, largest.devices, largest), works)
    if least is None:
        return f"no mesh of {largest} divides it"
    need = f"{gib(least.memory.total)} of {gib(least.hbm_bytes or 0)} a device"
    return (
        f"the least by arithmetic on {largest}, the largest slice, is {need} ({least.mesh}, remat {least.work.remat})"
    )


def code() -> str:
    """Of what decides the program that is compiled, the configurations included."""
    files = sorted(path for folder in SOURCES for path in (ROOT / folder).rglob("*.py"))
    files += sorted((ROOT / "configs" / "models").glob("*.json"))
    return hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()[:12]


def made_with() -> Row:
    return {"jax": metadata.version("jax"), "libtpu": metadata.version("libtpu"), "code": code()}


def read(path: Path = DATA) -> dict[Cell, Row]:
    rows = json.loads(path.read_text()) if path.exists() else []
    return {Cell(row["model"], row["chip"], row["step"]): row for row in rows}


def write(rows: dict[Cell, Row], path: Path = DATA) -> None:
    """A line a row, in the order of the page."""
    lines = [json.dumps(rows[cell], separators=(", ", ": ")) for cell in sorted(rows, key=_order)]
    whole = path.with_suffix(".partial")
    whole.write_text("[\n" + ",\n".join(lines) + "\n]\n")
    whole.replace(path)


def _order(cell: Cell) -> tuple[int, int, int]:
    return list(models()).index(cell.model), list(steps(cell.config)).index(cell.step), TPUS.index(cell.chip)


KEPT = (
    "topology", "mesh", "batch", "context", "chunk", "remat", "hbm_bytes_per_chip", "bytes_per_chip", "model_flops",
    "recomputed_flops", "compiled_flops", "collective_bytes", "least_collective_bytes", "dcn_bytes", "least_dcn_bytes",
    "bound", "kernels", "compile_seconds", "notes", "why", "refused", "given", "may_do",
)  # fmt: skip


def fill(
    wanted: list[Cell],
    jobs: int,
    limit: float,
    again: bool = False,
    found: Callable[[Cell, float], Row] = find,
    path: Path = DATA,
) -> None:
    """Find the rows of cells that are missing or of other code, or all of them again; the file is written after each."""
    rows, made = read(path), made_with()
    missing = [cell for cell in wanted if again or not _same(rows.get(cell), made)]
    with ThreadPoolExecutor(jobs) as pool:
        futures = {pool.submit(found, cell, limit): cell for cell in missing}
        try:
            for done, future in enumerate(as_completed(futures), 1):
                cell, row = futures[future], future.result()
                kept = {name: row[name] for name in KEPT if name in row}
                key = {"model": cell.model, "chip": cell.chip, "step": cell.step}
                rows[cell] = key | kept | made | {"date": time.strftime("%Y-%m-%d", time.gmtime())}
                write(rows, path)
                print(
                    f"{done}/{len(missing)} {cell.model} {cell.step} {cell.chip}: {row['topology'] or row['why']}",
                    flush=True,
                )
        finally:
            pool.shutdown(wait=False, cancel_futures=True)  # an end does not wait for what has not begun


def _same(row: Row | None, made: Row) -> bool:
    return row is not None and all(row[name] == value for name, value in made.items())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=_list_of(models()), default=list(models()), metavar="NAME,…")
    parser.add_argument("--chips", type=_list_of(TPUS), default=list(TPUS), metavar="CHIP,…")
    names = {step: None for model in models() for step in steps(_config(model))}
    parser.add_argument("--steps", type=_list_of(names), default=list(names), metavar="STEP,…")
    parser.add_argument("--again", action="store_true", help="also cells that are there, from this code")
    parser.add_argument("--jobs", type=int, default=2, help="compiles at once, each up to 6 GB")
    parser.add_argument("--limit", type=float, default=1800, help="seconds of one compile")
    parser.add_argument(
        "--given",
        nargs=4,
        metavar=("SLICE", "MESH", "BATCH", "REMAT"),
        help="compile this for the one cell that is named",
    )
    parser.add_argument("--render", action="store_true", help="only write the page")
    asked = parser.parse_args()
    if not asked.render:
        wanted = [
            cell
            for cell in cells()
            if cell.model in asked.models and cell.chip in asked.chips and cell.step in asked.steps
        ]
        if asked.given is None:
            fill(wanted, asked.jobs, asked.limit, asked.again)
        elif len(wanted) == 1:
            fill(wanted, 1, asked.limit, True, lambda cell, limit: compile_given(cell, limit, *asked.given))
        else:
            parser.error(f"--given is of one cell; found {len(wanted)}")
    PAGE.write_text(render(read()))


def _list_of(known: Iterable[str]) -> Callable[[str], list[str]]:
    def parse(text: str) -> list[str]:
        if wrong := [name for name in text.split(",") if name not in known]:
            raise argparse.ArgumentTypeError(f"found {wrong[0]!r}, expected some of {', '.join(known)}")
        return text.split(",")

    return parse


def render(rows: dict[Cell, Row]) -> str:
    """The page."""
    return "\n".join([_HEAD.format(rows=SERVED_ROWS), *_overview(rows), "", *_details(rows)]) + "\n"


_HEAD = """\
# Which TPU slice for which model

Made by `python -m scripts.topologies` from real compiles for slices that were not there; nothing here was run on a TPU. Each
cell is the smallest slice on which the step fits, and on that slice the cheapest mesh, batch and remat by arithmetic that the
compiler agrees to ([planning.md](planning.md)). Bytes are of a chip, as the compiler states them. The rows themselves, with their
parts of memory, collectives and kernels, are in [topologies.json](topologies.json), each with a digest of the code that it was
made from: a run of the script makes those of other code again.

- **train**: `training.train_step`, bfloat16 compute over float32 parameters and AdamW, rows of 8,192 tokens (EXAONE 3.0: of
  4,096, all it has); **train at 256K** where the model has it.
- **prefill**: the last 2,048 tokens of {rows} rows of full context on the cache of the others, as the engine prefills in chunks.
- **decode**: one token for each of {rows} rows of full context.
- **FLOPs**: of the compiled program over model FLOPs and what the policy recomputes. Below 1 in decoding where a device has a
  single row, whose products become sums that are not counted, and in prefill where a loop over keys is counted once; far above
  where {rows} rows do not divide over the devices, which then compute some of them more than once. 1.36 to 1.48 for rows of 256K
  that are split over `context`: queries whose place is data are counted as the last of it ([planning.md](planning.md)).
- **at least**: the bound on the step's time from published peaks and the bytes that the compiled program sends. No forecast.
- **4 x 16x16**: four slices joined by the data-centre network, where one is not enough.

## Smallest slices
"""


def _overview(rows: dict[Cell, Row]) -> Iterator[str]:
    yield f"| | | {' | '.join(TPUS)} |"
    yield f"| --- | --- | {' | '.join('---' for _ in TPUS)} |"
    for model, same in models().items():
        for step in steps(_config(model)):
            found = [_slice(rows.get(Cell(model, chip, step))) for chip in TPUS]
            yield f"| {', '.join(same)} | {step} | {' | '.join(found)} |"


def _slice(row: Row | None) -> str:
    if row is None:
        return "not compiled yet"
    if row["topology"] is None:
        return "not found yet" if row["why"].startswith("not found yet") else "none fits"
    found = Topology.parse(row["topology"])
    shape = found.one_slice.partition(":")[2]
    unsure = "may_do" in row or (row.get("given") and found.slices > 1)
    return ("at most " if unsure else "") + (f"{found.slices} x {shape}" if found.slices > 1 else shape)


def _details(rows: dict[Cell, Row]) -> Iterator[str]:
    for model, same in models().items():
        mine = [cell for cell in sorted(rows, key=_order) if cell.model == model]
        if not mine:
            continue
        yield f"## {', '.join(same)}\n"
        yield "| | slice | mesh | batch | remat | GiB of a chip's | FLOPs | at least | limited by | compiled |"
        yield "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |"
        yield from (_line(cell, rows[cell]) for cell in mine if rows[cell]["topology"] is not None)
        yield ""
        for cell in mine:
            yield from _remarks(cell, rows[cell])
        yield ""


def _line(cell: Cell, row: Row) -> str:
    mesh = ", ".join(f"{axis}={size}" for axis, size in row["mesh"].items() if size > 1)
    flops = row["model_flops"] + row["recomputed_flops"]
    ratio = "unknown" if row["compiled_flops"] is None else f"{row['compiled_flops'] / flops:.2f}"
    memory = f"{row['bytes_per_chip']['total'] / 2**30:.1f} of {row['hbm_bytes_per_chip'] / 2**30:.1f}"
    remat = (row["remat"] or "none") if cell.step.startswith("train") else ""
    bound, made = row["bound"], f"{row['date']}, libtpu {row['libtpu']}"
    least = f"{bound['seconds'] * 1e3:,.3g} ms"
    parts = [
        cell.step,
        row["topology"],
        mesh,
        f"{row['batch']:,}",
        remat,
        memory,
        ratio,
        least,
        bound["limited_by"],
        made,
    ]
    return f"| {' | '.join(parts)} |"


def _remarks(cell: Cell, row: Row) -> Iterator[str]:
    if row["topology"] is None:
        yield f"- {cell.step} on {cell.chip}: {row['why']}."
    elif row.get("given"):
        less = (
            f"{row['may_do']} has room by arithmetic" if "may_do" in row else "no smaller slice has room by arithmetic"
        )
        if "why" in row:
            less = f"{row['why']}; fewer than {Topology.parse(row['topology']).slices} slices are not ruled out"
        yield f"- {cell.step} on {cell.chip}: found by hand; {less}."
    for refused in row["refused"]:
        yield f"- {cell.step}, refused: {refused}."


if __name__ == "__main__":
    main()
