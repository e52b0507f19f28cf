"""Paged attention on TPU: what the kernel serves, its layout, and its static plan. The kernel itself is `tpu_kernel.py`."""

import functools

import jax
import jax.numpy as jnp
from jax import Array

from pallas_kernels.attention.tpu import device_kind
from pallas_kernels.attention.tpu_tiles import TILE, ceil_to
from pallas_kernels.paged_attention import tpu_kernel
from pallas_kernels.paged_attention.pages import Pages, few_rows, make_items, pages_of_block, rows_of_sequences
from pallas_kernels.paged_attention.tuned import Tiles, tiles

HEAD_DIMS = (64, 80, 128)
_MAX_GROUP = 16  # a tile of scores holds the rows of every head of the group
_MAX_TABLE = 2**17  # entries: the table stands in scalar memory, of which there is 1 MiB
_MAX_PAGE = 1024
_ROWS_BYTES = 2**24  # of on-chip memory for the rows of two items' queries and one's results


def unsupported(q: Array | None = None, pages: Pages | None = None, *, interpret: bool = False) -> str | None:
    """Returns why this implementation cannot serve a call, or None if it can. Without arrays: any call at all."""
    if not interpret and device_kind() is None:
        return (
            "there is no TPU here; interpret=True runs the kernel on any backend, and a compile ahead of time "
            "needs jax.set_mesh with a mesh of the TPU topology's devices"
        )
    if q is None or pages is None:
        return None
    if q.dtype == jnp.float16:
        return "the TPU kernel takes bfloat16 and float32 queries, and these are float16"
    if q.shape[2] not in HEAD_DIMS:
        return f"the TPU kernel takes head dimensions {HEAD_DIMS}, and this is {q.shape[2]}"
    if q.shape[1] // pages.k.shape[1] > _MAX_GROUP:
        return f"the TPU kernel takes at most {_MAX_GROUP} query heads on a kv head, and this is {q.shape[1] // pages.k.shape[1]}"
    least, size = 32 // pages.k.dtype.itemsize, pages.page_size  # rows of a tile in memory
    if size % least or (TILE % size and size % TILE) or size > _MAX_PAGE:
        return (
            f"the TPU kernel takes {pages.k.dtype} pages of {least} to {_MAX_PAGE} slots that divide {TILE} or are a multiple "
            f"of it, and these have {size}"
        )
    if pages.table.size > _MAX_TABLE:
        return (
            f"the TPU kernel takes page tables of at most {_MAX_TABLE} entries, and this is {pages.table.shape}: "
            "larger pages make it smaller"
        )
    return None


def make_plan(
    num_rows: int, group: int, pages: Pages, window: int | None, scale: float, sizes: Tiles, interpret: bool
) -> tpu_kernel.Plan:
    kv_heads, page_size, head_dim = pages.k.shape[1:]
    width = pages.table.shape[1]
    few = few_rows(num_rows, pages.table.shape[0])
    most = _ROWS_BYTES // (3 * 4 * kv_heads * ceil_to(group, 8) * ceil_to(head_dim, TILE)) // 16 * 16
    many = max(few, 16, min(sizes.rows, most, ceil_to(num_rows, 16))) if num_rows > few else few
    most = sizes.block_bytes // (2 * kv_heads * ceil_to(head_dim, TILE) * pages.k.dtype.itemsize)
    unit = max(TILE, page_size)  # whole pages and whole registers
    keys = pages_of_block(pages, window, few, min(sizes.block, most)) * page_size
    keys = max(unit, min(ceil_to(keys, unit), most // unit * unit))
    tile = max(unit, min(sizes.keys, keys) // unit * unit)
    return tpu_kernel.Plan(window, scale, group, page_size, width, few, many, tile, ceil_to(keys, tile), interpret)


@functools.partial(jax.jit, static_argnames=("window", "scale", "interpret"))
def paged_attention(
    q: Array, pages: Pages, query_starts: Array, lengths: Array, *, window: int | None, scale: float, interpret: bool
) -> Array:
    """Returns [N, H, D] in q's dtype. Arguments as `api.paged_attention`, already checked."""
    num_rows, num_heads, head_dim = q.shape
    kv_heads = pages.k.shape[1]
    group = num_heads // kv_heads
    plan = make_plan(num_rows, group, pages, window, scale, tiles(device_kind() or "", group, head_dim), interpret)
    items, count = make_items(pages, query_starts, lengths, num_rows, plan.many, window)
    # A number out of range must not become an address.
    pages = pages._replace(table=jnp.clip(pages.table, 0, pages.k.shape[0] - 1))
    # Float32, and the heads of a group in whole registers: rows may then start anywhere, and move one by one.
    rows = q.reshape(num_rows, kv_heads, group, head_dim).astype(jnp.float32)
    rows = jnp.pad(rows, ((0, 0), (0, 0), (0, -group % 8), (0, 0)))
    out = tpu_kernel.paged_attention(plan, items, count, rows, pages, q.dtype)
    out = out[:, :, :group].reshape(q.shape).astype(q.dtype)
    return jnp.where(rows_of_sequences(query_starts, num_rows)[:, None, None], out, 0)
