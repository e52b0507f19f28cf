"""The one public function of paged attention: it checks its input, picks an implementation and runs it."""

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from pallas_kernels._select import choose, not_pallas
from pallas_kernels.paged_attention import gpu, reference, tpu, xla
from pallas_kernels.paged_attention.pages import Pages

QUANTIZED = (jnp.dtype(jnp.int8), jnp.dtype(jnp.float8_e4m3fn))


def paged_attention(
    q: Array,
    k_pages: Array,
    v_pages: Array,
    page_table: Array,
    query_starts: Array,
    lengths: Array,
    *,
    window: int | None = None,
    scale: float | None = None,
    k_scales: Array | None = None,
    v_scales: Array | None = None,
    implementation: str | None = None,
    interpret: bool = False,
) -> Array:
    """Grouped-query causal attention of ragged queries to the pages of their sequences; forward only.

    Sequence s owns rows `query_starts[s] .. query_starts[s + 1]` of the flat axis: one row to decode, k + 1 rows to
    verify k drafts, a chunk to prefill, or none. Its last row sits at position `lengths[s] - 1`, the others before it,
    so the rows' own keys must be in their pages already. The row at position p sees the held keys j with `0 <= p - j`
    and, under a window, `p - j < window` (W keys, self included). Query head h reads kv head `h // (H / K)`.

    Position p lives in page `page_table[s, (p // page_size) % M]`, slot `p % page_size`: the table wraps, so a
    sequence holds its last `M * page_size` positions. A table wide enough for the context never wraps; a narrow one is
    a ring, with position p in slot p mod (M * page_size). A ring keeps all that a window needs if `M * page_size >=
    window - 1 +` the sequence's rows. Sequences may share pages.

    A row that sees nothing (its sequence has length 0, or fewer positions than rows) gives zeros, and so do rows of no
    sequence. A slot that no row of its sequence sees may hold anything, NaN included, and a table entry whose page no
    row of the sequence sees may be any number. The softmax is float32; float32 queries are multiplied in full float32.

    Only shapes are static: `query_starts`, `lengths` and `page_table` are data, so one compile serves every mix. Their
    values are not checked. On several devices call it inside `shard_map`.

    Args:
      q: float32, bfloat16 or float16 [N, H, D].
      k_pages, v_pages: [P, K, page_size, D], K divides H; q's dtype, or int8 or float8_e4m3fn with scales.
      page_table: int32 [S, M].
      query_starts: int32 [S + 1], not decreasing, from 0; rows past the last entry belong to no sequence.
      lengths: int32 [S], the positions of each sequence so far, this call's rows included.
      window: None, or how many keys a query sees at most, itself included; >= 1.
      scale: default `D ** -0.5`.
      k_scales, v_scales: float32 [P, K, page_size], what each slot's row is to be multiplied by. For int8 and
        float8_e4m3fn pages, and only for them.
      implementation: "reference", "xla", "tpu", "gpu", or None to choose (see `choose_implementation`).
      interpret: run a Pallas implementation in its interpreter; the others refuse it.

    Returns:
      [N, H, D] in q's dtype.

    Raises:
      ValueError: shapes, window, or an unknown implementation. TypeError: dtypes.
      NotImplementedError: the named implementation cannot serve this call; the message says why.
    """
    pages = Pages(k_pages, v_pages, k_scales, v_scales, page_table)
    _check_arrays(q, pages)
    _check_sequences(page_table, query_starts, lengths)
    window = _check_window(window)
    name = _choose(implementation, interpret, q, pages)
    factor = q.shape[-1] ** -0.5 if scale is None else float(scale)
    sequences = (jnp.asarray(query_starts, jnp.int32), jnp.asarray(lengths, jnp.int32))
    pages = pages._replace(table=jnp.asarray(page_table, jnp.int32))
    if name in ("tpu", "gpu"):
        kernel = tpu.paged_attention if name == "tpu" else gpu.paged_attention
        return kernel(q, pages, *sequences, window=window, scale=factor, interpret=interpret)
    run = reference.paged_attention if name == "reference" else xla.paged_attention
    return run(q, pages, *sequences, window=window, scale=factor)


def choose_implementation(implementation: str | None = None, *, interpret: bool = False) -> str:
    """Returns the implementation that `paged_attention(..., implementation=implementation, interpret=interpret)` would run.

    That is for a call that the backend's own kernel serves; `tpu.unsupported` and `gpu.unsupported` say which it does not.

    Raises as `paged_attention` does where none can.
    """
    return _choose(implementation, interpret)


def _choose(implementation: str | None, interpret: bool, q: Array | None = None, pages: Pages | None = None) -> str:
    plain = not_pallas(interpret)
    reasons = {
        "reference": plain,
        "xla": plain,
        "tpu": tpu.unsupported(q, pages, interpret=interpret),
        "gpu": gpu.unsupported(q, pages, interpret=interpret, named=implementation is not None),
    }
    return choose("paged_attention", implementation, reasons)


def _check_arrays(q: Array, pages: Pages) -> None:
    k, v = pages.k, pages.v
    for name, x, form in (
        ("q", q, "[N, H, D]"),
        ("k_pages", k, "[P, K, page_size, D]"),
        ("v_pages", v, "k_pages' shape"),
    ):
        if x.ndim != (3 if name == "q" else 4) or 0 in x.shape:
            raise ValueError(f"paged_attention: {name} must be {form} without an empty dimension, found {x.shape}")
    if k.shape != v.shape:
        raise ValueError(f"paged_attention: k_pages and v_pages must have one shape, found {k.shape} and {v.shape}")
    if q.shape[2] != k.shape[3]:
        raise ValueError(f"paged_attention: q {q.shape} and k_pages {k.shape} differ in the head dimension")
    if q.shape[1] % k.shape[1]:
        raise ValueError(f"paged_attention: {k.shape[1]} kv heads do not divide {q.shape[1]} query heads")
    if q.dtype not in (jnp.float32, jnp.bfloat16, jnp.float16):
        raise TypeError(f"paged_attention: q must be float32, bfloat16 or float16, found {q.dtype}")
    if k.dtype != v.dtype or k.dtype not in (q.dtype, *QUANTIZED):
        raise TypeError(
            f"paged_attention: k_pages and v_pages must have q's dtype {q.dtype}, or int8 or float8_e4m3fn; "
            f"found {k.dtype} and {v.dtype}"
        )
    for name, scales in (("k_scales", pages.k_scales), ("v_scales", pages.v_scales)):
        if (scales is None) != (k.dtype not in QUANTIZED):
            raise ValueError(
                f"paged_attention: {name} belong to int8 and float8_e4m3fn pages and only to them; the pages are {k.dtype} "
                f"and {name} {'are missing' if scales is None else 'are given'}"
            )
        if scales is not None and scales.shape != k.shape[:3]:
            raise ValueError(f"paged_attention: {name} must have shape {k.shape[:3]}, found {scales.shape}")
        if scales is not None and scales.dtype != jnp.float32:
            raise TypeError(f"paged_attention: {name} must be float32, found {scales.dtype}")


def _check_sequences(page_table: Array, query_starts: Array, lengths: Array) -> None:
    named = {"page_table": page_table, "query_starts": query_starts, "lengths": lengths}
    for name, x in named.items():
        if not isinstance(x, jax.Array | np.ndarray) or x.dtype != jnp.int32:
            raise TypeError(f"paged_attention: {name} must be an int32 array, found {getattr(x, 'dtype', type(x))}")
    if page_table.ndim != 2 or 0 in page_table.shape:
        raise ValueError(f"paged_attention: page_table must be [S, M], both at least 1, found {page_table.shape}")
    sequences = page_table.shape[0]
    for name, wanted in (("query_starts", (sequences + 1,)), ("lengths", (sequences,))):
        if named[name].shape != wanted:
            raise ValueError(
                f"paged_attention: {name} must have shape {wanted} beside page_table {page_table.shape}, "
                f"found {named[name].shape}"
            )


def _check_window(window: int | None) -> int | None:
    if window is None:
        return None
    if isinstance(window, bool) or not isinstance(window, int | np.integer):
        raise TypeError(f"paged_attention: window must be None or an int, found {window!r}")
    if window < 1:
        raise ValueError(f"paged_attention: window counts the query itself, so it must be >= 1, found {window}")
    return int(window)
