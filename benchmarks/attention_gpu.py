"""Times pallas_kernels.attention on this GPU: a window beside causal, and both beside torch on the same card.

    python -m benchmarks.attention_gpu [--rounds 20] [--length 16384] [--torch]

bfloat16, D = 128, 64 query heads on 8 kv heads. A time is the median of rounds of 10 calls that the device runs one after
the other, as the host's clock sees them; sides take turns. TFLOP/s count live places only (a query at p sees min(p + 1, W)
keys), five products backward for two forward. `packed` has segment ids, all the same, and so is the Pallas kernel where the
others are cuDNN. `--torch` adds SDPA (causal) and flex_attention (compiled, both masks).
"""

import argparse
import functools
import time
from collections.abc import Callable
from statistics import median

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks.machine import describe
from pallas_kernels.attention import attention, choose_implementation

HEADS, KV_HEADS, HEAD_DIM, WINDOW, CALLS = 64, 8, 128, 128, 10


def live_flops(length: int, window: int | None, backward: bool) -> int:
    """Of one call: products of the places that the mask leaves."""
    seen = sum(min(p + 1, window or length) for p in range(length))
    return (14 if backward else 4) * HEADS * HEAD_DIM * seen


def ours(arrays: list[np.ndarray], window: int | None, backward: bool, packed: bool = False) -> Callable[[], None]:
    q, k, v, g = (jnp.asarray(x, jnp.bfloat16) for x in arrays)
    run = functools.partial(attention, window=window)
    if packed:
        run = functools.partial(run, segment_ids=jnp.zeros(q.shape[:2], jnp.int32), implementation="gpu")

    def both(q, k, v, g):
        out, pull = jax.vjp(run, q, k, v)
        return out, pull(g)

    jitted = jax.jit(both if backward else lambda q, k, v, g: run(q, k, v))
    return lambda: jax.block_until_ready([jitted(q, k, v, g) for _ in range(CALLS)])


def theirs(arrays: list[np.ndarray], window: int | None, backward: bool, flex: bool) -> Callable[[], None]:
    import torch
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention
    from torch.nn.functional import scaled_dot_product_attention

    q, k, v, g = (torch.tensor(x, device="cuda", dtype=torch.bfloat16).transpose(1, 2).contiguous() for x in arrays)
    for x in (q, k, v):
        x.requires_grad_(backward)
    if flex:
        length = q.shape[2]
        seen = lambda b, h, i, j: (i >= j) & (i - j < (window or length))  # noqa: E731
        mask = create_block_mask(seen, None, None, length, length, device="cuda")
        run = functools.partial(torch.compile(flex_attention), block_mask=mask, enable_gqa=True)
    else:
        run = functools.partial(scaled_dot_product_attention, is_causal=True, enable_gqa=True)

    def call() -> None:
        for _ in range(CALLS):
            out = run(q, k, v)
            if backward:
                torch.autograd.grad(out, (q, k, v), g)
        torch.cuda.synchronize()

    return call


def race(calls: dict[str, Callable[[], None]], rounds: int) -> dict[str, float]:
    """Median milliseconds of one call of each side."""
    taken: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        call()
    for _ in range(rounds):
        for name, call in calls.items():
            started = time.perf_counter()
            call()
            taken[name].append((time.perf_counter() - started) * 1e3 / CALLS)
    return {name: median(times) for name, times in taken.items()}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--length", type=int, default=16384)
    parser.add_argument("--torch", action="store_true")
    args = parser.parse_args(argv)
    rng = np.random.default_rng(0)
    heads = (HEADS, KV_HEADS, KV_HEADS, HEADS)
    arrays = [rng.standard_normal((1, args.length, h, HEAD_DIM), np.float32) for h in heads]

    table = Table("pass", "side", "ms", "TFLOP/s", "causal of ours / this")
    for backward in (False, True):
        sides = {("ours", window): ours(arrays, window, backward) for window in (None, WINDOW)}
        sides |= {("ours, packed", window): ours(arrays, window, backward, packed=True) for window in (None, WINDOW)}
        if args.torch:
            sides[("torch SDPA", None)] = theirs(arrays, None, backward, flex=False)
            for window in (None, WINDOW):
                sides[("torch flex", window)] = theirs(arrays, window, backward, flex=True)
        named = {f"{side}, {f'window {w}' if w else 'causal'}": w for side, w in sides}
        times = race(dict(zip(named, sides.values(), strict=True)), args.rounds)
        for name, window in named.items():
            rate = live_flops(args.length, window, backward) / times[name] / 1e9
            row = (f"{times[name]:.2f}", f"{rate:.1f}", f"{times['ours, causal'] / times[name]:.2f}")
            table.add_row("forward + backward" if backward else "forward", name, *row)
    console = Console()
    device = jax.devices()[0].device_kind
    console.print(f"{device}, T = {args.length}, ours: {choose_implementation()!r}; {describe()}")
    console.print(table)


if __name__ == "__main__":
    main()
