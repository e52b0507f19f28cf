"""Counts the cycles of the TPU attention kernels from the schedule that the TPU compiler writes: no TPU is needed.

    python benchmarks/tpu_schedule.py [--chip v6e] [--case window causal long] [--heads 64 8] [--rivals splash tokamax]
        [--blocks 512 1024/1024/512]

Needs libtpu, and tokamax 0.0.12 for that rival. A kernel is a sequence of VLIW bundles, one a cycle unless it waits. The
compiler's dump gives the bundles of every region and which units each bundle uses; bundles x runs of the region, summed, are the
*static cycles*. How often a region runs follows from the grid and the band, and stands in `Runs` below, for our kernels and for
the splash attention of jax and of tokamax alike: a grid step's set-up at every step, the products only where the tile is live,
the zeroing and the writing out once per output block. tokamax has a body without a mask for clear tiles, and a grid of live tiles
alone; its backward is one kernel with three partial sums of d_q, whose bytes are counted and whose addition by XLA is not.

Left out: waits for DMA, for a product's result beyond what was scheduled, and between grid steps. The bytes that a kernel moves
between HBM and VMEM stand beside the cycles for that reason. Every compile runs in a process of its own, one after the other.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

TOPOLOGIES = {"v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2", "tpu7x": "tpu7x:2x2x1"}
KINDS = {"v5e": "TPU v5 lite", "v5p": "TPU v5", "v6e": "TPU v6 lite", "tpu7x": "TPU7x"}
CASES = {"window": (128, 8192), "long": (4096, 32768), "causal": (None, 8192)}  # (window, T)
EDGE = 60  # a conditional region without products and at least this long is set-up or write-out of an output block


@dataclass
class Region:
    """A run of bundles that are entered and left together."""

    conditional: bool
    depth: int
    bundles: int = 0
    mxu: int = 0


@dataclass
class Runs:
    """How often the regions of a kernel run for one kv head (ours) or one query head (the rivals)."""

    steps: int  # grid steps
    edges: int  # output blocks
    loops: int  # rounds of the loops inside a step
    products: list[int] = field(default_factory=list)  # the regions with products, in program order


LINE = re.compile(r"\s*(0x[0-9a-f]+|0)\s+(L[BHE]|P[BF]|CT)?\s*:((?:\s*>)*)\s*\{(.*)")


def read_regions(bundles: Path, utilization: Path) -> list[Region]:
    rows = [line.split() for line in utilization.read_text().split("== UTILIZATION:")[1].splitlines() if line.strip()]
    regions, branched = [], True
    lines = (match for line in bundles.read_text().splitlines() if (match := LINE.match(line)))
    for match, row in zip(lines, rows, strict=True):
        # An empty bundle is written without its depth: it belongs where the one before it does.
        depth = regions[-1].depth if regions and match[4].startswith("}") else match[3].count(">")
        if branched or match[2] or depth != regions[-1].depth:
            regions.append(Region(branched and match[2] is None, depth))
        branched = "sbr.rel" in match[4]
        regions[-1].bundles += 1
        regions[-1].mxu += row[0] != "0"
    return regions


def static_cycles(regions: list[Region], runs: Runs) -> tuple[int, float]:
    """(cycles, share of them whose bundle uses the matrix unit)."""
    products = [r for r in regions if r.mxu > EDGE]
    if len(products) != len(runs.products):
        found = [(r.bundles, r.mxu) for r in products]
        raise ValueError(f"expected {len(runs.products)} regions with products, found (bundles, mxu) {found}")
    cycles = mxu = 0
    for region in regions:
        if region.mxu > EDGE:
            times = runs.products[products.index(region)]
        elif region.depth == 0:
            times = 1
        elif region.depth > 1:
            times = runs.loops
        else:
            times = runs.edges if region.conditional and region.bundles >= EDGE else runs.steps
        cycles += region.bundles * times
        mxu += region.mxu * times
    return cycles, mxu / cycles


def live_tiles(length: int, window: int | None, rows: int, keys: int) -> tuple[int, int, int]:
    """(tiles with a live score, those of them with a dead one, most live tiles in a row of tiles)."""
    live = edge = most = 0
    for first in range(0, length, rows):
        last, here = first + rows - 1, 0
        for key in range(0, length, keys):
            if key > last or (window is not None and key + keys - 1 < first - window + 1):
                continue
            here += 1
            edge += key + keys - 1 > first or (window is not None and key < last - window + 1)
        live, most = live + here, max(most, here)
    return live, edge, most


# Our kernels. Everything below counts one kv head and is divided by the query heads on it.


def our_runs(plan, length: int, window: int | None, backward: bool) -> Runs:
    if hasattr(plan, "unroll"):
        groups = length // 128 // plan.unroll
        masked = -(-plan.back // plan.unroll)
        products = [groups] if plan.window % 128 else [masked, groups - masked]
        return Runs(length // plan.block + backward, 1, groups, products)
    live, edge, _ = live_tiles(length, window, plan.rows, plan.keys)
    blocks = length // plan.rows
    if backward:
        _, _, most = live_tiles(length, window, plan.rows, plan.block)
        steps = live_tiles(length, window, plan.rows, plan.block)[0]
        return Runs(steps, length // plan.block, live, [live - edge, edge])
    most = live_tiles(length, window, plan.rows, plan.block)[2]
    return Runs(blocks * most, blocks, live, [live - edge, edge])


def our_bytes(plan, length: int, window: int | None, backward: bool) -> int:
    """Bytes between HBM and VMEM for one kv head, bfloat16."""
    row = plan.head_dim * 2
    queries = (
        length * plan.group * (3 * row + 8 if backward else 2 * row + 4)
    )  # q, out; or q, d_out, d_q; and the statistics
    if hasattr(plan, "unroll"):
        keys = 2 * (length + length // plan.block * plan.back * 128) * row
        return queries + keys + (2 * length * row if backward else 0)
    if backward:
        chunks = length // plan.block
        visits = live_tiles(length, window, plan.rows, plan.block)[0] * plan.rows * plan.group
        partial = 2 * 4 * plan.head_dim if chunks > 1 else row  # d_q read and written in float32
        return visits * (2 * row + 8 + partial) + 4 * length * row
    return queries + live_tiles(length, window, plan.rows, plan.block)[0] * 2 * plan.block * row


def splash_runs(length: int, window: int | None, blocks: tuple[int, int, int]) -> Runs:
    rows, keys, _ = blocks
    live, _, most = live_tiles(length, window, rows, keys)
    return Runs(length // rows * most, length // rows, length // rows * most, [live])


def splash_bytes(length: int, window: int | None, blocks: tuple[int, int, int], backward: bool) -> int:
    """Bytes for one query head: its keys are fetched for it alone. Statistics are float32; the backward is two kernels."""
    rows, keys, _ = blocks
    live = live_tiles(length, window, rows, keys)[0]
    row = 2 * 128
    if not backward:
        return length * (2 * row + 4) + live * 2 * keys * row
    d_q = length * (3 * row + 8) + live * 2 * keys * row
    d_kv = live * rows * (2 * row + 8) + length * 4 * row
    return d_q + d_kv


def tokamax_runs(length: int, window: int | None, blocks: tuple[int, int, int], backward: bool) -> Runs:
    rows, keys, _ = blocks
    live, edge, _ = live_tiles(length, window, rows, keys)
    return Runs(live, length // (keys if backward else rows), live, [live - edge, edge])


def tokamax_bytes(length: int, window: int | None, blocks: tuple[int, int, int], backward: bool) -> int:
    """As `splash_bytes`. The fused backward reads and writes a part of d_q at every tile, and d_k, d_v in float32 a head."""
    if not backward:
        return splash_bytes(length, window, blocks, backward)
    rows, keys, _ = blocks
    live = live_tiles(length, window, rows, keys)[0]
    row = 2 * 128
    return live * rows * (4 * row + 8) + length * (2 * row + 8 * row) + 4 * length * row


def compile_here(args: argparse.Namespace) -> int:
    """Compiles forward and backward of one implementation; returns the bytes of temporaries."""
    import jax
    import jax.numpy as jnp
    import numpy as np
    from jax.experimental import topologies

    window, length = CASES[args.case[0]]
    heads, kv_heads = args.heads
    devices = topologies.get_topology_desc(platform="tpu", topology_name=TOPOLOGIES[args.chip]).devices
    mesh = jax.sharding.Mesh(np.array(devices[:1]), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    here = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    make = {None: ours, "splash": splash, "tokamax": tokamax}[args.rival[0]]
    run = make(args, window, length)
    shape = (1, heads, length, 128) if args.rival[0] else (1, length, heads, 128)
    kv_shape = (1, kv_heads, length, 128) if args.rival[0] else (1, length, kv_heads, 128)
    q, k = (jax.ShapeDtypeStruct(s, jnp.bfloat16, sharding=here) for s in (shape, kv_shape))
    loss = lambda q, k, v: run(q, k, v).astype(jnp.float32).sum()  # noqa: E731
    with jax.set_mesh(mesh):
        lowered = jax.jit(jax.value_and_grad(loss, (0, 1, 2))).trace(q, k, k).lower(lowering_platforms=("tpu",))
        memory = lowered.compile().memory_analysis()
    return memory.temp_size_in_bytes if memory is not None else 0


def ours(args: argparse.Namespace, window: int | None, length: int) -> Callable[..., Any]:
    import functools

    from pallas_kernels.attention import attention

    return functools.partial(attention, window=window, implementation="tpu")


def splash(args: argparse.Namespace, window: int | None, length: int) -> Callable[..., Any]:
    import jax
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernel
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    rows, keys, compute = args.rival[1]
    heads, kv_heads = args.heads
    mask = (
        masks.CausalMask((length, length)) if window is None else masks.LocalMask((length, length), (window - 1, 0), 0)
    )
    sizes = kernel.BlockSizes(
        block_q=rows, block_kv=keys, block_kv_compute=compute,
        block_q_dkv=rows, block_kv_dkv=keys, block_kv_dkv_compute=compute, block_q_dq=rows, block_kv_dq=keys,
    )  # fmt: skip
    group = heads // kv_heads
    run = kernel.make_splash_mqa(masks.MultiHeadMask([mask] * group), block_sizes=sizes, head_shards=1, q_seq_shards=1)
    grouped = jax.vmap(jax.vmap(run))
    return lambda q, k, v: grouped(q.reshape(1, kv_heads, group, length, 128), k, v)


def tokamax(args: argparse.Namespace, window: int | None, length: int) -> Callable[..., Any]:
    import jax
    from tokamax._src.ops.experimental.tpu.splash_attention import splash_attention_kernel as kernel
    from tokamax._src.ops.experimental.tpu.splash_attention import splash_attention_mask as masks

    rows, keys, compute = args.rival[1]
    heads, kv_heads = args.heads
    mask = (
        masks.CausalMask((length, length)) if window is None else masks.LocalMask((length, length), (window - 1, 0), 0)
    )
    config = kernel.SplashConfig(
        block_q=rows, block_kv=keys, block_kv_compute=compute, dq_reduction_steps=3,
        block_q_dkv=rows, block_kv_dkv=keys, block_kv_dkv_compute=compute,
    )  # fmt: skip
    group = heads // kv_heads
    grouped = jax.vmap(jax.vmap(kernel.make_splash_mqa(mask, config=config, q_seq_shards=1)))
    return lambda q, k, v: grouped(q.reshape(1, kv_heads, group, length, 128), k, v)


def parse_blocks(text: str) -> tuple[int, int, int]:
    parts = [int(part) for part in text.split("/")]
    return tuple(parts * 3 if len(parts) == 1 else parts)  # type: ignore[return-value]


def count(args: argparse.Namespace, dump: Path) -> dict[str, tuple[int, float, int]]:
    """{direction: (cycles a query head, MXU share, bytes a query head)} of the kernels in the dump."""
    window, length = CASES[args.case[0]]
    heads, kv_heads = args.heads
    found: dict[str, tuple[int, float, int]] = {}
    for bundles in sorted(dump.glob("*-final_bundles.txt")):
        name = re.search(r"\d+-([a-z_]*(?:attention|splash)[a-z_]*)[.\d]*-\d+-final_bundles", bundles.name)
        if name is None:
            continue
        stem = bundles.name.rsplit("-", 2)[0]
        regions = read_regions(bundles, next(dump.glob(f"{stem}-*-final_hlo-static-per-bundle-utilization.txt")))
        backward = "backward" in name[1] or "_dq" in name[1] or "_dkv" in name[1]
        library, blocks = args.rival
        if library == "tokamax":
            cycles, share = static_cycles(regions, tokamax_runs(length, window, blocks, backward))
            moved = tokamax_bytes(length, window, blocks, backward)
            found["backward" if backward else "forward"] = (cycles, share, moved)
        elif library == "splash":
            cycles, share = static_cycles(regions, splash_runs(length, window, blocks))
            key = "dq" if "_dq" in name[1] else "dkv" if backward else "forward"
            found[key] = (cycles, share, splash_bytes(length, window, blocks, backward))
        else:
            plan = our_plan(args, window, length, backward)
            cycles, share = static_cycles(regions, our_runs(plan, length, window, backward))
            group = heads // kv_heads
            found["backward" if backward else "forward"] = (
                cycles // group, share, our_bytes(plan, length, window, backward) // group
            )  # fmt: skip
    if args.rival[0] == "splash":
        (dq, dq_share, moved), (dkv, dkv_share, _) = found.pop("dq"), found.pop("dkv")
        found["backward"] = (dq + dkv, (dq * dq_share + dkv * dkv_share) / (dq + dkv), moved)
    return found


def our_plan(args: argparse.Namespace, window: int | None, length: int, backward: bool):
    from pallas_kernels.attention import tpu_flash, tpu_window
    from pallas_kernels.attention.tpu_tiles import Band
    from pallas_kernels.attention.tuned import tiles

    kind = KINDS[args.chip]
    group = args.heads[0] // args.heads[1]
    face, how = (Band(length, length, 0), group, 128), (128**-0.5, False, backward, tiles(kind, group, 128), False)
    if window is not None and window <= tpu_window.MAX_WINDOW:
        return tpu_window.make_plan(*face, window, *how)
    return tpu_flash.make_plan(*face, window, *how)


def one(args: argparse.Namespace) -> None:
    """The child process: compile with the dump on, count, print one line of JSON."""
    if args.sizes:
        from pallas_kernels._tuned import shape
        from pallas_kernels.attention import tuned

        tuned.table()[args.chip][shape(args.heads[0] // args.heads[1], 128)] = tuned.Tiles(*args.sizes)
    with tempfile.TemporaryDirectory() as dump:
        os.environ["LIBTPU_INIT_ARGS"] = f"--xla_jf_dump_to={dump} --xla_jf_dump_llo_text=true"
        temporaries = compile_here(args)
        print(json.dumps({"temp": temporaries, **count(args, Path(dump))}))


def in_child(
    args: argparse.Namespace, case: str, library: str | None, blocks: str = "", sizes: Any = None
) -> dict | None:
    """What `count` finds, or None with the reason printed. `sizes`: our kernels' Tiles where not those of their table."""
    command = [sys.executable, __file__, "--one", "--chip", args.chip, "--case", case, "--heads", *map(str, args.heads)]
    command += ["--rival", library, blocks] if library else []
    command += ["--sizes", json.dumps(sizes)] if sizes else []
    env = os.environ | {
        "JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
        "PYTHONPATH": str(Path(__file__).resolve().parents[1]),
    }  # fmt: skip
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    if done.returncode:
        print(f"{case} {library or 'ours'} {blocks}: {done.stderr.strip().splitlines()[-1][:200]}", file=sys.stderr)
        return None
    return json.loads(done.stdout.strip().splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--chip", choices=TOPOLOGIES, default="v6e")
    parser.add_argument("--case", choices=CASES, nargs="+", default=list(CASES))
    parser.add_argument("--heads", type=int, nargs=2, default=(64, 8), metavar=("QUERY", "KV"))
    parser.add_argument("--rivals", choices=("splash", "tokamax"), nargs="*", default=["splash", "tokamax"])
    parser.add_argument("--blocks", nargs="+", default=["256", "512", "1024/1024/512", "1024"], help="the rivals'")
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--rival", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--sizes", type=json.loads, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        args.rival = (args.rival[0], parse_blocks(args.rival[1])) if args.rival else (None, None)
        return one(args)
    print(
        f"{args.chip}, bfloat16, head dimension 128, {args.heads[0]} query and {args.heads[1]} kv heads; a query head:"
    )
    print(
        "| case | direction | ours | MXU | MB |"
        + "".join(f" {x} (blocks) | MXU | MB | ours / it |" for x in args.rivals)
    )
    print("|---" * (5 + 4 * len(args.rivals)) + "|")
    for case in args.case:
        if (own := in_child(args, case, None)) is None:
            continue
        rivals = {
            name: {b: found for b in args.blocks if (found := in_child(args, case, name, b))} for name in args.rivals
        }
        for direction in ("forward", "backward"):
            cycles, mxu, moved = own[direction]
            row = f"| {case} | {direction} | {cycles:,} | {mxu:.0%} | {moved / 1e6:.1f} |"
            for found in rivals.values():
                if not found:
                    row += " none compiled | | | |"
                    continue
                blocks = min(found, key=lambda name: found[name][direction][0])
                theirs, mxu, moved = found[blocks][direction]
                row += f" {theirs:,} ({blocks}) | {mxu:.0%} | {moved / 1e6:.1f} | {cycles / theirs:.2f} |"
            print(row, flush=True)
    return None


if __name__ == "__main__":
    main()
