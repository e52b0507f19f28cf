"""Where a model's activations lie and its parts compute. The model asks, by logical axes; here is the answer of one device,
and `exaone_jax.parallel` has that of a mesh."""

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol, TypeVar

import jax
import jax.numpy as jnp

from exaone_jax.model.cache import LayerKV, PagedKV
from exaone_jax.model.linear import Axes, dot
from exaone_jax.model.narrow import Narrow, narrow_dot
from pallas_kernels.attention import attention

if TYPE_CHECKING:
    from exaone_jax.model.moe import Experts, Routing

T = TypeVar("T")
ACTIVATIONS: Axes = ("batch", "sequence", "features")  # of `[B, T, D]`

# (layer, index, lengths, valid, q, k, v) -> (attention's result, the layer with the new keys and values)
CachedAttention = Callable[..., tuple[jax.Array, LayerKV]]
PagedAttention = Callable[..., tuple[jax.Array, PagedKV]]  # (layer, (q, k, v), *where)


class Placement(Protocol):
    """Hashable: a model's graph holds it. Every method computes what `OneDevice` computes."""

    def constrain(self, x: jax.Array, axes: Axes) -> jax.Array:
        """x, laid out by its logical axes."""
        ...

    def embed(self, table: jax.Array, tokens: jax.Array, dtype: jax.typing.DTypeLike) -> jax.Array:
        """Rows of a table `[V, D]` for tokens int32 `[B, T]` -> `[B, T, D]` of this dtype."""
        ...

    def zeros(self, shape: tuple[int, ...], dtype: jax.typing.DTypeLike, axes: Axes) -> jax.Array:
        """An array of zeros, laid out so from the start."""
        ...

    def attend(
        self, q: jax.Array, k: jax.Array, v: jax.Array, segment_ids: jax.Array | None, window: int | None
    ) -> jax.Array:
        """Causal attention inside rows: q `[B, T, H, head_dim]`, k and v `[B, T, K, head_dim]`, segment_ids `[B, T]`."""
        ...

    def attend_cached(
        self,
        run: CachedAttention,
        layer: LayerKV,
        index: jax.typing.ArrayLike,
        lengths: jax.Array,
        valid: jax.Array,
        qkv: tuple[jax.Array, jax.Array, jax.Array],
    ) -> tuple[jax.Array, LayerKV]:
        """`run` of its arguments: layer `[R, B, K, slots, head_dim]`, lengths and valid `[B]`, q `[B, C, H, head_dim]`."""
        ...

    def attend_paged(
        self,
        run: PagedAttention,
        layer: PagedKV,
        qkv: tuple[jax.Array, jax.Array, jax.Array],
        where: tuple[jax.typing.ArrayLike, ...],
    ) -> tuple[jax.Array, PagedKV]:
        """`run(layer, qkv, *where)`: layer `[R, P, K, page_size, head_dim]`, q `[1, N, H, head_dim]`; `where` is of all heads."""
        ...

    def per_token(
        self, run: Callable[..., T], each: tuple[jax.Array, ...], whole: tuple[tuple[jax.Array, Axes], ...] = ()
    ) -> T:
        """`run(*each, *whole)` -> arrays `[B, T, ...]`; a token of them depends on its own of each `[B, T, ...]` and on whole:
        parameters with their axes, which `run` uses in the dtype of the first of each."""
        ...

    def project(self, x: jax.Array, weights: tuple[jax.Array, ...], axes: tuple[str, ...]) -> tuple[jax.Array, ...]:
        """`dot(x, weight)` for each of several weights `[out, in]`, of which each out is a logical axis."""
        ...

    def contract(self, x: jax.Array, weight: jax.Array, axis: str) -> jax.Array:
        """`dot(x, weight)` for a weight `[out, in]` of which `in` is a logical axis."""
        ...

    def over_vocab(self, run: Callable[..., jax.Array], each: tuple[jax.Array, ...], table: jax.Array) -> jax.Array:
        """`run(*each, table, axis)` -> `[B, T, ...]` as `per_token`; run sees a part of the table `[V, D]`, its words in the
        order of the mesh axis `axis`, or all of it and axis None, with values of the dtype of the first of each."""
        ...

    def answer(self, experts: "Experts", x: jax.Array, routing: "Routing") -> jax.Array:
        """The weighted answers of each token's experts: x `[B, T, D]`, routing `[B, T, ...]` -> `[B, T, D]`."""
        ...


@dataclasses.dataclass(frozen=True)
class OneDevice:
    """Everything on the default device. narrow: what the layers' products are made in; None: in the dtype of the activations."""

    narrow: Narrow | None = None

    def constrain(self, x: jax.Array, axes: Axes) -> jax.Array:
        return x

    def embed(self, table: jax.Array, tokens: jax.Array, dtype: jax.typing.DTypeLike) -> jax.Array:
        return table[tokens].astype(dtype)

    def zeros(self, shape: tuple[int, ...], dtype: jax.typing.DTypeLike, axes: Axes) -> jax.Array:
        return jnp.zeros(shape, dtype)

    def attend(
        self, q: jax.Array, k: jax.Array, v: jax.Array, segment_ids: jax.Array | None, window: int | None
    ) -> jax.Array:
        return attention(q, k, v, window=window, segment_ids=segment_ids)

    def attend_cached(
        self,
        run: CachedAttention,
        layer: LayerKV,
        index: jax.typing.ArrayLike,
        lengths: jax.Array,
        valid: jax.Array,
        qkv: tuple[jax.Array, jax.Array, jax.Array],
    ) -> tuple[jax.Array, LayerKV]:
        return run(layer, index, lengths, valid, *qkv)

    def attend_paged(
        self,
        run: PagedAttention,
        layer: PagedKV,
        qkv: tuple[jax.Array, jax.Array, jax.Array],
        where: tuple[jax.typing.ArrayLike, ...],
    ) -> tuple[jax.Array, PagedKV]:
        return run(layer, qkv, *where)

    def per_token(
        self, run: Callable[..., T], each: tuple[jax.Array, ...], whole: tuple[tuple[jax.Array, Axes], ...] = ()
    ) -> T:
        return run(*each, *(array for array, _ in whole))

    def project(self, x: jax.Array, weights: tuple[jax.Array, ...], axes: tuple[str, ...]) -> tuple[jax.Array, ...]:
        return tuple(self.contract(x, weight, axis) for weight, axis in zip(weights, axes, strict=True))

    def contract(self, x: jax.Array, weight: jax.Array, axis: str) -> jax.Array:
        return dot(x, weight) if self.narrow is None else narrow_dot(x, weight, self.narrow)

    def over_vocab(self, run: Callable[..., jax.Array], each: tuple[jax.Array, ...], table: jax.Array) -> jax.Array:
        return run(*each, table, None)

    def answer(self, experts: "Experts", x: jax.Array, routing: "Routing") -> jax.Array:
        tokens, routing = jax.tree.map(lambda a: a.reshape(-1, a.shape[-1]), (x, routing))
        return experts.answer(experts.weights, tokens, routing, self.narrow).astype(x.dtype).reshape(x.shape)


ONE_DEVICE = OneDevice()
