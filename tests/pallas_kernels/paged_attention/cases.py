"""Random calls of paged attention, and the definition once more in float64 numpy."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.paged_attention import paged_attention, tpu

# float32: two orders of summing at most ~600 products of O(1) numbers; measured at most 2e-6.
FP32_ERROR = 2e-5


@dataclasses.dataclass
class Case:
    """A call, and the keys and values [length, K, D] float64 of each sequence that went into its pages."""

    q: jnp.ndarray
    arrays: dict
    keys: list
    values: list

    def call(self, **kwargs):
        return {"q": self.q, **self.arrays, **kwargs}


def _call(q, arrays, implementation, window, scale):
    interpret = implementation in ("tpu", "gpu")
    return paged_attention(q, **arrays, window=window, scale=scale, implementation=implementation, interpret=interpret)


_static = ("implementation", "window", "scale")
_plain = jax.jit(_call, static_argnames=_static)
# Interpreted kernels are long programs that run once: XLA's optimiser would cost more than it saves.
_interpreted = jax.jit(_call, static_argnames=_static, compiler_options={"xla_backend_optimization_level": 0})


def run(case, implementation, window=None, scale=None):
    """The result in float32 numpy; the Pallas kernels in their interpreter."""
    jitted = _interpreted if implementation in ("tpu", "gpu") else _plain
    return np.asarray(jitted(case.q, case.arrays, implementation, window, scale), np.float32)


def forget_compiles():
    """For tests that change what a compile reads."""
    for cached in (_interpreted, tpu.paged_attention):
        cached.clear_cache()


def quantized(x, dtype):
    """(x as dtype, scales [...]), one scale a row of the last axis."""
    largest = 127.0 if dtype == jnp.int8 else 448.0
    scales = np.abs(x).max(-1) / largest + 1e-9
    scaled = x / scales[..., None]
    stored = np.round(scaled) if dtype == jnp.int8 else scaled
    return np.asarray(stored, np.float32).astype(dtype), scales.astype(np.float32)


def make_case(
    seed, sequences, heads, dim, page_size, *, table_width, dtype=jnp.float32, kv_dtype=None, num_rows=None, window=None,
    poison=True, num_pages=None,
):  # fmt: skip
    """`sequences` is [(length, rows)]. With `poison` all that no row may see is NaN: slots, scales, and numbers of pages."""
    rng = np.random.default_rng(seed)
    num_heads, kv_heads = heads
    rows = np.array([r for _, r in sequences])
    num_rows = int(rows.sum()) + 3 if num_rows is None else num_rows
    num_pages = len(sequences) * table_width + 2 if num_pages is None else num_pages
    table = rng.permutation(num_pages)[: len(sequences) * table_width].reshape(len(sequences), table_width)
    bad = np.nan if poison else 0.0
    pages = np.full((2, num_pages, kv_heads, page_size, dim), bad, np.float32)
    keys, values, used = [], [], np.zeros(num_pages, bool)
    for s, (length, count) in enumerate(sequences):
        kv = np.asarray(jnp.asarray(rng.normal(size=(2, length, kv_heads, dim)), dtype), np.float32)
        oldest = max(0, length - table_width * page_size)
        if window is not None and poison:
            oldest = max(oldest, length - count - window + 1)
        for p in range(oldest, length if count else 0):
            page = table[s, (p // page_size) % table_width]
            pages[:, page, :, p % page_size] = kv[:, p]
            used[page] = True
        keys.append(kv[0])
        values.append(kv[1])
    q = jnp.asarray(rng.normal(size=(num_rows, num_heads, dim)), dtype)
    if poison:
        table = np.where(used[table], table, rng.choice([-7, num_pages + 5, 2**30], table.shape))
    arrays = {"page_table": jnp.asarray(table, jnp.int32)}
    arrays["query_starts"] = jnp.asarray(np.r_[0, np.cumsum(rows)], jnp.int32)
    arrays["lengths"] = jnp.asarray([length for length, _ in sequences], jnp.int32)
    if kv_dtype is None:
        arrays |= {"k_pages": jnp.asarray(pages[0], dtype), "v_pages": jnp.asarray(pages[1], dtype)}
    else:
        for name, x in (("k", pages[0]), ("v", pages[1])):
            unseen = np.isnan(x)
            stored, scales = quantized(np.where(unseen, 1.0, x), kv_dtype)
            if poison:  # int8 has no NaN, but its scales have
                scales = np.where(unseen[..., 0], np.nan, scales)
                stored = stored if kv_dtype == jnp.int8 else np.where(unseen, np.nan, stored).astype(kv_dtype)
            arrays |= {f"{name}_pages": jnp.asarray(stored), f"{name}_scales": jnp.asarray(scales)}
    return Case(q, arrays, keys, values)


def by_rows(case, sequences, window, slots):
    """The definition, one query and head at a time, over keys kept by position."""
    q = np.asarray(case.q, np.float64)
    out = np.zeros(q.shape)
    at = 0
    for (length, rows), k, v in zip(sequences, case.keys, case.values, strict=True):
        for i in range(rows):
            position = length - rows + i
            low = max(0, length - slots, 0 if window is None else position - window + 1)
            for h in range(q.shape[1]) if position >= low else ():
                head = h // (q.shape[1] // k.shape[1])
                scores = k[low : position + 1, head] @ q[at, h] / np.sqrt(q.shape[2])
                weights = np.exp(scores - scores.max())
                out[at, h] = weights @ v[low : position + 1, head] / weights.sum()
            at += 1
    return out
