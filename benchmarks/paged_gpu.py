"""Times a decoding step's paged attention on this GPU beside "xla", and against what the card copies in that time.

    python -m benchmarks.paged_gpu [--rounds 20] [--sequences 64] [--context 8192] [--sides gpu xla] [--tiny]

bfloat16 queries, D = 128, 64 query heads on 8 kv heads, pages of 128 slots in bfloat16 and int8. A time is the median of rounds
of 10 calls that the device runs one after the other, as the host's clock sees them; sides take turns. The last column is
the bytes of the keys and values that are seen, a second, over what a copy of a large array reads and writes a second.
--tiny: a moment's work, which shows that it runs and measures nothing.
"""

import argparse
import functools

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks.attention_gpu import CALLS, race
from benchmarks.machine import describe
from pallas_kernels.paged_attention import paged_attention

HEADS, KV_HEADS, HEAD_DIM, PAGE = 64, 8, 128, 128


def copy_bandwidth(rounds: int, elements: int) -> float:
    """Bytes a second, read and written, of adding one to an array of float32."""
    add = jax.jit(lambda x: x + 1)
    x = jnp.zeros(elements, jnp.float32)
    ms = race({"copy": lambda: jax.block_until_ready([add(x) for _ in range(CALLS)])}, rounds)["copy"]
    return 2 * x.nbytes / ms * 1e3


def step(sequences: int, context: int, dtype: str, window: int | None) -> tuple[dict[str, jax.Array], int]:
    """Arguments of one call, one row a sequence, and the bytes of the keys, values and scales that it sees."""
    rng = np.random.default_rng(0)
    width = -(-(context if window is None else window + PAGE) // PAGE)  # under a window a ring
    shape = (sequences * width, KV_HEADS, PAGE, HEAD_DIM)
    keys = jax.random.split(jax.random.key(0), 3)
    arrays = {"q": jax.random.normal(keys[0], (sequences, HEADS, HEAD_DIM), jnp.bfloat16)}
    for name, key in zip(("k_pages", "v_pages"), keys[1:], strict=True):
        values = jax.random.normal(key, shape, jnp.bfloat16)
        arrays[name] = values if dtype == "bfloat16" else (40 * values).astype(jnp.int8)
    if dtype != "bfloat16":
        arrays |= {name: jnp.full(shape[:3], 1 / 40, jnp.float32) for name in ("k_scales", "v_scales")}
    arrays["page_table"] = jnp.asarray(rng.permutation(shape[0]).reshape(sequences, width), jnp.int32)
    arrays["query_starts"] = jnp.arange(sequences + 1, dtype=jnp.int32)
    arrays["lengths"] = jnp.full(sequences, context, jnp.int32)
    slot = HEAD_DIM * arrays["k_pages"].dtype.itemsize + (4 if dtype != "bfloat16" else 0)
    return arrays, 2 * sequences * KV_HEADS * min(window or context, context) * slot


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--sequences", type=int, default=64)
    parser.add_argument("--context", type=int, default=8192)
    parser.add_argument("--sides", nargs="+", default=["gpu", "xla"])
    parser.add_argument("--tiny", action="store_true")
    args = parser.parse_args(argv)
    if args.tiny:
        args.rounds, args.sequences, args.context = 1, 2, 256
    bandwidth = copy_bandwidth(args.rounds, 2**16 if args.tiny else 2**28)
    table = Table("pages", "window", "side", "ms", "GB/s", "of a copy's")
    for dtype in ("bfloat16", "int8"):
        for window in (None, 128):
            arrays, seen = step(args.sequences, args.context, dtype, window)
            calls = {}
            for side in args.sides:
                run = jax.jit(functools.partial(paged_attention, window=window, implementation=side))
                calls[side] = lambda run=run, arrays=arrays: jax.block_until_ready(
                    [run(**arrays) for _ in range(CALLS)]
                )
            for side, ms in race(calls, args.rounds).items():
                rate = seen / ms * 1e3
                table.add_row(dtype, str(window), side, f"{ms:.3f}", f"{rate / 1e9:,.0f}", f"{rate / bandwidth:.2f}")
    console = Console()
    shape = f"{args.sequences} sequences at {args.context:,} tokens, {HEADS}/{KV_HEADS} heads"
    console.print(f"{jax.devices()[0].device_kind}, {shape}; a copy: {bandwidth / 1e9:,.0f} GB/s; {describe()}")
    console.print(table)


if __name__ == "__main__":
    main()
