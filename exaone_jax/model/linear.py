"""Parameters with logical axes, and the linear layer."""

import jax
import jax.numpy as jnp
from flax import nnx

Axes = tuple[str, ...]


class ParamFactory:
    """Makes the parameters of one module tree.

    Args:
        rngs: source of the initial values.
        dtype: of the parameters.
        std: standard deviation of the normal initialiser (HF `initializer_range`).
        repeats: leading axis that every parameter gets, for blocks that are stacked and scanned; None for none.
    """

    def __init__(self, rngs: nnx.Rngs, dtype: jax.typing.DTypeLike, std: float, repeats: int | None = None):
        self._rngs, self._dtype, self._std, self._repeats = rngs, jnp.dtype(dtype), std, repeats

    def stacked(self, repeats: int) -> "ParamFactory":
        """The same factory for blocks with a leading axis of `repeats`."""
        return ParamFactory(self._rngs, self._dtype, self._std, repeats)

    def _full(self, shape: tuple[int, ...], axes: Axes) -> tuple[tuple[int, ...], Axes]:
        return (shape, axes) if self._repeats is None else ((self._repeats, *shape), ("layers", *axes))

    def normal(self, shape: tuple[int, ...], axes: Axes) -> nnx.Param[jax.Array]:
        shape, axes = self._full(shape, axes)
        value = jax.random.normal(self._rngs.params(), shape, jnp.float32) * self._std
        return nnx.Param(value.astype(self._dtype), axes=axes)

    def ones(self, shape: tuple[int, ...], axes: Axes) -> nnx.Param[jax.Array]:
        shape, axes = self._full(shape, axes)
        return nnx.Param(jnp.ones(shape, self._dtype), axes=axes)

    def router_bias(self, num_experts: int) -> "RouterBias":
        shape, axes = self._full((num_experts,), ("experts",))
        return RouterBias(jnp.zeros(shape, jnp.float32), axes=axes)


class RouterBias(nnx.Variable[jax.Array]):
    """Bias of expert selection, float32 always: moved by the balancing rule and not by gradients, so it is no Param."""


def _contract(x: jax.Array, y: jax.Array, x_axes: tuple[int, ...], y_axes: tuple[int, ...]) -> jax.Array:
    """Tensor product summed over the named axes, accumulated and returned in float32; true float32 on every backend."""
    precision = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    dims = ((x_axes, y_axes), ((), ()))
    return jax.lax.dot_general(x, y, dims, precision=precision, preferred_element_type=jnp.float32)


@jax.custom_vjp
def dot(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """x `[..., in]` times kernel `[in, out]` in x's dtype with float32 accumulation.

    The kernel may be wider than x (float32 master weights under bfloat16 compute): its gradient keeps the kernel's
        dtype
    and is not rounded to x's on the way.
    """
    kernel = kernel.astype(x.dtype)
    if x.size == x.shape[-1]:
        # XLA:CPU's matrix-vector path is up to 40 times slower than two rows; elsewhere rows are padded to a tile
        # anyway.
        pair = _contract(jnp.stack([x.reshape(-1)] * 2), kernel, (1,), (0,))
        return pair[0].reshape(*x.shape[:-1], kernel.shape[-1]).astype(x.dtype)
    return _contract(x, kernel, (x.ndim - 1,), (0,)).astype(x.dtype)


def _dot_fwd(x: jax.Array, kernel: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return dot(x, kernel), (x, kernel)


def _dot_bwd(saved: tuple[jax.Array, jax.Array], grad: jax.Array) -> tuple[jax.Array, jax.Array]:
    x, kernel = saved
    rows = tuple(range(x.ndim - 1))
    dx = _contract(grad, kernel.astype(x.dtype), (grad.ndim - 1,), (1,)).astype(x.dtype)
    return dx, _contract(x, grad, rows, rows).astype(kernel.dtype)


dot.defvjp(_dot_fwd, _dot_bwd)


class Linear(nnx.Module):
    """y = x @ kernel, without bias: no EXAONE language model has one. kernel `[in, out]`."""

    def __init__(self, make: ParamFactory, features_in: int, features_out: int, axes: Axes):
        self.kernel = make.normal((features_in, features_out), axes)

    def __call__(self, x: jax.Array) -> jax.Array:
        return dot(x, self.kernel[...])
