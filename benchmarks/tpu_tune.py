"""Searches block sizes of a TPU kernel for one chip and shape, and writes the best into the kernel's `tuned.json`.

    python benchmarks/tpu_tune.py attention [--chip v6e] [--heads 64 8] [--fields flash_keys flash_rows]
    python benchmarks/tpu_tune.py paged_attention [--chip v6e] [--heads 64 8]

One field after the other, every value in `SPACES`, from the sizes in the table; a change is kept if it saves 1 %. On a TPU the
cost of sizes is the median time of a call; elsewhere it is the static cycles that `tpu_schedule.py` and `tpu_paged_schedule.py`
count (libtpu needed), or the cycles of the bytes moved where those are more and the chip's bandwidth is known. `rows` of
paged_attention is not searched, as only decoding is counted and timed.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import tpu_paged_schedule, tpu_schedule
from pallas_kernels import _tuned
from pallas_kernels.attention import tuned as attention_tuned
from pallas_kernels.paged_attention import tuned as paged_tuned

KEPT = 0.99  # of the cost so far: what a change must come down to
HEAD_DIM = 128  # what the schedules count
Cost = Callable[[Any], float | None]

TABLES: dict[str, ModuleType] = {"attention": attention_tuned, "paged_attention": paged_tuned}
# By what a field bears on: the cases of the schedules that are counted or timed for it.
SPACES: dict[str, dict[str, dict[str, tuple[int, ...]]]] = {
    "attention": {
        "window": {
            "window_unroll": (2, 4, 8),
            "window_unroll_backward": (1, 2, 4),
            "window_rows": (4096, 8192, 16384),
        },
        "causal": {
            "flash_keys": (256, 512, 1024),
            "flash_rows": (1024, 2048, 4096),
            "flash_rows_backward": (1024, 2048, 4096),
            "flash_block": (1024, 2048, 4096, 8192),
            "flash_chunk": (4096, 8192),
        },
    },
    "paged_attention": {
        "decode": {
            "keys": (256, 512, 1024),
            "block": (1024, 2048, 4096),
            "block_bytes": (2 * 2**20, 4 * 2**20, 8 * 2**20),
        }
    },
}


def fits(sizes: Any) -> bool:
    """Whether the sizes go together: blocks are whole tiles."""
    if isinstance(sizes, attention_tuned.Tiles):
        return sizes.flash_block % sizes.flash_keys == 0 and sizes.flash_chunk % sizes.flash_keys == 0
    return sizes.block % sizes.keys == 0


def search(start: Any, space: Mapping[str, Sequence[int]], cost: Cost) -> tuple[Any, float, float]:
    """Returns (the best sizes, their cost, that of `start`). A cost of None: the sizes do not compile."""
    best, first = start, cost(start)
    if first is None:
        raise SystemExit(f"the sizes to start from do not compile: {start}")
    least = first
    for field, values in space.items():
        for value in values:
            tried = best._replace(**{field: value})
            if tried == best or not fits(tried):
                continue
            found = cost(tried)
            print(f"  {field}={value}: {'refused' if found is None else f'{found / first:.3f}'}", flush=True)
            if found is not None and found < least * KEPT:
                best, least = tried, found
    return best, least, first


def static_cost(args: argparse.Namespace, case: str) -> Cost:
    """Cycles of the schedule that the TPU compiler writes, or those of the bytes where they are more."""
    rate = tpu_paged_schedule.BYTES_PER_CYCLE.get(args.chip)

    def longest(cycles: float, moved: float) -> float:
        return cycles if rate is None else max(cycles, moved / rate)

    def of_attention(sizes: Any) -> float | None:
        found = tpu_schedule.in_child(args, case, None, sizes=sizes)
        return None if found is None else sum(longest(found[d][0], found[d][2]) for d in ("forward", "backward"))

    def of_decode(sizes: Any) -> float | None:
        cases = range(len(tpu_paged_schedule.CASES))
        found = [tpu_paged_schedule.in_child(args, index, sizes) for index in cases]
        # A window layer takes a twentieth of a global one's time, and there are three of them to one.
        weights = [1 if window is None else 3 for _, window, _ in tpu_paged_schedule.CASES]
        if None in found:
            return None
        return sum(w * longest(f["cycles"], f["bytes"]) for w, f in zip(weights, found, strict=True) if f is not None)

    return of_attention if args.op == "attention" else of_decode


def timed_cost(args: argparse.Namespace, case: str) -> Cost:
    """Median seconds of a call on the TPU that is there."""
    import jax
    import jax.numpy as jnp

    from pallas_kernels.attention import attention
    from pallas_kernels.paged_attention import paged_attention

    heads, kv_heads = args.heads
    normal = lambda *shape: jax.random.normal(jax.random.key(len(shape)), shape, jnp.bfloat16)  # noqa: E731
    if args.op == "attention":
        window, length = tpu_schedule.CASES[case]
        arrays = [normal(1, length, heads, HEAD_DIM), *[normal(1, length, kv_heads, HEAD_DIM)] * 2]

        def call(q: Any, k: Any, v: Any) -> Any:
            loss = lambda *x: attention(*x, window=window, implementation="tpu").astype(jnp.float32).sum()  # noqa: E731
            return jax.grad(loss, (0, 1, 2))(q, k, v)

    else:
        batch, width = args.batch, args.context // 128
        pages = normal(batch * width, kv_heads, 128, HEAD_DIM)
        table = jnp.arange(batch * width, dtype=jnp.int32).reshape(batch, width)
        starts, lengths = jnp.arange(batch + 1, dtype=jnp.int32), jnp.full((batch,), args.context - 29, jnp.int32)
        arrays = [normal(batch, heads, HEAD_DIM), pages, pages, table, starts, lengths]

        def call(*arrays: Any) -> Any:
            return paged_attention(*arrays, implementation="tpu")

    def cost(sizes: Any) -> float | None:
        use(args, sizes)
        jax.clear_caches()  # sizes are no part of a call's key
        run = jax.jit(call)
        try:
            jax.block_until_ready(run(*arrays))
        except jax.errors.JaxRuntimeError as error:
            print(f"  {sizes}: {str(error).splitlines()[0][:200]}", file=sys.stderr)
            return None
        times = []
        for _ in range(10):
            start = time.perf_counter()
            jax.block_until_ready(run(*arrays))
            times.append(time.perf_counter() - start)
        return statistics.median(times)

    return cost


def use(args: argparse.Namespace, sizes: Any) -> None:
    """Makes `sizes` those of the chip and shape, in this process."""
    TABLES[args.op].table()[args.chip][_tuned.shape(args.heads[0] // args.heads[1], HEAD_DIM)] = sizes


def main(argv: Sequence[str] | None = None, cost: Callable[[argparse.Namespace, str], Cost] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("op", choices=TABLES)
    parser.add_argument("--chip", choices=tpu_schedule.TOPOLOGIES, default="v6e", help="a TPU that is there goes first")
    parser.add_argument("--heads", type=int, nargs=2, default=(64, 8), metavar=("QUERY", "KV"))
    parser.add_argument("--batch", type=int, default=64, help="sequences that decode")
    parser.add_argument("--context", type=int, default=8192)
    parser.add_argument("--fields", nargs="+", help="only these")
    parser.add_argument("--table", type=Path, help="default: the kernel's own tuned.json")
    args = parser.parse_args(argv)
    if cost is None:
        cost = static_cost
        import jax

        if jax.default_backend() == "tpu":
            cost, args.chip = timed_cost, _tuned.chip(jax.devices()[0].device_kind)
    module = TABLES[args.op]
    path = args.table or module.TABLE
    table = _tuned.read_table(path, module.Tiles)
    group = args.heads[0] // args.heads[1]
    kind = next(start for start, name in _tuned.CHIPS.items() if name == args.chip)
    best = _tuned.find(table, kind, group, HEAD_DIM)
    for case, space in SPACES[args.op].items():
        chosen = {field: values for field, values in space.items() if args.fields is None or field in args.fields}
        if chosen:
            print(
                f"{args.op}, {args.chip}, {args.heads[0]}/{args.heads[1]} heads, {case}; cost relative to the table's:"
            )
            best, least, first = search(best, chosen, cost(args, case))
            print(f"{best}: {least / first:.3f}")
    if best != table[args.chip][_tuned.ANY]:
        table[args.chip][_tuned.shape(group, HEAD_DIM)] = best
    _tuned.write_table(path, table)


if __name__ == "__main__":
    main()
