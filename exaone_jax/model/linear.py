"""Parameters with logical axes, and the linear layer."""

import math

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

PRODUCT = "product"  # what a remat policy calls the result of `dot`: policies cannot look into a custom gradient
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


class Frozen(nnx.Variable[jax.Array]):
    """A value that adapters are trained beside: no gradient is taken of it."""


class RouterBias(nnx.Variable[jax.Array]):
    """Bias of expert selection, float32 always: moved by the balancing rule and not by gradients, so it is no Param."""


def _contract(
    x: jax.Array,
    y: jax.Array,
    x_axes: tuple[int, ...],
    y_axes: tuple[int, ...],
    dtype: jax.typing.DTypeLike = jnp.float32,
) -> jax.Array:
    """Tensor product summed over the named axes, accumulated in float32; true float32 on every backend."""
    precision = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    dims = ((x_axes, y_axes), ((), ()))
    return jax.lax.dot_general(x, y, dims, precision=precision, preferred_element_type=dtype)


# Up to this many rows a CPU gets the product the other way round.
_FEW_ROWS = 128


@jax.custom_vjp
def dot(x: jax.Array, weight: jax.Array) -> jax.Array:
    """x `[..., in]` times the transpose of weight `[out, in]` -> `[..., out]` in x's dtype, accumulated in float32.

    The weight may be wider than x (float32 master weights under bfloat16 compute): its gradient keeps the weight's dtype
    and is not rounded to x's on the way.
    """
    return _product(x, weight)


def _product(x: jax.Array, weight: jax.Array) -> jax.Array:
    weight = weight.astype(x.dtype)
    if math.prod(x.shape[:-1]) <= _FEW_ROWS:
        out = jax.lax.platform_dependent(x, weight, cpu=_weight_first, default=_rows_first)
    else:
        out = _rows_first(x, weight)
    return checkpoint_name(out, PRODUCT)


def _rows_first(x: jax.Array, weight: jax.Array) -> jax.Array:
    return _contract(x, weight, (x.ndim - 1,), (1,)).astype(x.dtype)


def _weight_first(x: jax.Array, weight: jax.Array) -> jax.Array:
    """XLA:CPU streams the left side of a product at memory speed; as the right side a weight takes 5 to 10 times longer."""
    rows = x.reshape(-1, x.shape[-1])
    count = rows.shape[0]
    if count == 1:  # a product with one row becomes a loop, at a third of the speed
        rows = jnp.concatenate([rows, rows])
    out = _contract(weight, rows, (1,), (1,)).astype(x.dtype)
    # Without the barrier XLA folds the transpose into the product and puts the rows first again.
    return jax.lax.optimization_barrier(out).T[:count].reshape(*x.shape[:-1], weight.shape[0])


def _dot_fwd(x: jax.Array, weight: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return _product(x, weight), (x, weight)


def dot_gradients(saved: tuple[jax.Array, jax.Array], grad: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Of x and weight, given both and the gradient of `dot`."""
    x, weight = saved
    dx = _contract(grad, weight.astype(x.dtype), (grad.ndim - 1,), (0,)).astype(x.dtype)
    dweight = jax.lax.platform_dependent(x, grad, cpu=_outer_on_cpu, default=_outer)
    return dx, dweight.astype(weight.dtype)


def _outer(x: jax.Array, grad: jax.Array) -> jax.Array:
    """The gradient of the weight, `[out, in]`, in float32."""
    rows = tuple(range(x.ndim - 1))
    return _contract(grad, x, rows, rows)


def _outer_on_cpu(x: jax.Array, grad: jax.Array) -> jax.Array:
    """XLA:CPU transposes the left side, slowly where it is fused with what made it: let that be the narrower one."""
    if grad.shape[-1] <= x.shape[-1]:
        return _outer(x, grad)
    # Without the barrier XLA folds the transpose into the product and has grad on the left again.
    return jax.lax.optimization_barrier(_outer(grad, x)).T


dot.defvjp(_dot_fwd, dot_gradients)


@jax.custom_vjp
def dot_rounding_parts(x: jax.Array, weight: jax.Array) -> jax.Array:
    """As `dot`, but where the summed axis is split over devices each rounds its part of a sum to x's dtype before the parts
    travel and add up: half the bytes in bfloat16."""
    return _contract(x, weight.astype(x.dtype), (x.ndim - 1,), (1,), x.dtype)


def _dot_rounding_parts_fwd(x: jax.Array, weight: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return dot_rounding_parts(x, weight), (x, weight)


dot_rounding_parts.defvjp(_dot_rounding_parts_fwd, dot_gradients)


class Adapter(nnx.Module):
    """scale * b @ a, added to a matrix `[..., out, in]` (LoRA, arXiv 2106.09685); float32 a `[..., r, in]`, b `[..., out, r]`."""

    def __init__(self, a: nnx.Param[jax.Array], b: nnx.Param[jax.Array], scale: float):
        self.a, self.b, self.scale = a, b, scale

    def __call__(self, x: jax.Array) -> jax.Array:
        """x `[..., in]` -> `[..., out]`: the matrix itself is never made, nor its gradient."""
        return self.scale * dot(dot(x, self.a[...]), self.b[...])

    def added_to(self, weight: jax.Array) -> jax.Array:
        """The adapted matrices `[..., out, in]` in float32."""
        change = jnp.matmul(self.b[...], self.a[...], precision=jax.lax.Precision.HIGHEST)
        return weight.astype(jnp.float32) + self.scale * change


class Linear(nnx.Module):
    """y = x @ weight.T, without bias: no EXAONE language model has one. weight `[out, in]`, as Hugging Face has it."""

    adapter: Adapter | None = None

    def __init__(self, make: ParamFactory, features_in: int, features_out: int, axes: Axes):
        self.weight = make.normal((features_out, features_in), axes)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.adapted(x, dot(x, self.weight[...]))

    def adapted(self, x: jax.Array, out: jax.Array) -> jax.Array:
        """The product of x, given that with the weight alone."""
        return out if self.adapter is None else out + self.adapter(x)
