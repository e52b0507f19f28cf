"""Reading a compiled program: loops multiply, collectives are counted by what a device sends."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from exaone_jax.parallel import MeshShape, make_mesh
from exaone_jax.planning.hlo import read_program


def test_products_count_as_often_as_their_loops_turn():
    def step(x, weights):
        def outer(x, _):
            return jax.lax.scan(lambda x, w: (jnp.sin(x @ w), None), x, weights)[0], None

        return jax.lax.scan(outer, x, None, length=5)[0]

    shapes = jax.ShapeDtypeStruct((32, 64), jnp.float32), jax.ShapeDtypeStruct((7, 64, 64), jnp.float32)
    program = read_program(jax.jit(step).lower(*shapes).compile().as_text() or "")
    assert program.flops == 5 * 7 * 2 * 32 * 64 * 64
    assert program.unknown_loops == 0


def test_a_loop_that_depends_on_data_is_said_to():
    def step(x, n):
        return jax.lax.fori_loop(0, n, lambda _, x: jnp.sin(x @ x), x)

    shapes = jax.ShapeDtypeStruct((16, 16), jnp.float32), jax.ShapeDtypeStruct((), jnp.int32)
    program = read_program(jax.jit(step).lower(*shapes).compile().as_text() or "")
    assert (program.flops, program.unknown_loops) == (2 * 16**3, 1)


@pytest.mark.parametrize(
    ("run", "kind", "sent"),
    [
        (lambda x: jax.lax.all_gather(x, "fsdp", tiled=True), "all-gather", 7 * 4 * 64),
        (lambda x: jax.lax.psum(x, "fsdp"), "all-reduce", 2 * 4 * 64 * 7 // 8),
        (lambda x: jax.lax.psum_scatter(x, "fsdp", tiled=True), "reduce-scatter", 4 * 64 * 7 // 8),
        (lambda x: jax.lax.all_to_all(x, "fsdp", 0, 0, tiled=True), "all-to-all", 4 * 64 * 7 // 8),
        (lambda x: jax.lax.ppermute(x, "fsdp", [(i, (i + 1) % 8) for i in range(8)]), "collective-permute", 4 * 64),
    ],
)
def test_bytes_that_a_device_sends(run, kind: str, sent: int):
    """Each device has 64 float32; the operation stands in a loop of 3."""
    mesh = make_mesh(MeshShape(fsdp=8))
    spec = PartitionSpec("fsdp")

    def three_times(x):
        return jax.lax.scan(lambda total, _: (total + jnp.sum(run(jnp.sin(total + x))), None), 0.0, None, length=3)[0][
            None
        ]

    step = jax.shard_map(three_times, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False)
    x = jax.ShapeDtypeStruct((512,), jnp.float32, sharding=NamedSharding(mesh, spec))
    program = read_program(jax.jit(step).lower(x).compile().as_text() or "")
    assert dict(program.sent) == {kind: 3 * sent}


TPU_LOOP = """HloModule step

%body (p: (u32[], f32[4,8])) -> (u32[], f32[4,8]) {
  %p = (u32[]{:T(128)}, f32[4,8]{1,0:T(8,128)}) parameter(0)
  %i = u32[]{:T(128)} get-tuple-element(%p), index=0
  %two = u32[]{:T(128)} constant(2)
  %next = u32[]{:T(128)} add(%i, %two)
  %x = f32[4,8]{1,0:T(8,128)} get-tuple-element(%p), index=1
  %y = f32[4,8]{1,0:T(8,128)} convolution(%x, %x), dim_labels=bf_io->bf
  %k = f32[4,8]{1,0} custom-call(%x), custom_call_target="tpu_custom_call", backend_config={STATED}
  %m = f32[4,8]{1,0} custom-call(%x), custom_call_target="tpu_custom_call", backend_config={}
  ROOT %t = (u32[]{:T(128)}, f32[4,8]{1,0:T(8,128)}) tuple(%next, %y)
}

%condition (p: (u32[], f32[4,8])) -> pred[] {
  %p = (u32[]{:T(128)}, f32[4,8]{1,0:T(8,128)}) parameter(0)
  %i = u32[]{:T(128)} get-tuple-element(%p), index=0
  %n = u32[]{:T(128)} constant(7)
  ROOT %c = pred[]{:T(512)} compare(%i, %n), direction=LT
}

ENTRY %main (x: f32[4,8]) -> f32[4,8] {
  %x = f32[4,8]{1,0:T(8,128)} parameter(0)
  %zero = u32[]{:T(128)} constant(0)
  %s = (u32[]{:T(128)}, f32[4,8]{1,0:T(8,128)}) tuple(%zero, %x)
  %w = (u32[]{:T(128)}, f32[4,8]{1,0:T(8,128)}) while(%s), condition=%condition, body=%body
  ROOT %r = f32[4,8]{1,0:T(8,128)} get-tuple-element(%w), index=1
}
"""


def test_a_tpu_program_says_nothing_of_its_loops_and_writes_products_as_convolutions():
    """0, 2, 4, 6 are below 7: four turns."""
    stated = '"custom_call_config":{"body":"a(b","cost_estimate":{"flops":"100","transcendentals":"1"}}'
    program = read_program(TPU_LOOP.replace("STATED", stated))
    assert program.unknown_loops == 0
    assert program.flops == 4 * (2 * 4 * 8 * 4 + 100)  # the kernel's input features are the first axis, of 4
    assert program.kernels == {"k": 4, "m": 4}
    assert program.uncounted == {"m": 4}


def test_an_all_reduce_of_which_a_part_is_kept_is_a_reduce_scatter():
    program = read_program(
        """HloModule step

%all-reduce-scatter.1 (x: f32[8,16]) -> f32[2,16] {
  %x = f32[8,16]{1,0} parameter(0)
  %sum = f32[8,16]{1,0} all-reduce(%x), replica_groups={{0,1,2,3},{4,5,6,7}}, to_apply=%add
  ROOT %part = f32[2,16]{1,0} dynamic-slice(%sum), dynamic_slice_sizes={2,16}
}

ENTRY %main (x: f32[8,16]) -> f32[2,16] {
  %x = f32[8,16]{1,0} parameter(0)
  ROOT %y = f32[2,16]{1,0} fusion(%x), kind=kCustom, calls=%all-reduce-scatter.1
}
"""
    )
    assert program.sent == {"reduce-scatter": 4 * 8 * 16 * 3 // 4}


EXCHANGE = """HloModule step

ENTRY %main (x: bf16[2,256]) -> bf16[8,256] {
  %x = bf16[2,256]{1,0:T(8,128)(2,1)} parameter(0)
  %next = bf16[2,256]{1,0:T(8,128)(2,1)} collective-permute(%x), source_target_pairs={{0,1},{1,0}}
  %token = token[] after-all()
  %send = (bf16[2,256]{1,0:T(8,128)(2,1)}, u32[]{:S(2)}, token[]) send(%next, %token), channel_id=2, TRANSFER
  %recv = (bf16[8,256]{1,0:T(8,128)(2,1)}, u32[]{:S(2)}, token[]) recv(%token), channel_id=1, TRANSFER
  %sent = token[] send-done(%send), channel_id=2, TRANSFER
  %done = (bf16[8,256]{1,0:T(8,128)(2,1)}, token[]) recv-done(%recv), channel_id=1, TRANSFER
  ROOT %out = bf16[8,256]{1,0:T(8,128)(2,1)} get-tuple-element(%done), index=0
}
"""
_PAIRS = "{{100000,200000},{100001,200001},{300000,400000},{300001,400001}}"
_EIGHT = "{{100000,100001,200000,200001,300000,300001,400000,400001}}"


@pytest.mark.parametrize(
    ("transfer", "target", "kind", "sent", "dcn"),
    [
        ("ALL_GATHER", '"{1,2,3,4}x{0:7}"', "all-gather", 3, 3),
        ("ALL_GATHER", _PAIRS, "all-gather", 1, 1),
        ("ALL_GATHER", _EIGHT, "all-gather", 7, 6),
        ("REDUCE_SCATTER", '"{1,2,3,4}x{0:7}"', "reduce-scatter", 3 / 4, 3 / 4),
        ("ALL_REDUCE", _PAIRS, "all-reduce", 1, 1),
        ("ALL_REDUCE", '"{1,2,3,4}x{0:7}"', "all-reduce", 6 / 4, 6 / 4),
        ("ALL_TO_ALL", _EIGHT, "all-to-all", 7 / 8, 3 / 4),
        ("ONE_TO_ONE", "{{100000,200000}}", "collective-permute", 1, 1),
    ],
)
def test_what_slices_exchange(transfer: str, target: str, kind: str, sent: float, dcn: float):
    """As libtpu 0.0.48.1 writes it, beside an exchange within each slice; as parts of what a device sends, 1,024 bytes."""
    attributes = f'_xla_megascale_target={target},_xla_megascale_transfer_type="{transfer}"'
    transfer = f"is_host_transfer=true, frontend_attributes={{{attributes}}}"
    program = read_program(EXCHANGE.replace("TRANSFER", transfer))
    within = {"collective-permute": 1024}
    assert program.dcn == {kind: 1024 * dcn}
    assert program.sent == within | {kind: 1024 * sent + (1024 if kind in within else 0)}
