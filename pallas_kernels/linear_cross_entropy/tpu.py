"""Linear cross entropy on TPU: logits tile by tile on chip, forward and again backward; no logit is ever in HBM.

Tiles of logits stand transposed, [words, rows]: what a row has (its label, its log-sum-exp, its gradients) is a line of
lanes that broadcasts over words for free.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.linear_cross_entropy.tuned import Tiles, backward_tiles, chip, forward_tiles

_LANES = 128
_WIDTH = 512  # of D, that one product of the backward pass writes
_HEADROOM = 6 * 2**20  # VMEM for what the compiler keeps beside the tiles


def unsupported(x: jax.Array | None = None, weight: jax.Array | None = None, *, interpret: bool = False) -> str | None:
    """Why these kernels cannot serve a call, or None. Without arrays: any call at all."""
    if not interpret and _device_kind() is None:
        return (
            "there is no TPU here; interpret=True runs the kernels on any backend, and a compile ahead of time "
            "needs jax.set_mesh with a mesh of the TPU topology's devices"
        )
    if x is None or weight is None:
        return None
    vocab, size = weight.shape
    if size % _LANES or vocab % _LANES:
        return f"the TPU kernels need D and V to be multiples of {_LANES}, found weight [V, D] {weight.shape}"
    kind, itemsize = _device_kind() or "", x.dtype.itemsize
    # A row tile is never smaller than for one row, so what fits one row fits all.
    fits = (
        forward_tiles(kind, 1, size, vocab, itemsize),
        backward_tiles(kind, 1, size, vocab, itemsize, weight.dtype.itemsize),
    )
    return None if all(fits) else f"no tiles of D={size} fit into the {chip(kind).vmem >> 20} MiB that they may take"


def _device_kind() -> str | None:
    """The TPU that a call is for: that of the mesh in force, as in a compile ahead of time, else the backend's. None: no TPU."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    kind = device.device_kind if device is not None else jax.devices()[0].device_kind
    return kind if kind.startswith("TPU") else None


class _Plan(NamedTuple):
    """What is static in one call."""

    forward: Tiles
    backward: Tiles
    vmem_limit: int
    interpret: bool

    @property
    def compiler_params(self) -> pltpu.CompilerParams:
        return pltpu.CompilerParams(
            dimension_semantics=(pltpu.ARBITRARY, pltpu.ARBITRARY), vmem_limit_bytes=self.vmem_limit
        )


def lse_and_label(x: jax.Array, weight: jax.Array, labels: jax.Array, interpret: bool) -> tuple[jax.Array, jax.Array]:
    """As `reference.lse_and_label`, for calls that `unsupported` lets pass."""
    (num_rows, size), (vocab, _), kind = x.shape, weight.shape, _device_kind() or ""
    forward = forward_tiles(kind, num_rows, size, vocab, x.dtype.itemsize)
    backward = backward_tiles(kind, num_rows, size, vocab, x.dtype.itemsize, weight.dtype.itemsize)
    if forward is None or backward is None:
        raise NotImplementedError(f"linear_cross_entropy: no tiles for x {x.shape} and weight {weight.shape}")
    plan = _Plan(forward, backward, chip(kind).vmem + _HEADROOM, interpret)
    # Whole tiles of both kernels, and two of the backward one, which reads a block while it writes the one before.
    unit = max(forward.rows, 2 * backward.rows)
    padding = -num_rows % unit
    x, labels = jnp.pad(x, ((0, padding), (0, 0))), jnp.pad(labels.astype(jnp.int32), (0, padding))
    lse, at_label = _rows(x, weight, labels[None], plan)
    return lse[0, :num_rows], at_label[0, :num_rows]


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _rows(x: jax.Array, weight: jax.Array, labels: jax.Array, plan: _Plan) -> tuple[jax.Array, jax.Array]:
    """x `[M, D]` in whole tiles, labels int32 `[1, M]` -> lse and logits at the labels, float32 `[1, M]`."""
    (num_rows, size), vocab, tiles = x.shape, weight.shape[0], plan.forward
    row = pl.BlockSpec((1, tiles.rows), lambda n, v: (0, n))
    line = jax.ShapeDtypeStruct((1, num_rows), jnp.float32)
    return pl.pallas_call(
        _forward_kernel,
        grid=(num_rows // tiles.rows, vocab // tiles.vocab),
        in_specs=[
            row,
            pl.BlockSpec((tiles.rows, size), lambda n, v: (n, 0)),
            pl.BlockSpec((tiles.vocab, size), lambda n, v: (v, 0)),
        ],
        out_specs=[row, row],
        out_shape=[line, line],
        scratch_shapes=[pltpu.VMEM((1, tiles.rows), jnp.float32)] * 3,
        compiler_params=plan.compiler_params,
        cost_estimate=_cost(x, weight, products=1, rounds=num_rows // tiles.rows),
        interpret=plan.interpret,
        name="linear_cross_entropy",
    )(labels, x, weight.astype(x.dtype))


def _forward_kernel(labels_ref, x_ref, weight_ref, lse_ref, label_ref, max_ref, sum_ref, at_ref):
    v = pl.program_id(1)

    @pl.when(v == 0)
    def _():
        max_ref[...] = jnp.full_like(max_ref, -jnp.inf)
        sum_ref[...] = jnp.zeros_like(sum_ref)
        at_ref[...] = jnp.zeros_like(at_ref)

    logits = _dot(weight_ref[...], x_ref[...], 1, 1)
    old = max_ref[...]
    new = jnp.maximum(old, jnp.max(logits, axis=0, keepdims=True))
    max_ref[...] = new
    sum_ref[...] = sum_ref[...] * jnp.exp(old - new) + jnp.sum(jnp.exp(logits - new), axis=0, keepdims=True)
    at_ref[...] += jnp.sum(jnp.where(_is_label(labels_ref[...], v, logits.shape), logits, 0), axis=0, keepdims=True)

    @pl.when(v == pl.num_programs(1) - 1)
    def _():
        lse_ref[...] = max_ref[...] + jnp.log(sum_ref[...])
        label_ref[...] = at_ref[...]


def _dot(a: jax.Array, b: jax.Array, a_axis: int, b_axis: int) -> jax.Array:
    precision = lax.Precision.HIGHEST if a.dtype == jnp.float32 else lax.Precision.DEFAULT
    dims = (((a_axis,), (b_axis,)), ((), ()))
    return lax.dot_general(a, b, dims, precision=precision, preferred_element_type=jnp.float32)


def _is_label(labels: jax.Array, tile: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """bool `[words, rows]` for labels `[1, rows]`, in a tile of the vocabulary."""
    return lax.broadcasted_iota(jnp.int32, shape, 0) == labels - tile * shape[0]


def _cost(x: jax.Array, weight: jax.Array, products: int, rounds: int) -> pl.CostEstimate:
    scores = x.shape[0] * weight.shape[0]
    moved = x.size * x.dtype.itemsize + rounds * weight.size * x.dtype.itemsize
    return pl.CostEstimate(flops=2 * products * scores * x.shape[1], transcendentals=scores, bytes_accessed=moved)


def _rows_forward(x: jax.Array, weight: jax.Array, labels: jax.Array, plan: _Plan):
    out = _rows(x, weight, labels, plan)
    return out, (x, weight, labels, out[0])


def _rows_backward(plan: _Plan, saved: tuple, grads: tuple[jax.Array, jax.Array]):
    x, weight, labels, lse = saved
    (num_rows, size), vocab, tiles = x.shape, weight.shape[0], plan.backward
    row = pl.BlockSpec((1, tiles.rows), lambda v, n: (0, n))
    words = pl.BlockSpec((tiles.vocab, size), lambda v, n: (v, 0))
    dx, dweight = pl.pallas_call(
        _backward_kernel,
        grid=(vocab // tiles.vocab, num_rows // tiles.rows),
        in_specs=[row, row, row, row, pl.BlockSpec((tiles.rows, size), lambda v, n: (n, 0)), words],
        out_specs=[pl.BlockSpec(memory_space=pl.ANY), words],
        out_shape=[jax.ShapeDtypeStruct(x.shape, jnp.float32), jax.ShapeDtypeStruct(weight.shape, weight.dtype)],
        scratch_shapes=[
            pltpu.VMEM((tiles.vocab, size), jnp.float32),
            pltpu.VMEM((2, tiles.rows, size), jnp.float32),
            pltpu.SemaphoreType.DMA((2,)),
            pltpu.SemaphoreType.DMA((2,)),
        ],
        compiler_params=plan.compiler_params,
        cost_estimate=_cost(x, weight, products=3, rounds=1),
        interpret=plan.interpret,
        name="linear_cross_entropy_backward",
    )(labels, lse, *grads, x, weight.astype(x.dtype))
    return dx.astype(x.dtype), dweight, None


def _backward_kernel(
    labels_ref, lse_ref, dlse_ref, dlabel_ref, x_ref, weight_ref, dx_hbm, dweight_ref, sum_ref, dx_ref, reads, writes
):
    """Words outside, rows inside. The weight's gradient is summed on chip; x's is summed in HBM, in float32: at each step the
    block of the next one is read while this one is multiplied, and written while the next one is."""
    (v, n), (num_words, num_rows) = map(pl.program_id, (0, 1)), map(pl.num_programs, (0, 1))
    step, last = v * num_rows + n, num_words * num_rows - 1
    slot, other = step % 2, (step + 1) % 2

    def copy_in(block: jax.Array, slot: jax.Array):
        rows = dx_hbm.at[pl.ds(block * dx_ref.shape[1], dx_ref.shape[1])]
        return pltpu.make_async_copy(rows, dx_ref.at[slot], reads.at[slot])

    def copy_out(block: jax.Array, slot: jax.Array):
        rows = dx_hbm.at[pl.ds(block * dx_ref.shape[1], dx_ref.shape[1])]
        return pltpu.make_async_copy(dx_ref.at[slot], rows, writes.at[slot])

    @pl.when(step > 0)
    def _():
        copy_out(n, other).wait()  # of the step before: only its size and semaphore matter here

    @pl.when((step < last) & (step + 1 >= num_rows))
    def _():
        copy_in((step + 1) % num_rows, other).start()

    @pl.when(n == 0)
    def _():
        sum_ref[...] = jnp.zeros_like(sum_ref)

    logits = _dot(weight_ref[...], x_ref[...], 1, 1)
    softmax = dlse_ref[...] * jnp.exp(logits - lse_ref[...])
    dlogits = softmax + jnp.where(_is_label(labels_ref[...], v, logits.shape), dlabel_ref[...], 0)
    by_word, by_row = dlogits.astype(x_ref.dtype), dlogits.T.astype(x_ref.dtype)

    @pl.when(v > 0)
    def _():
        copy_in(n, slot).wait()

    for start in range(0, x_ref.shape[1], _WIDTH):
        part = slice(start, min(start + _WIDTH, x_ref.shape[1]))
        dx = _dot(by_row, weight_ref[:, part], 1, 0)
        dx_ref[slot, :, part] = dx + jnp.where(v > 0, dx_ref[slot, :, part], 0)
        sum_ref[:, part] += _dot(by_word, x_ref[:, part], 1, 0)

    copy_out(n, slot).start()

    @pl.when(step == last)
    def _():
        copy_out(n, slot).wait()

    @pl.when(n == num_rows - 1)
    def _():
        dweight_ref[...] = sum_ref[...].astype(dweight_ref.dtype)


_rows.defvjp(_rows_forward, _rows_backward)
