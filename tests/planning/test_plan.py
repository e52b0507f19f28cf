"""`exaone-jax plan`: arithmetic for any chip, the real step compiled for a TPU, and what is said where it cannot be."""

import importlib.util
import re
from dataclasses import replace
from itertools import islice

import jax
import pytest
from flax import nnx

from exaone_jax.config import LayerSpec, ModelConfig
from exaone_jax.config.run import LoraConfig
from exaone_jax.costs.chips import CHIPS, Topology, topologies
from exaone_jax.costs.flops import step_flops
from exaone_jax.costs.workload import Workload
from exaone_jax.errors import ConfigError
from exaone_jax.model import Transformer
from exaone_jax.model.linear import Frozen, RouterBias
from exaone_jax.parallel import MeshShape, make_mesh
from exaone_jax.planning.compile import Compiled, compile_step
from exaone_jax.planning.inputs import device_bytes, step_inputs
from exaone_jax.planning.memory import abstract_mesh, estimate
from exaone_jax.planning.plan import Plan, Target, make_plan, remedy, state_bytes
from exaone_jax.planning.search import confirmed, search, slices
from exaone_jax.training.lora import adapt
from tests.parallel.small_model import CONFIG as EVERY_LAYER
from tests.test_cli import run_json

WITH_LIBTPU = pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed")
DENSE = ModelConfig(
    model_type="exaone4",
    vocab_size=512,
    hidden_size=256,
    intermediate_size=1024,
    num_heads=4,
    num_kv_heads=4,
    head_dim=64,
    layers=(LayerSpec(window=64), LayerSpec(rope=False)) * 2,
    max_position_embeddings=4096,
    dtype="float32",
)


@pytest.mark.parametrize(
    ("config", "mesh", "work"),
    [
        (DENSE, "fsdp=8", Workload("train", 16, 512, 512, "full", "float32")),
        (DENSE, "fsdp=4,tensor=2", Workload("train", 16, 512, 512, None, "float32")),
        (EVERY_LAYER, "expert=4,tensor=2", Workload("decode", 64, 256, 1, None, "float32")),
        (DENSE, "fsdp=8", Workload("train", 16, 512, 512, None, "float32", LoraConfig(base="int8"))),
        (DENSE, "fsdp=4,tensor=2", Workload("train", 16, 512, 512, None, "float32", LoraConfig(base="nf4"))),
    ],
)
def test_the_estimate_beside_the_compiled_program(config: ModelConfig, mesh: str, work: Workload):
    devices = make_mesh(MeshShape.parse(mesh))
    estimated = estimate(config, work, step_inputs(config, work, devices))
    compiled = compile_step(config, work, devices, estimated)
    for exact in ("parameters", "optimizer", "kv"):
        assert getattr(compiled.memory, exact) == getattr(estimated, exact), exact
    # What is alive at once is the compiler's to decide, on a CPU unlike on the TPU that the estimate has in mind: found are
    # 0.71, 1.10 and 1.14, with adapters 0.94 and 1.00.
    assert 0.6 < estimated.total / compiled.memory.total < 1.5
    flops = step_flops(config, work)
    # The CPU computes tiles that are masked in part, and experts' rows of no token.
    assert compiled.flops is not None
    assert 0.9 < compiled.flops * 8 / (flops.model + flops.recomputed) < 2.0


@pytest.mark.parametrize("base", ["float32", "bfloat16", "int8", "nf4"])
def test_adapters_and_what_is_frozen_beside_them_take_what_their_arrays_take(base: str):
    lora = LoraConfig.model_validate({"rank": 4, "base": base, "targets": ["q_proj", "down_proj", "experts"]})
    work = Workload("train", 8, 64, 64, None, "float32", lora)
    inputs = step_inputs(EVERY_LAYER, work, abstract_mesh((1, 1, 1, 1, 1)))
    model = Transformer(EVERY_LAYER, dtype="float32", param_dtype="float32", rngs=nnx.Rngs(0))
    adapt(model, lora, nnx.Rngs(0))
    for planned, kind in ((inputs.params, nnx.Param), (inputs.router_biases, RouterBias), (inputs.frozen, Frozen)):
        arrays = jax.tree.leaves(nnx.state(model, kind))
        assert arrays and device_bytes(planned) == sum(array.nbytes for array in arrays)
    assert device_bytes(inputs.opt_state) == 2 * device_bytes(inputs.params) + 8  # and two counts


def test_a_plan_of_adapters(capsys: pytest.CaptureFixture[str]):
    arguments = "EXAONE-4.0-32B --topology v6e:2x4 --no-compile"
    code, whole = run_json(capsys, "plan", *arguments.split())
    assert code == 1
    code, out = run_json(capsys, "plan", *arguments.split(), "--lora", "bfloat16")
    assert (code, out["lora"]["base"]) == (0, "bfloat16")
    assert out["bytes_per_chip"]["optimizer"] < whole["bytes_per_chip"]["optimizer"] / 10
    # Forward and the gradients of what enters each product, not those of the weights; attention has no weights.
    forward = whole["forward_flops"]
    total = sum(forward.values())
    assert (whole["model_flops"], out["model_flops"]) == (3 * total, 2 * total + forward["attention"])
    gathered = {kind: each["collective_bytes"]["all-gather"] for kind, each in (("whole", whole), ("lora", out))}
    assert out["collective_bytes"]["reduce-scatter"] < whole["collective_bytes"]["reduce-scatter"] / 50
    assert 1 <= gathered["lora"] / gathered["whole"] < 1.02  # the same weights, and the adapters


def test_what_each_remat_policy_computes_again():
    """In the compiled program: "full" the layers' products but the last of each, that nothing behind it needs, and "dots" none.

    A short row has little attention, which both make again.
    """
    config = DENSE.model_copy(update={"layers": DENSE.layers[:1] * 2})
    device = make_mesh(MeshShape(), jax.devices()[:1])
    flops = {}
    for remat in (None, "dots", "full"):
        work = Workload("train", 4, 64, 64, remat, "float32")
        compiled = compile_step(config, work, device, estimate(config, work, step_inputs(config, work, device)))
        assert compiled.flops is not None
        flops[remat] = compiled.flops
    layers = step_flops(config, work).forward.layers
    down = 2 * work.tokens * config.hidden_size * config.intermediate_size * len(config.layers)
    assert 0.95 < (flops["full"] - flops[None]) / (layers - down) < 1.1
    assert (flops["dots"] - flops[None]) / layers < 0.1


def test_keys_of_the_json(capsys: pytest.CaptureFixture[str]):
    arguments = "K-EXAONE-236B-A23B --mode decode --topology v5p:4x4x4 --mesh expert=8,tensor=8 --batch 64 --no-compile"
    code, out = run_json(capsys, "plan", *arguments.split(), "--context", "32768")
    assert code == 0
    assert (out["chips"], out["fits"], out["compiled_flops"], out["shortfall"]) == (64, True, None, [])
    parts = out["bytes_per_chip"]
    assert parts.keys() == {"parameters", "optimizer", "gradients", "activations", "kv", "temporaries", "total"}
    assert parts["total"] == sum(size for part, size in parts.items() if part != "total") < out["hbm_bytes_per_chip"]
    # 12 global layers keep all positions; the 36 windows of 128 keep 128: a row in 8 parts, heads in 8.
    assert parts["kv"] == 8 * 2 * 2 * 128 * (12 * 32768 + 36 * 128) + 8 * 4
    assert out["collective_bytes"].keys() == {"all-reduce", "all-to-all"}
    assert out["bound"]["limited_by"] == "HBM" and 0 < out["bound"]["mfu"] < 0.1


def test_without_a_chip_it_says_which_chips_hold_it(capsys: pytest.CaptureFixture[str]):
    code, out = run_json(capsys, "plan", "EXAONE-4.0-32B", "--mode", "decode", "--context", "4096")
    assert code == 0
    assert (out["fits"], out["hbm_bytes_per_chip"], out["bound"]) == (None, None, None)
    assert out["fits_on"] == ["v5p", "tpu7x", "a100-80", "h100", "h200", "b200"]


def test_two_devices_of_one_chip_share_its_memory(capsys: pytest.CaptureFixture[str]):
    code, out = run_json(capsys, "plan", "EXAONE-4.0-1.2B", "--topology", "tpu7x:2x2x1", "--no-compile")
    assert (code, out["chips"], out["devices"]) == (0, 4, 8)
    assert out["bytes_per_chip"]["optimizer"] >= 8 * 1_279_391_488 // 4
    assert out["hbm_bytes_per_chip"] == CHIPS["tpu7x"].hbm_bytes


def test_what_does_not_fit_says_by_how_much_and_what_would(capsys: pytest.CaptureFixture[str]):
    code, out = run_json(capsys, "plan", "EXAONE-4.0-32B", "--chip", "a100-40", "--devices", "8", "--context", "4096")
    assert (code, out["fits"]) == (1, False)
    assert "GiB too much; 32 x a100-40 would fit with --mesh" in out["shortfall"][0]
    code, out = run_json(
        capsys, "plan", "EXAONE-4.0-1.2B", "--chip", "v5e", "--devices", "4", "--batch", "64", "--remat", "none"
    )
    assert code == 1
    assert re.search(r"GiB too much; \S+ would fit with --mesh \S+ --remat full$", out["shortfall"][0])
    code, out = run_json(
        capsys, "plan", "EXAONE-4.0-1.2B", "--chip", "v5e", "--devices", "4", "--batch", "64", "--remat", "full"
    )
    assert code == 1
    assert "GiB too much; --batch 16 would fit" in out["shortfall"][0]


def test_what_cannot_fit_on_any_slice_says_so(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("exaone_jax.planning.plan._SLICES", ())  # of this model their search takes half a minute
    code, out = run_json(capsys, "plan", "K-EXAONE-2.0-750B-A37B", "--topology", "v6e:16x16", "--no-compile")
    assert (code, out["fits"]) == (1, False)
    words = (
        r"GiB too much; parameters, gradients and optimizer take 11,\S+ GiB and v6e:16x16, the largest slice, has 7,997"
    )
    assert re.search(words, out["shortfall"][0])


def test_a_larger_slice_is_not_asked_for_where_the_hosts_memory_would_do(capsys: pytest.CaptureFixture[str]):
    arguments = "K-EXAONE-236B-A23B --topology v6e:16x16 --mesh fsdp=32,tensor=8 --batch 32 --no-compile"
    code, out = run_json(capsys, "plan", *arguments.split())
    assert code == 1
    assert re.search(r"GiB too much; --mesh \S+( --batch \d+)? --remat offload would fit$", out["shortfall"][0])


def test_a_row_for_each_part_where_more_chips_are_needed(capsys: pytest.CaptureFixture[str]):
    arguments = "EXAONE-4.0-32B --topology v5e:2x2 --mesh tensor=4 --batch 1 --context 512 --no-compile"
    code, out = run_json(capsys, "plan", *arguments.split())
    assert code == 1
    assert re.search(r"v5e:\w+ would fit with --mesh \S+ --batch \d+", out["shortfall"][0])


def test_a_search_keeps_what_is_given(capsys: pytest.CaptureFixture[str]):
    arguments = "EXAONE-4.0-1.2B --chip h100 --devices 8 --search --context 4096"
    code, out = run_json(capsys, "plan", *arguments.split(), "--remat", "full", "--batch", "8")
    assert (code, out["remat"], out["batch"]) == (0, "full", 8)
    code, out = run_json(capsys, "plan", *arguments.split(), "--batch", "8")
    assert (code, out["remat"], out["batch"]) == (0, None, 8)  # eight H100s need not recompute eight rows


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("EXAONE-9 --chip h100", "EXAONE-9"),
        ("EXAONE-4.0-1.2B --chip h900", "chip: found 'h900', expected one of v5e"),
        ("EXAONE-4.0-1.2B --topology v9:2x2", "expected TPU:SHAPE or SLICESxTPU:SHAPE with a TPU of v5e, v5p"),
        ("EXAONE-4.0-1.2B --topology 0xv6e:2x2", "found '0xv6e:2x2', expected TPU:SHAPE or SLICESxTPU:SHAPE"),
        ("EXAONE-4.0-1.2B --topology xv6e:2x2", "and at least one slice: v5p:4x4x4, 4xv6e:16x16"),
        ("EXAONE-4.0-1.2B --topology -2xv6e:2x2", "found '-2xv6e:2x2'"),
        ("EXAONE-4.0-1.2B --topology 2xh100:2x2", "found '2xh100:2x2'"),
        ("EXAONE-4.0-1.2B --topology 2xtpu7x:2x2", "'2xtpu7x:2x2' does not exist; tpu7x has tpu7x:2x2x1"),
        ("EXAONE-4.0-1.2B --topology 3xv6e:2x2 --mesh data=3,fsdp=4 --batch 16", "data x fsdp x expert = 12"),
        ("EXAONE-4.0-1.2B --topology 3xv6e:2x2", "'embed' of size 2048 does not divide into 12 parts (fsdp)"),
        ("EXAONE-4.0-1.2B --topology 2xv6e:2x2 --mesh tensor=8", "data=1 and fsdp=1 do not divide into 2 slices"),
        ("EXAONE-4.0-1.2B --topology 4xv6e:2x2 --mesh data=2,tensor=8", "which only these two may cross"),
        ("EXAONE-4.0-1.2B --topology v6e:3x3", "does not exist; v6e has v6e:2x2, v6e:2x4"),
        ("EXAONE-4.0-1.2B --topology v5p:4x4x6", "each a multiple of 4"),
        ("EXAONE-4.0-1.2B --topology v6e:2x4 --chip v6e", "--topology with --chip"),
        ("EXAONE-4.0-1.2B --topology v6e:2x4 --mesh fsdp=4", "mesh fsdp=4: found 8 devices, expected 4"),
        ("EXAONE-4.0-1.2B --topology v6e", "does not exist; v6e has v6e:2x2"),
        ("EXAONE-4.0-1.2B --topology v6e:2x4 --mesh fsdp=8,fsdp=8", "mesh: found 'fsdp=8'"),
        ("EXAONE-4.0-1.2B --topology v6e:2x4 --mesh fsdp=3,tensor=-1", "found 8 devices, expected 3 or a multiple"),
        ("EXAONE-4.0-1.2B --chip h100 --devices 0", "devices: found 0"),
        ("EXAONE-4.0-1.2B --chip h100 --batch 0", "batch: found 0"),
        ("EXAONE-4.0-1.2B --chip h100 --batch 0 --search", "batch: found 0"),
        ("EXAONE-4.0-1.2B --chip h100 --context 0", "context: found 0, expected 1 to 65,536"),
        ("EXAONE-4.0-1.2B --chip h100 --context 65537", "context: found 65,537, expected 1 to 65,536"),
        ("EXAONE-4.0-1.2B --chip h100 --mode serve", "mode: found 'serve', expected one of train, prefill, decode"),
        ("EXAONE-4.0-1.2B --chip h100 --remat all", "remat: found 'all', expected one of none, dots, full, offload"),
        ("EXAONE-4.0-1.2B --chip h100 --mode decode --chunk 8", "chunk: found 8 in mode decode"),
        ("EXAONE-4.0-1.2B --chip h100 --devices 3 --mesh context=3", "do not divide into context=3 parts"),
        ("EXAONE-4.0-1.2B --chip h100 --devices 8 --batch 12", "batch: found 12 rows, expected a multiple"),
        (
            "EXAONE-4.0-1.2B --chip h100 --lora fp4",
            "lora: found 'fp4', expected 'float32', 'bfloat16', 'int8' or 'nf4'",
        ),
        ("EXAONE-4.0-1.2B --chip h100 --lora nf4 --mode decode", "lora: found it in mode decode, expected mode train"),
        ("EXAONE-4.0-1.2B --search", "search: needs a chip"),
        ("EXAONE-4.0-1.2B --search --chip h100 --mesh fsdp=1", "search: finds the mesh"),
        ("K-EXAONE-236B-A23B --chip h100 --devices 16 --mesh tensor=16", "kv_heads"),
    ],
)
def test_bad_input(capsys: pytest.CaptureFixture[str], arguments: str, message: str):
    code, out = run_json(capsys, "plan", *arguments.split())
    assert code == 2
    assert message in out["error"]["message"]


def test_without_libtpu_it_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    code, out = run_json(capsys, "plan", "EXAONE-4.0-1.2B", "--topology", "v6e:2x4")
    assert code == 2
    assert "pip install 'exaone-jax[tpu]'" in out["error"]["message"]
    assert "--no-compile" in out["error"]["message"]


def test_topologies_that_exist():
    assert str(Topology.parse("v5p:8x8x8")) == "v5p:8x8x8"
    assert Topology.parse("v5p:8x8x8").devices == 512
    assert Topology.parse("tpu7x:2x2x1").devices == 8
    assert max(a * b * c for a, b, c in topologies(CHIPS["v5p"])) == 16 * 16 * 24


def test_several_slices():
    several = Topology.parse("4xv6e:16x16")
    assert (str(several), several.one_slice, several.chips) == ("4xv6e:16x16", "v6e:16x16", 1024)
    assert Topology.parse("2xtpu7x:2x2x1").devices == 16
    assert str(Topology.parse("1xv5p:4x4x4")) == "v5p:4x4x4"


def test_what_crosses_slices_is_counted_apart(capsys: pytest.CaptureFixture[str]):
    arguments = "EXAONE-4.0-1.2B --topology 4xv6e:2x4 --mesh data=2,fsdp=16 --batch 32 --context 512 --no-compile"
    code, out = run_json(capsys, "plan", *arguments.split())
    assert (code, out["topology"], out["chips"]) == (0, "4xv6e:2x4", 32)
    size = (1_279_391_488 - 30 * (2 * 2048 + 2 * 64) - 2048) // 16  # of a device's part of all matrices
    once, sums = {"all-gather": 2 * 2 * size, "reduce-scatter": 4 * size}, 4 * size
    # Two slices hold a copy together: a part goes to the other one. Sums of two copies: half of it back and forth.
    assert out["dcn_bytes"] == out["least_dcn_bytes"]
    assert {kind: out["dcn_bytes"][kind] for kind in once} == once
    assert out["dcn_bytes"]["all-reduce"] == pytest.approx(sums, rel=1e-3)  # and the norms
    assert all(size <= out["collective_bytes"][kind] for kind, size in out["dcn_bytes"].items())
    bound = out["bound"]
    assert bound["limited_by"] == "DCN"
    assert bound["seconds"] == bound["dcn_seconds"] == sum(out["dcn_bytes"].values()) / 12.5e9
    within = sum(out["collective_bytes"].values()) - sum(out["dcn_bytes"].values())
    assert bound["link_seconds"] == within / 400e9


def test_serving_over_slices_keeps_to_a_slice(capsys: pytest.CaptureFixture[str]):
    arguments = "K-EXAONE-236B-A23B --mode decode --topology 2xv5p:2x4x4 --batch 64 --context 4096 --no-compile"
    code, out = run_json(capsys, "plan", *arguments.split())
    assert (code, out["chips"], out["dcn_bytes"]) == (0, 64, {})
    assert {axis: size for axis, size in out["mesh"].items() if size > 1} == {"data": 2, "tensor": 8, "expert": 4}


def test_a_search_over_slices_also_gives_each_a_copy():
    where = Target(CHIPS["v6e"], 16, Topology.parse("4xv6e:2x2"))
    works = [Workload("train", 16, 4096, 4096, None)]
    found = {plan.mesh for plan in search("dense", DENSE, where, lambda _: works)}
    assert MeshShape(data=4, fsdp=4) in found and MeshShape(fsdp=16) in found and MeshShape(data=2, fsdp=8) in found
    assert not [mesh for mesh in found if mesh.data * mesh.fsdp % 4]


def test_more_slices_are_proposed_where_one_is_not_enough():
    sizes = {"hidden_size": 8192, "intermediate_size": 32768, "layers": DENSE.layers * 100}
    model, where = DENSE.model_copy(update=sizes), Target(CHIPS["v5e"], 256, Topology.parse("v5e:16x16"))
    plan = make_plan("large", model, where, MeshShape(fsdp=256), Workload("train", 256, 4096, 4096, "full"))
    words = r"v5e:16x16, the largest slice, has 4,032\S+ GiB; 4xv5e:16x16 would fit with --mesh \S+ --remat offload$"
    assert re.search(words, remedy(plan, model))


def test_a_search_gives_what_fits_cheapest_first():
    where = Target(CHIPS["h100"], 8)
    works = [Workload("train", 8, 4096, 4096, remat) for remat in (None, "full")]
    plans = search("dense", DENSE, where, lambda _: works)
    bounds = [plan.bound for plan in plans if plan.bound is not None]
    costs = [bound.compute_seconds + bound.hbm_seconds + bound.link_seconds for bound in bounds]
    assert costs == sorted(costs) and len(costs) == len(plans) > 4
    assert all(plan.fits for plan in plans)
    assert plans[0].work.remat is None  # it has the room, and recomputes nothing
    assert search("dense", DENSE, where, lambda _: [Workload("train", 2**20, 4096, 4096, None)]) == []


def test_a_plan_does_not_depend_on_devices_being_here():
    work = Workload("train", 64, 512, 512, "full")
    plan = make_plan("dense", DENSE, Target(CHIPS["v5p"], 64), MeshShape(fsdp=64), work)
    again = estimate(DENSE, work, step_inputs(DENSE, work, abstract_mesh((1, 64, 1, 1, 1))))
    assert plan.memory == again


REFUSALS = {
    "libtpu 0.0.48.1": (
        "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO temporaries (40.00G) exceeds "
        "available HBM (15.75G). HLO module: jit__serve.",
        40 * 2**30,
    ),
    "libtpu 0.0.50.1": (
        "RESOURCE_EXHAUSTED: E1000: CompileTimeHbmOom: Ran out of memory on HBM, the total memory required for HLO "
        "temporaries (1.41T) exceeds available HBM (15.75G). HLO module: jit__serve.\nSee "
        "https://openxla.org/xla/errors/error_1000 for more details.",
        round(1.41 * 2**40),
    ),
    "libtpu 0.0.41": (
        "RESOURCE_EXHAUSTED: Allocation (size=20132659200) would exceed memory (size=17179869184) :: %s0 = "
        "inlined_call_operand.hbm [shape: bf16[30,40,2,65536,64], index: 0, kind: input, shape index: {}] /* operand 0 */ "
        ":: copy.28",
        20132659200,
    ),
}


@pytest.mark.parametrize("version", REFUSALS)
def test_what_a_compiler_that_refuses_asked_for(monkeypatch: pytest.MonkeyPatch, version: str):
    message, asked = REFUSALS[version]

    def refuse(*_: object, **__: object) -> None:
        raise jax.errors.JaxRuntimeError(message)

    monkeypatch.setattr(jax.stages.Lowered, "compile", refuse)
    work = Workload("decode", 8, 4096, 1, None, "float32")
    plan = make_plan("dense", DENSE, Target(CHIPS["v5e"], 8), MeshShape(data=8), work)
    compiled = compile_step(DENSE, work, make_mesh(MeshShape(data=8)), plan.estimated)
    assert compiled.memory.total == asked
    assert (compiled.memory.parameters, compiled.memory.kv) == (plan.estimated.parameters, plan.estimated.kv)
    assert compiled.flops is None
    refused = replace(plan, compiled=compiled)
    assert refused.fits is False
    assert re.fullmatch(r"does not fit: .* GiB too much; .*", remedy(refused, DENSE))
    assert "the compiler refused: RESOURCE_EXHAUSTED" in refused.to_dict()["notes"][0]


def test_another_error_of_the_compiler_is_not_taken_for_a_lack_of_memory(monkeypatch: pytest.MonkeyPatch):
    def fail(*_: object, **__: object) -> None:
        raise jax.errors.JaxRuntimeError("INTERNAL: Mosaic failed to compile TPU kernel")

    monkeypatch.setattr(jax.stages.Lowered, "compile", fail)
    work = Workload("decode", 8, 4096, 1, None, "float32")
    devices = make_mesh(MeshShape(data=8))
    with pytest.raises(jax.errors.JaxRuntimeError, match="Mosaic failed"):
        compile_step(DENSE, work, devices, estimate(DENSE, work, step_inputs(DENSE, work, devices)))


def test_a_refusal_passes_over_plans_that_the_same_error_would_fill():
    works = [Workload("train", rows, 4096, 4096, remat) for rows in (8, 64, 512) for remat in (None, "full")]
    plans = search("dense", DENSE, Target(CHIPS["h100"], 8), lambda _: works)
    limit = CHIPS["h100"].hbm_bytes
    times = 1.5 * limit / plans[0].estimated.total

    def compiled(plan: Plan) -> Plan:
        """A compiler that asks for so many times the estimate that the first plan is half too large."""
        more = round((times - 1) * plan.estimated.total)
        memory = replace(plan.estimated, temporaries=plan.estimated.temporaries + more)
        return replace(plan, compiled=Compiled(memory, None, {}, {}, 0.0, ()))

    tried = confirmed(plans, compiled)
    assert [plan.fits for plan in tried] == [False, True]
    assert tried[1].estimated.total <= tried[0].estimated.total / 1.5
    passed_over = plans[1 : next(place for place, plan in enumerate(plans) if plan.estimated is tried[1].estimated)]
    assert all(times * plan.estimated.total > limit for plan in passed_over)


def test_slices_smallest_first():
    work = Workload("train", 64, 4096, 4096, None)
    model = DENSE.model_copy(update={"hidden_size": 16384, "intermediate_size": 65536})
    found = list(islice(slices("large", model, CHIPS["v5e"], work, lambda _: [replace(work, remat="full")]), 2))
    first, second = (plans[0].target.topology for plans in found)
    assert first is not None and second is not None and first.chips < second.chips
    least = state_bytes(model, work)
    params = step_inputs(model, work, abstract_mesh((1, 1, 1, 1, 1))).params
    assert 4 * device_bytes(params) <= least < 4 * device_bytes(params) + 1000  # and the optimizer's counter
    assert all(least <= topology.chips * CHIPS["v5e"].hbm_bytes for topology in (first, second))


@pytest.mark.slow
@WITH_LIBTPU
def test_the_compiler_refuses_what_does_not_fit(capsys: pytest.CaptureFixture[str]):
    arguments = "EXAONE-4.0-1.2B --topology v5e:2x2 --mesh tensor=4 --mode decode --batch 40"
    code, out = run_json(capsys, "plan", *arguments.split())
    assert (code, out["fits"], out["compiled_flops"]) == (1, False, None)
    assert out["bytes_per_chip"]["total"] > out["hbm_bytes_per_chip"]
    assert "would fit" in out["shortfall"][0]
    assert "the compiler refused" in out["notes"][0]


@pytest.mark.slow
@WITH_LIBTPU
def test_decoding_does_not_copy_its_cache(capsys: pytest.CaptureFixture[str]):
    """Two key-value heads on a device, of 64: the shape in which a write of all heads at once copied the cache twice a step."""
    arguments = "EXAONE-4.0-1.2B --topology v6e:2x2 --mesh tensor=4 --mode decode --batch 8"
    code, out = run_json(capsys, "plan", *arguments.split())
    assert code == 0
    assert out["bytes_per_chip"]["temporaries"] < 0.01 * out["bytes_per_chip"]["kv"]


@pytest.mark.slow
@WITH_LIBTPU
def test_compiled_for_a_tpu(capsys: pytest.CaptureFixture[str]):
    """EXAONE 4.0 1.2B on the smallest slice of eight chips: half a minute to some minutes."""
    code, out = run_json(capsys, "plan", "EXAONE-4.0-1.2B", "--topology", "v6e:2x4", "--context", "4096")
    assert code == 0 and out["fits"]
    assert out["kernels"] == {"flash_attention_forward": 60, "flash_attention_backward": 30}
    assert abs(out["compiled_flops"] / (out["model_flops"] + out["recomputed_flops"]) - 1) < 0.1
    estimated, compiled = out["estimated_bytes_per_chip"], out["bytes_per_chip"]
    for exact in ("parameters", "optimizer"):
        assert estimated[exact] == compiled[exact]
    assert 0.7 < estimated["total"] / compiled["total"] < 1.3


@pytest.mark.slow
@WITH_LIBTPU
def test_compiled_for_two_slices(capsys: pytest.CaptureFixture[str]):
    """Weights split over both cross once a gather; a copy in each sends its gradients alone."""
    arguments = "EXAONE-4.0-1.2B --topology 2xv6e:2x2 --context 1024 --batch 8 --mesh"
    code, both = run_json(capsys, "plan", *arguments.split(), "fsdp=8")
    assert code == 0
    assert both["dcn_bytes"]["all-gather"] == pytest.approx(both["least_dcn_bytes"]["all-gather"], rel=0.05)
    code, each = run_json(capsys, "plan", *arguments.split(), "data=2,fsdp=4")
    assert code == 0
    assert each["dcn_bytes"].keys() == {"all-reduce"}
    assert sum(each["dcn_bytes"].values()) == pytest.approx(sum(each["least_dcn_bytes"].values()), rel=0.05)
    for out in (both, each):
        assert out["bytes_per_chip"]["parameters"] == out["estimated_bytes_per_chip"]["parameters"]
        assert abs(out["compiled_flops"] / (out["model_flops"] + out["recomputed_flops"]) - 1) < 0.1


@pytest.mark.slow
@WITH_LIBTPU
def test_libtpu_refuses_what_it_does_not_know(monkeypatch: pytest.MonkeyPatch):
    from exaone_jax.planning.compile import tpu_devices

    assert len(tpu_devices(Topology.parse("v5p:2x2x1"))) == 4
    with pytest.raises(ConfigError, match="libtpu refuses it"):
        tpu_devices(Topology(CHIPS["v5p"], (1, 1, 3)))
