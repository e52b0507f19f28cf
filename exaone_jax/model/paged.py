"""The paged cache: keys and values of every layer in pages, and the rows of a flat token axis that read and write them.

Layers of one window are a group and share a page table. Nobody writes a page in place of another: a window layer's table
is narrow because its sequence lets go of pages that the window has left, so pages may be shared and kept.
"""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from exaone_jax.config.model import LayerSpec, ModelConfig, Segment
from exaone_jax.model.cache import PagedKV, Zeros
from exaone_jax.model.placement import Placement
from pallas_kernels.paged_attention import QUANTIZED, paged_attention

PAGES_AXES = ("layers", "pages", "kv_heads", "slots", "head_dim")
Window = int | None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PagedCache:
    """layers: as KVCache has them, in pages.

    mtp: the MTP layer's, where drafts are wanted: its entry p is of the hidden state of position p and the token after.
    """

    layers: tuple[tuple[PagedKV, ...], ...]
    mtp: PagedKV | None


def groups(config: ModelConfig, *, mtp: bool) -> dict[Window, int]:
    """How many layers have each window, global layers (None) first; with `mtp` the MTP layer is one of them."""
    specs = [*config.layers, *([config.mtp_layer] if mtp and config.mtp_layer is not None else [])]
    windows = sorted({spec.window for spec in specs}, key=lambda window: (window is not None, window or 0))
    return {window: sum(spec.window == window for spec in specs) for window in windows}


def init_paged_cache(
    config: ModelConfig,
    plan: Sequence[Segment],
    mtp: Segment | None,
    pages: dict[Window, int],
    page_size: int,
    dtype: jax.typing.DTypeLike,
    zeros: Zeros,
) -> PagedCache:
    """Empty pages. pages: how many each group has. zeros: makes an array of a shape and dtype, laid out by its logical axes."""

    def layer(spec: LayerSpec, repeats: int) -> PagedKV:
        shape = (repeats, pages[spec.window], config.num_kv_heads, page_size, config.head_dim)
        k, v = (zeros(shape, dtype, PAGES_AXES) for _ in range(2))
        if k.dtype not in QUANTIZED:
            return PagedKV(k, v)
        return PagedKV(k, v, *(zeros(shape[:-1], jnp.float32, PAGES_AXES[:-1]) for _ in range(2)))

    layers = tuple(tuple(layer(spec, segment.repeats) for spec in segment.pattern) for segment in plan)
    return PagedCache(layers, None if mtp is None else layer(mtp.pattern[0], mtp.repeats))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Rows:
    """N rows of a flat token axis, those of A sequences one after the other; rows past the last belong to nobody.

    tables: int32 `[A, M]` for each of `windows`: position p of sequence a lives in page `table[a, (p // page_size) % M]`.
    starts: int32 `[A + 1]`, the first row of each sequence. lengths: int32 `[A]`, positions up to its last row.
    sequence, positions: int32 `[N]`; real: bool `[N]`, rows whose keys and values are written.
    """

    tables: tuple[jax.Array, ...]
    starts: jax.Array
    lengths: jax.Array
    sequence: jax.Array
    positions: jax.Array
    real: jax.Array
    windows: tuple[Window, ...] = dataclasses.field(metadata={"static": True})

    @classmethod
    def of(
        cls, tables: tuple[jax.Array, ...], windows: tuple[Window, ...], starts: jax.Array, first: jax.Array, count: int
    ) -> "Rows":
        """`count` rows, where the first row of each sequence is at position `first` (int32 `[A]`)."""
        row, ends = jnp.arange(count, dtype=jnp.int32), starts[1:]
        sequence = jnp.searchsorted(ends, row, side="right", method="compare_all").astype(jnp.int32)
        sequence = jnp.minimum(sequence, len(first) - 1)
        positions = first[sequence] + row - starts[sequence]
        return cls(tables, starts, first + jnp.diff(starts), sequence, positions, row < starts[-1], windows)

    def only(self, real: jax.Array) -> "Rows":
        """The same rows, of which only these (bool `[N]`) are written as well."""
        return dataclasses.replace(self, real=self.real & real)


@dataclasses.dataclass
class Paged:
    """Attention of rows to the pages of their sequences, into which their own keys and values go first; holds the updated
    layer afterwards.

    layer: PagedKV stacked `[R, P, …]`, of which `index` is this layer's.
    """

    layer: PagedKV
    index: jax.typing.ArrayLike
    rows: Rows
    placement: Placement

    def __call__(self, q: jax.Array, k: jax.Array, v: jax.Array, window: Window) -> jax.Array:
        """q `[1, N, H, head_dim]`, k and v `[1, N, K, head_dim]`."""
        rows = self.rows
        table = rows.tables[rows.windows.index(window)]
        where = (self.index, table, rows.starts, rows.lengths, rows.sequence, rows.positions, rows.real)

        def run(layer: PagedKV, qkv: tuple[jax.Array, ...], *where: jax.Array) -> tuple[jax.Array, PagedKV]:
            return _attend(window, layer, qkv, *where)

        out, self.layer = self.placement.attend_paged(run, self.layer, (q, k, v), where)
        return out


def _attend(
    window: Window,
    layer: PagedKV,
    qkv: tuple[jax.Array, ...],
    index: jax.Array,
    table: jax.Array,
    starts: jax.Array,
    lengths: jax.Array,
    sequence: jax.Array,
    positions: jax.Array,
    real: jax.Array,
) -> tuple[jax.Array, PagedKV]:
    """All layers of the stack are one array of pages, so that none is copied out of it: page n of layer r is r * P + n."""
    q, k, v = (x[0] for x in qkv)
    shape = layer.k.shape
    pages, slots = shape[1], shape[3]
    page = index * pages + table[sequence, (positions // slots) % table.shape[1]]
    out_of_range = shape[0] * pages  # dropped by the scatter
    page, slot = jnp.where(real, page, out_of_range), positions % slots
    if len(page) == 1:  # XLA makes of a scatter of one row a choice between two copies of all pages
        page, slot = jnp.append(page, out_of_range), jnp.append(slot, 0)

    def written(stacked: jax.Array, new: jax.Array) -> jax.Array:
        flat, new = stacked.reshape(-1, *stacked.shape[2:]), new.astype(stacked.dtype)
        new = jnp.concatenate([new, new]) if len(new) == 1 else new
        return flat.at[page, :, slot].set(new, mode="drop")

    new = PagedKV(k, v)
    if layer.k_scales is not None:
        (k, k_scales), (v, v_scales) = (quantized(x, layer.k.dtype) for x in (k, v))
        new = PagedKV(k, v, k_scales, v_scales)
    flat = jax.tree.map(written, layer, new)
    out = paged_attention(
        q,
        flat.k,
        flat.v,
        (table + index * pages).astype(jnp.int32),
        starts,
        lengths,
        window=window,
        k_scales=flat.k_scales,
        v_scales=flat.v_scales,
    )
    return out[None], jax.tree.map(lambda x, like: x.reshape(like.shape), flat, layer)


def quantized(x: jax.Array, dtype: jax.typing.DTypeLike) -> tuple[jax.Array, jax.Array]:
    """x `[…, D]` in int8 or float8_e4m3fn, and the float32 `[…]` to multiply it by: the greatest magnitude is the dtype's.

    What is not finite gives a scale that is not.
    """
    integer = jnp.issubdtype(dtype, jnp.integer)
    most = float(jnp.iinfo(dtype).max if integer else jnp.finfo(dtype).max)
    x = x.astype(jnp.float32)
    scale = jnp.max(jnp.abs(x), axis=-1) / most
    scaled = x / jnp.where(scale == 0, 1.0, scale)[..., None]
    return (jnp.round(scaled) if integer else scaled).astype(dtype), scale
