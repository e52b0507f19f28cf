"""Times pallas_kernels.attention ("xla") beside torch's scaled_dot_product_attention on this CPU.

    python benchmarks/attention_cpu.py [--rounds 7] [--backward] [--only 512] [--core 2]

Both get the same float32 values, the same cores and threads; each gets its own natural layout (torch [B, H, T, D],
ours [B, T, H, D]). The two take turns, round by round, and the best round counts, so that other load on the machine
hurts both alike. Torch's causal is `is_causal=True`; its window is a dense boolean mask, as it has no other. `cpu` is
process time: work done, whatever else runs. `--core N` pins the process to one core.
"""

import argparse
import os
import time
from collections.abc import Callable

SHAPES = [  # B, T, H, K, D
    (1, 512, 16, 4, 64),
    (1, 512, 32, 8, 128),
    (4, 512, 16, 4, 64),
    (4, 512, 32, 8, 128),
    (1, 4096, 16, 4, 64),
    (1, 4096, 32, 8, 128),
]


def race(calls: dict[str, Callable[[], object]], rounds: int) -> dict[str, tuple[float, float]]:
    """Returns the best (wall, cpu) milliseconds of each call."""
    best = {name: (float("inf"), float("inf")) for name in calls}
    for call in calls.values():
        call()
    for _ in range(rounds):
        for name, call in calls.items():
            wall, cpu = time.perf_counter(), time.process_time()
            call()
            wall, cpu = (time.perf_counter() - wall) * 1e3, (time.process_time() - cpu) * 1e3
            best[name] = (min(best[name][0], wall), min(best[name][1], cpu))
    return best


def torch_calls(q, k, v, g, window: int | None) -> tuple[Callable, Callable]:
    import torch
    from torch.nn.functional import scaled_dot_product_attention

    q, k, v, g = (torch.tensor(x).transpose(1, 2).contiguous() for x in (q, k, v, g))
    how: dict = {"is_causal": True}
    if window is not None:
        index = torch.arange(q.shape[2])
        distance = index[:, None] - index
        how = {"attn_mask": (distance >= 0) & (distance < window)}

    def forward():
        with torch.no_grad():
            return scaled_dot_product_attention(q, k, v, enable_gqa=True, **how)

    leaves = [x.clone().requires_grad_() for x in (q, k, v)]

    def both():
        return torch.autograd.grad(scaled_dot_product_attention(*leaves, enable_gqa=True, **how), leaves, g)

    return forward, both


def jax_calls(q, k, v, g, window: int | None) -> tuple[Callable, Callable]:
    import jax
    import jax.numpy as jnp

    from pallas_kernels.attention import attention

    q, k, v, g = (jnp.asarray(x) for x in (q, k, v, g))

    def run(q, k, v):
        return attention(q, k, v, window=window, implementation="xla")

    def gradients(q, k, v, g):
        out, pull = jax.vjp(run, q, k, v)
        return out, pull(g)

    forward, both = jax.jit(run), jax.jit(gradients)
    return lambda: jax.block_until_ready(forward(q, k, v)), lambda: jax.block_until_ready(both(q, k, v, g))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--backward", action="store_true", help="forward + backward instead of forward")
    parser.add_argument("--only", type=int, help="only shapes of this length T")
    parser.add_argument("--core", type=int, help="pin to this core")
    args = parser.parse_args()
    if args.core is not None:
        os.sched_setaffinity(0, {args.core})
    cores = len(os.sched_getaffinity(0))

    import numpy as np
    import torch

    torch.set_num_threads(cores)
    print(
        f"fp32, {cores} cores, load {os.getloadavg()[0]:.1f}, {'forward+backward' if args.backward else 'forward'}, ms"
    )
    print("| B | T | H | K | D | window | torch wall | ours wall | ratio | torch cpu | ours cpu | ratio | error |")
    print("|---|---|---|---|---|---|---|---|---|---|---|---|---|")
    rng = np.random.default_rng(0)
    for batch, length, heads, kv_heads, dim in SHAPES:
        if args.only and length != args.only:
            continue
        q, g = (rng.normal(size=(batch, length, heads, dim)).astype(np.float32) for _ in range(2))
        k, v = (rng.normal(size=(batch, length, kv_heads, dim)).astype(np.float32) for _ in range(2))
        for window in (None, 128):
            theirs, ours = torch_calls(q, k, v, g, window), jax_calls(q, k, v, g, window)
            error = np.abs(theirs[0]().transpose(1, 2).numpy() - np.asarray(ours[0]())).max()
            which = int(args.backward)
            best = race({"torch": theirs[which], "ours": ours[which]}, args.rounds)
            (tw, tc), (ow, oc) = best["torch"], best["ours"]
            print(
                f"| {batch} | {length} | {heads} | {kv_heads} | {dim} | {window} | {tw:.1f} | {ow:.1f} | {ow / tw:.2f} "
                f"| {tc:.1f} | {oc:.1f} | {oc / tc:.2f} | {error:.0e} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
