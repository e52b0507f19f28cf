"""docs/topologies.json, the committed table of slices: its rows are plans that exist, and arithmetic agrees with the compiler.

Behind `slow`, with libtpu: two small cells compiled again, and what the compiler said then.
"""

import importlib.metadata
import importlib.util
import json
import re
from dataclasses import replace
from pathlib import Path

import pytest

from exaone_jax.config import published_names
from exaone_jax.costs.chips import CHIPS, Topology
from exaone_jax.costs.workload import workload
from exaone_jax.errors import ConfigError
from exaone_jax.parallel import MeshShape
from exaone_jax.planning.compile import Compiled
from exaone_jax.planning.plan import Plan, make_plan, target
from scripts import topologies

ROWS = topologies.read()
FOUND = [
    pytest.param(cell, row, id=f"{cell.model} {cell.step} {cell.chip}") for cell, row in ROWS.items() if row["topology"]
]
# Estimated over compiled total, as docs/planning.md states it.
BOUNDS = {"decode": (0.3, 1.1), "prefill": (0.2, 1.4), "train": (0.5, 1.4)}
WITH_LIBTPU = pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed")


def planned(cell: topologies.Cell, row: topologies.Row) -> Plan:
    config, topology = cell.config, Topology.parse(row["topology"])
    work = workload(config, cell.work.mode, row["batch"], row["context"], remat=row["remat"])
    return make_plan(cell.model, config, target(str(topology), None, None), MeshShape(**row["mesh"]), work)


@pytest.mark.parametrize(("cell", "row"), FOUND)
def test_a_row_is_a_plan_that_fits(cell: topologies.Cell, row: topologies.Row):
    plan = planned(cell, row)  # raises where the slice does not exist, or the mesh does not match it or the model
    chip, parts = CHIPS[cell.chip], row["bytes_per_chip"]
    assert plan.target.chip == chip
    assert row["chunk"] == cell.work.chunk and row["context"] == cell.work.context
    assert row["batch"] == topologies.SERVED_ROWS or cell.work.mode == "train"
    assert parts["total"] == sum(size for part, size in parts.items() if part != "total")
    assert parts["total"] <= row["hbm_bytes_per_chip"] == chip.hbm_bytes
    for exact in ("parameters", "optimizer", "kv"):
        assert parts[exact] == chip.devices * getattr(plan.estimated, exact), exact
    assert row["model_flops"] == plan.flops.model
    low, high = BOUNDS[cell.work.mode]
    assert low < chip.devices * plan.estimated.total / parts["total"] < high
    assert re.fullmatch(r"\d{4}-\d\d-\d\d", row["date"]) and row["libtpu"] and row["jax"]
    assert not [note for note in row["notes"] if "unknown" in note], "this pair of jaxlib and libtpu cannot count FLOPs"


def test_rows_without_a_slice_say_why():
    for row in ROWS.values():
        if row["topology"] is None:
            assert re.search(r"largest slice|not found yet", row["why"])
            assert row["refused"] or "largest slice" in row["why"]


def test_every_published_model_has_its_cells():
    named = [name for same in topologies.models().values() for name in same]
    assert sorted(named) == sorted(published_names())
    cells = topologies.cells()
    assert len(set(cells)) == len(cells) and set(ROWS) <= set(cells)
    assert {cell.chip for cell in cells} == {"v5e", "v5p", "v6e", "tpu7x"}
    long = {cell.model for cell in cells if cell.step == "train at 256K"}
    assert long == {"EXAONE-4.5-33B", "K-EXAONE-236B-A23B", "K-EXAONE-2.0-750B-A37B"}


def test_the_page_is_made_of_the_rows():
    assert topologies.PAGE.read_text() == topologies.render(ROWS)
    assert "not compiled yet" in topologies.render({})  # what is missing is never made up


def test_a_run_fills_what_is_missing_and_can_be_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = tmp_path / "rows.json"
    monkeypatch.setattr(topologies, "made_with", lambda: {"jax": "1", "libtpu": "2", "code": "3"})
    wanted = [cell for cell in topologies.cells() if cell.model == "EXAONE-4.0-1.2B" and cell.step == "decode"]
    asked = []

    def find(cell: topologies.Cell, limit: float) -> topologies.Row:
        asked.append(cell)
        if len(asked) == 3:
            raise KeyboardInterrupt
        return {"topology": None, "why": "no reason", "refused": []}

    with pytest.raises(KeyboardInterrupt):
        topologies.fill(wanted, 1, 1.0, found=find, path=path)
    assert len(topologies.read(path)) < len(wanted)
    topologies.fill(wanted, 1, 1.0, found=find, path=path)
    assert set(topologies.read(path)) == set(wanted)
    before = len(asked)
    topologies.fill(wanted, 1, 1.0, found=find, path=path)
    assert len(asked) == before  # nothing is missing
    topologies.fill(wanted, 1, 1.0, again=True, found=find, path=path)
    assert len(asked) == before + len(wanted)
    monkeypatch.setattr(topologies, "made_with", lambda: {"jax": "1", "libtpu": "2", "code": "4"})
    topologies.fill(wanted, 1, 1.0, found=find, path=path)
    assert len(asked) == before + 2 * len(wanted)  # made from other code


def test_a_compiler_that_falls_over_is_passed_by(monkeypatch: pytest.MonkeyPatch):
    """The first mesh ends the compiler, the second is too large, the third fits."""
    cell = topologies.Cell("EXAONE-4.0-1.2B", "v5e", "decode")
    meshes = []

    def compile_one(plan: Plan, limit: float) -> tuple[topologies.Row, Plan]:
        meshes.append(plan.mesh)
        if len(meshes) == 1:
            raise topologies.CompilerFailure(plan, "the compiler ended with code -6: Check failed")
        memory = replace(plan.estimated, temporaries=0 if len(meshes) > 2 else 2**40)
        return {"topology": str(plan.target)}, replace(plan, compiled=Compiled(memory, None, {}, {}, 0.0, ()))

    monkeypatch.setattr(topologies, "_compile", compile_one)
    row = topologies.find(cell, 1.0)
    assert meshes[0] != meshes[1] and row["topology"] is not None
    assert "the compiler ended with code -6" in row["refused"][0] and "a device" in row["refused"][1]


def test_a_plan_that_is_given(monkeypatch: pytest.MonkeyPatch):
    cell = topologies.Cell("EXAONE-4.0-1.2B", "v5e", "train")
    given = ("v5e:2x4", "fsdp=8", "16", "none")

    def compile_one(plan: Plan, limit: float) -> tuple[topologies.Row, Plan]:
        assert (str(plan.target), plan.mesh.fsdp, plan.work.batch, plan.work.remat) == asked
        memory = replace(plan.estimated, temporaries=more, activations=0)
        return {"topology": str(plan.target)}, replace(plan, compiled=Compiled(memory, None, {}, {}, 0.0, ()))

    monkeypatch.setattr(topologies, "_compile", compile_one)
    more, asked = 0, ("v5e:2x4", 8, 16, None)
    row = topologies.compile_given(cell, 1.0, *given)
    assert row == {"topology": "v5e:2x4", "given": True, "refused": [], "may_do": "v5e:2x2"}
    asked = ("v5e:2x2", 4, 16, None)
    row = topologies.compile_given(cell, 1.0, "v5e:2x2", "fsdp=4", "16", "none")
    assert "may_do" not in row and topologies._slice(row) == "2x2"
    asked = ("v5e:2x4", 8, 16, None)
    more = 2**40
    with pytest.raises(
        topologies.CompilerFailure, match=r"v5e:2x4, fsdp=8, batch 16, remat none: needs 1,\S+ GiB of 15.75"
    ):
        topologies.compile_given(cell, 1.0, *given)
    with pytest.raises(ConfigError, match="found 8 devices, expected 4"):
        topologies.compile_given(cell, 1.0, "v5e:2x4", "fsdp=4", "16", "none")


def test_a_plan_over_several_slices_that_is_given(monkeypatch: pytest.MonkeyPatch):
    """It says why one slice is not enough, and the page how many there are."""
    cell = topologies.Cell("K-EXAONE-2.0-750B-A37B", "v6e", "train")

    def compile_one(plan: Plan, limit: float) -> tuple[topologies.Row, Plan]:
        compiled = Compiled(plan.estimated, 10**14, plan.least_sent, {}, 0.0, (), plan.least_dcn)
        plan = replace(plan, compiled=compiled)
        return plan.to_dict(), plan

    monkeypatch.setattr(topologies, "_compile", compile_one)
    row = topologies.compile_given(cell, 1.0, "4xv6e:16x16", "fsdp=32,expert=4,tensor=8", "128", "offload")
    assert row["chips"] == 1024 and row["dcn_bytes"] == row["least_dcn_bytes"] != {}
    assert re.search(r"take 11,\S+ GiB and v6e:16x16, the largest slice, has 7,997", row["why"])
    page = topologies.render({cell: row | {"date": "2026-11-23", "libtpu": "0.0.48.1"}})
    assert "| K-EXAONE-2.0-750B-A37B | train | not compiled yet | not compiled yet | at most 4 x 16x16 |" in page
    assert re.search(
        r"\| train \| 4xv6e:16x16 \| fsdp=32, expert=4, tensor=8 \| 128 \| offload \| \d+\.\d of 31\.2 \|", page
    )
    assert "found by hand; parameters, gradients" in page and "; fewer than 4 slices are not ruled out." in page
    with pytest.raises(ConfigError, match="do not divide into 4 slices"):
        topologies.compile_given(cell, 1.0, "4xv6e:16x16", "fsdp=2,expert=64,tensor=8", "128", "offload")


def test_a_model_that_no_slice_holds():
    row = topologies.find(topologies.Cell("K-EXAONE-2.0-750B-A37B", "v5e", "train"), 1.0)
    assert row["topology"] is None
    assert re.search(r"take 11,\S+ GiB and v5e:16x16, the largest slice, has 4,032", row["why"])


@pytest.mark.slow
@WITH_LIBTPU
@pytest.mark.parametrize("step", ["decode", "prefill"])
def test_a_small_cell_compiled_again(step: str):
    cell = topologies.Cell("EXAONE-4.0-1.2B", "v6e", step)
    row = ROWS[cell]
    if row["libtpu"] != importlib.metadata.version("libtpu"):
        pytest.skip(f"the row was made with libtpu {row['libtpu']}")
    again, plan = topologies._compile(planned(cell, row), 900)
    assert plan.fits
    assert json.dumps(again["mesh"]) == json.dumps(row["mesh"])
    # The program may have changed a little since; the compiler gives the same program the same memory.
    assert again["bytes_per_chip"]["total"] == pytest.approx(row["bytes_per_chip"]["total"], rel=0.1)
    assert again["compiled_flops"] == pytest.approx(row["compiled_flops"], rel=0.1)
