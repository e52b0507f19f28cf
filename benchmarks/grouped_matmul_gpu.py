"""Times the grouped matmul on this GPU: our kernels and `lax.ragged_dot` beside one dense product of the same rows.

    python -m benchmarks.grouped_matmul_gpu [--rounds 20] [--rows 16384] [--sides gpu xla] [--tiny]

bfloat16, 16 experts of K-EXAONE (6,144 x 2,048), rows spread by a Zipf law. A time is the median of rounds of 10 calls that the
device runs one after the other, as the host's clock sees them; sides take turns. A ratio is to the dense product of all rows
with one matrix, forward and backward each with its own.
--tiny: a moment's work, which shows that it runs and measures nothing.
"""

import argparse
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from rich.console import Console
from rich.table import Table

from benchmarks.attention_gpu import CALLS, race
from benchmarks.grouped_matmul_cpu import group_sizes
from benchmarks.machine import describe
from pallas_kernels.grouped_matmul import grouped_matmul

EXPERTS, HIDDEN, WIDTH = 16, 6144, 2048


def call(run: Callable[..., jax.Array], backward: bool, *arrays: jax.Array) -> Callable[[], None]:
    """`run(x, matrices)`, with the gradients of both if `backward`; the last of `arrays` is that of the result."""

    def both(x, matrices, grad):
        out, pull = jax.vjp(run, x, matrices)
        return (out, *pull(grad)) if backward else out

    jitted = jax.jit(both)
    return lambda: jax.block_until_ready([jitted(*arrays) for _ in range(CALLS)])


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--rows", type=int, default=16384)
    parser.add_argument("--sides", nargs="+", default=["gpu", "xla"])
    parser.add_argument("--tiny", action="store_true")
    args = parser.parse_args(argv)
    hidden, width = (128, 64) if args.tiny else (HIDDEN, WIDTH)
    rounds, rows = (1, 256) if args.tiny else (args.rounds, args.rows)
    keys = jax.random.split(jax.random.key(0), 3)
    x, grad = (jax.random.normal(key, (rows, n), jnp.bfloat16) for key, n in zip(keys, (hidden, width), strict=False))
    matrices = jax.random.normal(keys[2], (EXPERTS, hidden, width), jnp.bfloat16)
    sizes = group_sizes("skewed", EXPERTS, rows)
    table = Table("pass", "side", "ms", "TFLOP/s", "over dense")
    for backward in (False, True):
        dense = lambda a, b: jnp.matmul(a, b, preferred_element_type=jnp.bfloat16)  # noqa: E731
        calls = {"dense": call(dense, backward, x, matrices[0], grad)}
        for side in args.sides:
            run = functools.partial(grouped_matmul, group_sizes=sizes, implementation=side)
            calls[side] = call(run, backward, x, matrices, grad)
        times = race(calls, rounds)
        for side, ms in times.items():
            rate = (6 if backward else 2) * rows * hidden * width / ms / 1e9
            words = "forward + backward" if backward else "forward"
            table.add_row(words, side, f"{ms:.2f}", f"{rate:.1f}", f"{ms / times['dense']:.2f}")
    console = Console()
    console.print(f"{jax.devices()[0].device_kind}, {rows:,} rows, {EXPERTS} x {hidden:,} x {width:,}; {describe()}")
    console.print(table)


if __name__ == "__main__":
    main()
