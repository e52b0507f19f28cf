"""What the implementations share: the pages of a call, and its rows cut into items of work."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental.layout import Format, Layout


class Pages(NamedTuple):
    """The cache of one call: k and v [P, K, page_size, D], scales float32 [P, K, page_size] or None, table int32 [S, M]."""

    k: Array
    v: Array
    k_scales: Array | None
    v_scales: Array | None
    table: Array

    @property
    def page_size(self) -> int:
        return self.k.shape[2]

    @property
    def slots(self) -> int:
        """Positions that a sequence can hold."""
        return self.table.shape[1] * self.page_size


def pool_format(sharding: jax.sharding.Sharding, rank: int = 4) -> Format:
    """The format to allocate a pool of pages with (`rank` 4), or their scales (3): row-major, as the TPU kernel reads it.

    Below a head dimension of 128 XLA's own choice for a TPU is another one, and it would copy the pool at every call.
    Allocate with `jax.jit(make_pool, out_shardings=pool_format(sharding))`, and give it as the in and out sharding of a
    step that donates the pool and returns it. On CPU and GPU it is the format that arrays have anyway.
    """
    return Format(Layout(tuple(range(rank))), sharding)


class Items(NamedTuple):
    """Consecutive rows of one sequence each, in the order of the flat axis; all int32 [I], the first `count` of them real."""

    sequence: Array
    first: Array  # row of the flat axis
    rows: Array
    position: Array  # of the first row; negative where the sequence has fewer positions than rows
    low: Array  # the first key that any of the rows sees
    high: Array  # one past the last; at most `low` where they see none


def row_starts(query_starts: Array, num_rows: int) -> Array:
    """int32 [S + 1] inside 0 .. N and not decreasing, whatever the caller's values are."""
    return jax.lax.cummax(jnp.clip(query_starts, 0, num_rows))


def rows_of_sequences(query_starts: Array, num_rows: int) -> Array:
    """bool [N]: whether the row belongs to any sequence."""
    starts, row = row_starts(query_starts, num_rows), jnp.arange(num_rows)
    return (starts[0] <= row) & (row < starts[-1])


def make_items(
    pages: Pages, query_starts: Array, lengths: Array, num_rows: int, most: int, window: int | None
) -> tuple[Items, Array]:
    """Returns (items of at most `most` rows, their int32 count). Their number is bounded by S + N // most, and by N."""
    starts = row_starts(query_starts, num_rows)
    rows = jnp.diff(starts)
    ends = jnp.cumsum(-(-rows // most))  # one past each sequence's last item
    index = jnp.arange(min(num_rows, rows.shape[0] + num_rows // most), dtype=jnp.int32)
    sequence = jnp.minimum(jnp.searchsorted(ends, index, side="right", method="compare_all"), rows.shape[0] - 1).astype(
        jnp.int32
    )
    part = index - (ends - -(-rows // most))[sequence]
    first = starts[sequence] + part * most
    length = jnp.maximum(lengths, 0)[sequence]
    position = length - rows[sequence] + part * most
    taken = jnp.clip(starts[sequence + 1] - first, 0, most)
    low = jnp.maximum(length - pages.slots, 0)
    if window is not None:
        low = jnp.maximum(low, position - window + 1)
    return Items(sequence, first, taken, position, low, position + taken), ends[-1]


def pages_of_block(pages: Pages, window: int | None, rows: int, keys: int) -> int:
    """Pages to take at once: about `keys` keys, and no more than `rows` consecutive queries can see."""
    most = max(1, keys // pages.page_size)
    seen = pages.slots if window is None else min(pages.slots, window + rows - 1)
    return min(most, -(-(seen - 1) // pages.page_size) + 1)


def few_rows(num_rows: int, num_sequences: int) -> int:
    """Rows that a sequence has where all have as many: what the path for short items is built for; 8 at most."""
    return min(8, -(-num_rows // num_sequences))
