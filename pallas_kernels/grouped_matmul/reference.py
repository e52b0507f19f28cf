"""The plain meaning: every group multiplies every row, and a mask keeps its own."""

import jax
import jax.numpy as jnp


def grouped_matmul(
    lhs: jax.Array, rhs: jax.Array, sizes: jax.Array, first: jax.Array | None, transpose_rhs: bool, out_dtype: jnp.dtype
) -> jax.Array:
    """lhs `[M, K]`, rhs `[G, K, N]` or `[G, N, K]`, sizes int32 `[G]` of the groups from row `first` on -> `[M, N]`; G times
    the work it needs."""
    rhs = jnp.swapaxes(rhs, 1, 2) if transpose_rhs else rhs
    ends = jnp.cumsum(sizes) if first is None else first + jnp.cumsum(sizes)
    starts = ends - sizes
    rows = jnp.arange(lhs.shape[0])

    def one_group(out: jax.Array, group: tuple[jax.Array, jax.Array, jax.Array]) -> tuple[jax.Array, None]:
        kernel, start, end = group
        mine = ((start <= rows) & (rows < end))[:, None]
        # Masked going in as well as coming out: the gradients then hold nothing of other groups' rows either.
        product = jnp.dot(
            jnp.where(mine, lhs, 0),
            kernel.astype(lhs.dtype),
            precision=jax.lax.Precision.HIGHEST,
            preferred_element_type=jnp.float32,
        )
        return jnp.where(mine, product, out), None

    out = jnp.zeros((lhs.shape[0], rhs.shape[2]), jnp.float32)
    out, _ = jax.lax.scan(one_group, out, (rhs, starts, ends))
    return out.astype(out_dtype)
