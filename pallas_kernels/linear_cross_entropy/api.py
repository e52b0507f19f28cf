"""The public face of the linear cross entropy: checks, and the choice of an implementation."""

import jax
import jax.numpy as jnp

from pallas_kernels._select import choose
from pallas_kernels.linear_cross_entropy import gpu, reference, tpu, xla

# No kernel of "tpu" or "gpu" exists yet: None takes "xla" on every backend.
_ORDER = ("xla",)


def linear_cross_entropy(
    x: jax.Array,
    weight: jax.Array,
    labels: jax.Array,
    *,
    mask: jax.Array | None = None,
    z_loss: float = 0.0,
    ignore_index: int = -100,
    chunk_size: int | None = None,
    implementation: str | None = None,
) -> tuple[jax.Array, jax.Array]:
    """The negative log-likelihood of each row's label under softmax(x @ weight.T), and the row's log-sum-exp.

    loss[m] = lse[m] - logits[m, labels[m]] + z_loss * lse[m]**2, with logits = x @ weight.T and lse in float32. The last
    term is the z-loss of PaLM (Chowdhery et al. 2022, section 5). A row counts where mask is true and its label is not
    ignore_index; elsewhere loss, lse and gradients are zero whatever the row holds. There is no mean: divide by what you
    count.

    Args:
      x: `[M, D]` float32 or bfloat16.
      weight: `[V, D]` float32 or bfloat16; it multiplies in x's dtype, and its gradient is summed in
        float32 and given in its own.
      labels: `[M]` integers. One that counts and is outside [0, V) makes its row's loss NaN: a traced value cannot
        raise.
      mask: `[M]` bool or integers (nonzero counts), or None for every row.
      z_loss: coefficient, >= 0.
      ignore_index: the label of rows that do not count.
      chunk_size: "xla": rows whose logits are in memory at a time; by default as many as have 256 MiB of them.
      implementation: "reference" (whole logits), "xla" (chunks of rows), "tpu", "gpu", or None to choose.

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
        implementation=implementation,
    )
    counts = labels != ignore_index
    if mask is not None:
        counts &= mask.astype(bool)
    if x.shape[0] == 0:
        return jnp.zeros((0,), jnp.float32), jnp.zeros((0,), jnp.float32)
    if name == "reference":
        return reference.linear_cross_entropy(x, weight, labels, counts, z_loss)
    return xla.linear_cross_entropy(x, weight, labels, counts, z_loss, chunk_size)


def choose_implementation(
    x: jax.Array,
    weight: jax.Array,
    labels: jax.Array,
    *,
    mask: jax.Array | None = None,
    z_loss: float = 0.0,
    ignore_index: int = -100,
    chunk_size: int | None = None,
    implementation: str | None = None,
) -> str:
    """The name of the implementation that `linear_cross_entropy` would run; the same arguments and errors."""
    del ignore_index
    _check(x, weight, labels, mask, z_loss, chunk_size)
    reasons = {
        "reference": None if chunk_size is None else "it has the whole logits in memory and takes no chunk_size",
        "xla": None,
        "tpu": tpu.unsupported(),
        "gpu": gpu.unsupported(),
    }
    return choose("linear_cross_entropy", implementation, reasons, order=_ORDER)


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
