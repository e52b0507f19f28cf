"""The public face of the linear cross entropy: checks, and the choice of an implementation."""

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels._select import choose, not_pallas
from pallas_kernels.linear_cross_entropy import gpu, reference, tpu, xla

_WHOLE = "it has the whole logits in memory and takes no chunk_size"
_CHOOSES_TILES = "its tiles fit the chip and it takes no chunk_size"


def linear_cross_entropy(
    x: jax.Array,
    weight: jax.Array,
    labels: jax.Array,
    *,
    mask: jax.Array | None = None,
    z_loss: float = 0.0,
    ignore_index: int = -100,
    chunk_size: int | None = None,
    axis_name: str | None = None,
    implementation: str | None = None,
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """The negative log-likelihood of each row's label under softmax(x @ weight.T), and the row's log-sum-exp.

    loss[m] = lse[m] - logits[m, labels[m]] + z_loss * lse[m]**2, with logits = x @ weight.T and lse in float32. The last
    term is the z-loss of PaLM (Chowdhery et al. 2022, section 5). A row counts where mask is true and its label is not
    ignore_index; elsewhere loss, lse and gradients are zero whatever the row holds. There is no mean: divide by what you
    count.

    With axis_name, inside `jax.shard_map(..., check_vma=False)`, every device of that mesh axis has an equal part of the
    vocabulary, in the axis's order, and the same x and labels. Three numbers a row cross the axis: the maximum, the sum and the
    label's logit. Each device's gradient of x is its part of the sum over the axis, as the transpose of shard_map adds up.

    Args:
      x: `[M, D]` float32 or bfloat16.
      weight: `[V, D]` float32 or bfloat16, this device's `[V / devices, D]` with axis_name. It multiplies in x's
        dtype, and its gradient is summed in float32 and given in its own.
      labels: `[M]` integers. One that counts and is outside [0, V) makes its row's loss NaN: a traced value cannot
        raise.
      mask: `[M]` bool or integers (nonzero counts), or None for every row.
      z_loss: coefficient, >= 0.
      ignore_index: the label of rows that do not count.
      chunk_size: "xla": rows whose logits are in memory at a time; by default as many as have 256 MiB of them.
      axis_name: the mesh axis over which the vocabulary is split, or None.
      implementation: "reference" (whole logits), "xla" (chunks of rows), "tpu" (tiles on chip), "gpu", or None to choose.
      interpret: run a Pallas implementation in its interpreter; the others refuse it.

    Returns:
      (loss float32 `[M]`, lse float32 `[M]`), both differentiable in x and weight (reverse mode).

    Raises:
      TypeError: a dtype that is not served.
      ValueError: shapes that do not fit, a bad z_loss or chunk_size, or an unknown implementation.
      NotImplementedError: the named implementation cannot serve this call.
    """
    name = choose_implementation(
        x,
        weight,
        labels,
        mask=mask,
        z_loss=z_loss,
        ignore_index=ignore_index,
        chunk_size=chunk_size,
        axis_name=axis_name,
        implementation=implementation,
        interpret=interpret,
    )
    counts = labels != ignore_index
    if mask is not None:
        counts &= mask.astype(bool)
    if x.shape[0] == 0:
        return jnp.zeros((0,), jnp.float32), jnp.zeros((0,), jnp.float32)
    first, vocab = 0, weight.shape[0]
    if axis_name is not None:
        first, vocab = lax.axis_index(axis_name) * vocab, vocab * lax.axis_size(axis_name)
    # Masked here, so that nothing of a row that does not count reaches a gradient.
    rows, own = jnp.where(counts[:, None], x, 0), labels.astype(jnp.int32) - first
    if name == "tpu":
        lse, at_label = tpu.lse_and_label(rows, weight, own, interpret)
    elif name == "reference":
        lse, at_label = reference.lse_and_label(rows, weight, own)
    else:
        lse, at_label = xla.lse_and_label(rows, weight, own, chunk_size)
    if axis_name is not None:
        greatest = lax.pmax(lax.stop_gradient(lse), axis_name)
        lse = greatest + jnp.log(lax.psum(jnp.exp(lse - greatest), axis_name))
        at_label = lax.psum(at_label, axis_name)
    known = (labels >= 0) & (labels < vocab)
    loss = lse - jnp.where(known, at_label, jnp.nan) + z_loss * lse**2
    return jnp.where(counts, loss, 0), jnp.where(counts, lse, 0)


def choose_implementation(
    x: jax.Array,
    weight: jax.Array,
    labels: jax.Array,
    *,
    mask: jax.Array | None = None,
    z_loss: float = 0.0,
    ignore_index: int = -100,
    chunk_size: int | None = None,
    axis_name: str | None = None,
    implementation: str | None = None,
    interpret: bool = False,
) -> str:
    """The name of the implementation that `linear_cross_entropy` would run; the same arguments and errors."""
    del ignore_index, axis_name
    _check(x, weight, labels, mask, z_loss, chunk_size)
    reasons = {
        "reference": not_pallas(interpret) if chunk_size is None else _WHOLE,
        "xla": not_pallas(interpret),
        "tpu": _CHOOSES_TILES if chunk_size is not None else tpu.unsupported(x, weight, interpret=interpret),
        "gpu": gpu.unsupported(),
    }
    return choose("linear_cross_entropy", implementation, reasons)


def _check(
    x: jax.Array,
    weight: jax.Array,
    labels: jax.Array,
    mask: jax.Array | None,
    z_loss: float,
    chunk_size: int | None,
) -> None:
    if x.ndim != 2 or weight.ndim != 2 or x.shape[1] != weight.shape[1] or min(weight.shape) < 1:
        raise ValueError(f"linear_cross_entropy: expected x [M, D], weight [V, D], found {x.shape} and {weight.shape}")
    for name, array in {"labels": labels, "mask": mask}.items():
        if array is not None and array.shape != x.shape[:1]:
            raise ValueError(f"linear_cross_entropy: expected {name} {x.shape[:1]}, found {array.shape}")
    for name, dtype in {"x": x.dtype, "weight": weight.dtype}.items():
        if dtype not in (jnp.float32, jnp.bfloat16):
            raise TypeError(f"linear_cross_entropy: {name} must be float32 or bfloat16, found {dtype}")
    if not jnp.issubdtype(labels.dtype, jnp.integer):
        raise TypeError(f"linear_cross_entropy: labels must be integers, found {labels.dtype}")
    if mask is not None and not (mask.dtype == jnp.bool_ or jnp.issubdtype(mask.dtype, jnp.integer)):
        raise TypeError(
            f"linear_cross_entropy: mask must be bool or integer, found {mask.dtype}; weigh the loss instead"
        )
    if not z_loss >= 0:
        raise ValueError(f"linear_cross_entropy: z_loss must be >= 0, found {z_loss}")
    if chunk_size is not None and chunk_size < 1:
        raise ValueError(f"linear_cross_entropy: chunk_size must be >= 1, found {chunk_size}")
