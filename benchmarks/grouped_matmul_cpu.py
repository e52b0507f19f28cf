"""Grouped matmul on a CPU, beside one dense product of the same rows.

    python benchmarks/grouped_matmul_cpu.py [--rows 4096] [--dtype float32] [--rounds 15] [--ragged]

Times are the least of the rounds, and the products of a line are timed in turn. A ratio is to the dense product of the same
rows with one matrix, all in the layout of checkpoints, `[N, K]`: `x @ w.T`, for dX `grad @ w`, for dW `grad.T @ x`. `floor`
is the time to fill the `[G, N, K]` weight gradient with zeros, on the same scale as dW. A decode step (few rows, many groups)
is bound by reading matrices: its figure is the time for each group that has rows.
"""

import argparse
import functools
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.grouped_matmul import grouped_matmul, xla

K, N = 256, 512
GROUPS = (8, 32, 128)
KINDS = ("equal", "random", "skewed", "half empty", "one group")


def group_sizes(kind: str, num_groups: int, num_rows: int) -> jax.Array:
    """int32 `[num_groups]`, summing to num_rows."""
    rng = np.random.default_rng(0)
    share = np.zeros(num_groups)
    if kind == "skewed":  # Zipf: the largest of 128 groups has a quarter of the rows
        share = rng.permutation(1 / np.arange(1, num_groups + 1) ** 1.2)
    elif kind == "half empty":
        share[::2] = 1
    elif kind == "one group":
        share[num_groups // 2] = 1
    else:
        share[:] = 1
    share /= share.sum()
    if kind in ("equal", "half empty", "one group") and num_rows >= num_groups:
        return jnp.asarray(np.round(share * num_rows), jnp.int32)
    return jnp.asarray(rng.multinomial(num_rows, share), jnp.int32)


def least_ms(calls: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """The least time of each call, all timed in turn so that a busy machine slows all alike."""
    best = dict.fromkeys(calls, float("inf"))
    for call in calls.values():
        jax.block_until_ready(call())
    for _ in range(rounds):
        for name, call in calls.items():
            start = time.perf_counter()
            jax.block_until_ready(call())
            best[name] = min(best[name], 1e3 * (time.perf_counter() - start))
    return best


def dense(a: jax.Array, b: jax.Array, axes: tuple[int, int]) -> jax.Array:
    dims = (((axes[0],), (axes[1],)), ((), ()))
    return jax.lax.dot_general(a, b, dims, preferred_element_type=jnp.float32).astype(a.dtype)


def measure(kind: str, num_groups: int, num_rows: int, dtype: jnp.dtype, rounds: int, ragged: bool) -> dict[str, float]:
    keys = jax.random.split(jax.random.key(0), 3)
    x, grad = jax.random.normal(keys[0], (num_rows, K), dtype), jax.random.normal(keys[1], (num_rows, N), dtype)
    rhs = jax.random.normal(keys[2], (num_groups, N, K), dtype)
    w, sizes = rhs[0], group_sizes(kind, num_groups, num_rows)
    nn, nt, tn = (jax.jit(functools.partial(dense, axes=axes)) for axes in ((1, 0), (1, 1), (0, 0)))
    forward = jax.jit(functools.partial(grouped_matmul, transpose_rhs=True, implementation="xla"))
    # The two gradients apart, as the backward pass runs them.
    dx = jax.jit(lambda g, r, s: xla.product(g, r, s, None, False, dtype))
    dw = jax.jit(lambda a, g, s: xla.outer(g, a, s, None, dtype))
    zeros = jax.jit(lambda value: jnp.zeros(rhs.shape, dtype) + value)
    calls: dict[str, Callable[[], object]] = {
        "nt": lambda: nt(x, w),
        "nn": lambda: nn(grad, w),
        "tn": lambda: tn(grad, x),
        "forward": lambda: forward(x, rhs, sizes),
        "dX": lambda: dx(grad, rhs, sizes),
        "dW": lambda: dw(x, grad, sizes),
        "floor": lambda: zeros(jnp.zeros((), dtype)),
    }
    ms = least_ms(calls, rounds)
    if ragged:
        plain = jax.jit(jax.lax.ragged_dot)
        ms["ragged_dot"] = least_ms({"ragged_dot": lambda: plain(x, jnp.swapaxes(rhs, 1, 2), sizes)}, 3)["ragged_dot"]
    return ms


def training_table(args: argparse.Namespace) -> None:
    print(
        f"{'rows':>5} {'G':>4} {'used':>4} {'sizes':<11} {'dense':>8} | forward dX    dW    (floor) all three  ragged_dot"
    )
    for num_groups in args.groups:
        for kind in KINDS:
            ms = measure(kind, num_groups, args.rows, jnp.dtype(args.dtype), args.rounds, args.ragged)
            used = int(jnp.sum(group_sizes(kind, num_groups, args.rows) > 0))
            ratios = [ms["forward"] / ms["nt"], ms["dX"] / ms["nn"], ms["dW"] / ms["tn"], ms["floor"] / ms["tn"]]
            ratios.append((ms["forward"] + ms["dX"] + ms["dW"]) / (ms["nn"] + ms["nt"] + ms["tn"]))
            if args.ragged:
                ratios.append(ms["ragged_dot"] / ms["nt"])
            line = " ".join(f"{ratio:6.2f}" for ratio in ratios)
            print(f"{args.rows:5} {num_groups:4} {used:4} {kind:<11} {ms['nt']:6.2f}ms | {line}", flush=True)


def decode_table(args: argparse.Namespace) -> None:
    num_groups = max(args.groups)
    print(f"\n{'rows':>5} {'G':>4} {'used':>4} {'dense':>8} | forward  per used group  ragged_dot")
    for num_rows in (1, 8, 16, 64, 128):
        ms = measure("random", num_groups, num_rows, jnp.dtype(args.dtype), args.rounds, args.ragged)
        used = int(jnp.sum(group_sizes("random", num_groups, num_rows) > 0))
        line = f"{ms['forward']:6.2f}ms {1e3 * ms['forward'] / used:8.0f}us"
        ragged = f"{ms['ragged_dot']:10.1f}ms" if args.ragged else ""
        print(f"{num_rows:5} {num_groups:4} {used:4} {ms['nt']:6.2f}ms | {line} {ragged}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=4096)
    parser.add_argument("--groups", type=int, nargs="+", default=list(GROUPS))
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--ragged", action="store_true", help="time lax.ragged_dot too (slow)")
    args = parser.parse_args()
    print(f"K={K} N={N} {args.dtype} on {jax.default_backend()}, {args.rounds} rounds, jax {jax.__version__}")
    training_table(args)
    decode_table(args)


if __name__ == "__main__":
    main()
