"""Counts the cycles of the TPU paged-attention kernel when it decodes, from the schedule that the TPU compiler writes: no TPU.

    python benchmarks/tpu_paged_schedule.py [--chip v6e] [--heads 64 8] [--batch 64] [--context 8192] [--rpa 4/1 8/1]
                                            [--rpa3 2048/2048 --tpu-inference FOLDER]

Needs libtpu. The method is `tpu_schedule.py`'s: bundles of every region of the compiler's dump x how often it runs. Which region
runs how often follows from its depth in the kernel's loops: items (1), blocks (2), pages and tiles (3). Regions of the path
for long items do not run. Beside the cycles stand the bytes that are moved, and the cycles that those take at
the memory's published bandwidth and an assumed clock: a decode step should take no longer than its bytes.

`--rpa` counts jax's ragged paged attention beside it, bfloat16 pages of 128 slots without a window (under one it reads the same
pages), at blocks of so many pages / queries. Its loops are query blocks (1), their sequences (2) and blocks of keys (3).

`--rpa3` counts its third version, the decode kernel of vLLM's TPU path, at blocks of so many keys to fetch / to compute with,
with and without a window. It comes from the folder that `pip download --no-deps tpu-inference` and `unzip` made. Its loops are
sequences (1), blocks (2), products and pages (3); it also writes the step's own keys, as ours leaves to the caller.

Left out: waits for copies and for products, and the XLA operations around the kernel.
"""

import argparse
import importlib
import json
import os
import subprocess
import sys
import tempfile
import types
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.tpu_schedule import EDGE, KINDS, TOPOLOGIES, Region, read_regions

BYTES_PER_CYCLE = {"v6e": 1640 / 1.75}  # HBM GB/s over GHz; the clock is an assumption
# (type of the pages, window, slots in a page); a window layer's ring holds 256 slots.
CASES = [
    ("bfloat16", None, 128),
    ("int8", None, 128),
    ("float8_e4m3fn", None, 128),
    ("bfloat16", 128, 64),
    ("int8", 128, 128),
]
LONG = 100  # a loop of at least this many bundles without products belongs to the path for long items
CLEAR = 100  # and at depth 3 one of this many clears 128 values


def compile_here(args: argparse.Namespace, kv_dtype: str, window: int | None, page_size: int) -> Any:
    """Compiles one decode call; returns its static plan."""
    import jax
    import jax.numpy as jnp
    import numpy as np
    from jax.experimental import topologies

    from pallas_kernels.paged_attention import paged_attention, tpu
    from pallas_kernels.paged_attention.pages import Pages
    from pallas_kernels.paged_attention.tuned import tiles

    devices = topologies.get_topology_desc(platform="tpu", topology_name=TOPOLOGIES[args.chip]).devices
    mesh = jax.sharding.Mesh(np.array(devices[:1]), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    here = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    heads, kv_heads = args.heads
    width = (args.context if window is None else 256) // page_size

    def array(shape: tuple[int, ...], dtype: Any) -> Any:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=here)

    kv = array((args.batch * width, kv_heads, page_size, 128), jnp.dtype(kv_dtype))
    scales = array(kv.shape[:3], jnp.float32) if kv.dtype.itemsize == 1 else None
    pages = Pages(kv, kv, scales, scales, array((args.batch, width), jnp.int32))
    q = array((args.batch, heads, 128), jnp.bfloat16)

    def step(q: Any, pages: Pages, starts: Any, lengths: Any) -> Any:
        kwargs = {"k_scales": pages.k_scales, "v_scales": pages.v_scales, "window": window, "implementation": "tpu"}
        return paged_attention(q, pages.k, pages.v, pages.table, starts, lengths, **kwargs)

    with jax.set_mesh(mesh):
        traced = jax.jit(step).trace(q, pages, array((args.batch + 1,), jnp.int32), array((args.batch,), jnp.int32))
        traced.lower(lowering_platforms=("tpu",)).compile()
    return tpu.make_plan(
        args.batch, heads // kv_heads, pages, window, 1.0, tiles(KINDS[args.chip], heads // kv_heads, 128), False
    )


def count(regions: list[Region], args: argparse.Namespace, plan: Any, window: int | None, itemsize: int) -> dict:
    """Cycles and bytes of one decode step; the sequences end at odd places, so both edges of their pages are cleared."""
    length = args.context - 29
    low = 0 if window is None else length - window
    pages = -(-length // plan.page_size) - low // plan.page_size
    blocks = -(-pages * plan.page_size // plan.keys)
    tiles = -(-pages * plan.page_size // plan.tile)
    place = (low - low // plan.page_size * plan.page_size, length - low // plan.page_size * plan.page_size)
    clears = -(-place[0] // 128) + tiles * plan.tile // 128 - place[1] // 128
    products = [r for r in regions if r.mxu > EDGE]
    if len(products) != 3:
        raise ValueError(f"expected 3 regions with products, found {[(r.bundles, r.mxu) for r in products]}")
    first, last = (next(i for i, r in enumerate(regions) if r is p) for p in (products[0], products[2]))
    runs = regions[:first] + regions[last + 1 :]  # what lies between is for long items
    rest = [r for r in runs if r.mxu <= EDGE and not (r.depth == 2 and r.bundles >= LONG)]
    item = sum(r.bundles for r in rest if r.depth == 1)
    block = sum(r.bundles for r in rest if r.depth == 2)
    page = sum(r.bundles for r in rest if r.depth >= 3 and r.bundles < CLEAR)
    clear = max((r.bundles for r in rest if r.depth >= 3 and r.bundles >= CLEAR), default=0)
    each = item + blocks * block + pages * page + clears * clear + tiles * products[0].bundles
    kv_heads, row = args.heads[1], 128 * itemsize + (4 if itemsize == 1 else 0)
    moved = 2 * pages * plan.page_size * kv_heads * row + 2 * kv_heads * plan.padded * 128 * 4
    return {"cycles": args.batch * each, "tile": products[0].bundles, "bytes": args.batch * moved}


def rpa(args: argparse.Namespace, blocks: str) -> dict:
    """Cycles and bytes of the same decode step in jax's kernel; compiles it with the dump on."""
    import jax
    import jax.numpy as jnp
    import numpy as np
    from jax.experimental import topologies
    from jax.experimental.pallas.ops.tpu.ragged_paged_attention import ragged_paged_attention

    pages_at_once, queries_at_once = map(int, blocks.split("/"))
    with tempfile.TemporaryDirectory() as dump:
        os.environ["LIBTPU_INIT_ARGS"] = f"--xla_jf_dump_to={dump} --xla_jf_dump_llo_text=true"  # libtpu reads it once
        devices = topologies.get_topology_desc(platform="tpu", topology_name=TOPOLOGIES[args.chip]).devices
        mesh = jax.sharding.Mesh(np.array(devices[:1]), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
        here = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
        (heads, kv_heads), width = args.heads, args.context // 128
        q = jax.ShapeDtypeStruct((args.batch, heads, 128), jnp.bfloat16, sharding=here)
        pages = jax.ShapeDtypeStruct((args.batch * width, 128, 2 * kv_heads, 128), jnp.bfloat16, sharding=here)
        shapes = ((args.batch,), (args.batch, width), (args.batch + 1,), (1,))
        ints = [jax.ShapeDtypeStruct(shape, jnp.int32, sharding=here) for shape in shapes]

        def step(*arrays: Any) -> Any:
            how = {"num_kv_pages_per_block": pages_at_once, "num_queries_per_block": queries_at_once}
            return ragged_paged_attention(*arrays, sm_scale=128**-0.5, vmem_limit_bytes=96 * 2**20, **how)

        with jax.set_mesh(mesh):
            jax.jit(step).trace(q, pages, *ints).lower(lowering_platforms=("tpu",)).compile()
        bundles = next(b for b in Path(dump).glob("*-ragged_paged*-final_bundles.txt") if "analysis" not in b.name)
        usage = next(Path(dump).glob("*-ragged_paged*-final_hlo-static-per-bundle-utilization.txt"))
        regions = read_regions(bundles, usage)
    products = [r for r in regions if r.mxu > EDGE]
    if [r.depth for r in products] != [3]:
        raise ValueError(f"expected products at depth 3 alone, found {[(r.depth, r.bundles) for r in products]}")
    visits = -(-(args.context - 29) // (pages_at_once * 128))
    runs = {0: 1, 1: -(-args.batch // queries_at_once), 2: args.batch, 3: args.batch * visits}
    cycles = sum(r.bundles * runs[r.depth] for r in regions)
    moved = args.batch * (visits * pages_at_once * 128 * 2 * kv_heads + 2 * heads) * 128 * 2
    return {"cycles": cycles, "tile": products[0].bundles, "bytes": moved}


def rpa3(args: argparse.Namespace, blocks: str, window: int | None) -> dict:
    """As `rpa`, of version 3's kernel for sequences of one query."""
    import jax
    import jax.numpy as jnp
    import numpy as np
    from jax.experimental import topologies

    package = types.ModuleType("tpu_inference")  # its own __init__ wants vLLM
    package.__path__ = [str(args.tpu_inference / "tpu_inference")]
    sys.modules["tpu_inference"] = package
    kernel = importlib.import_module("tpu_inference.kernels.ragged_paged_attention.v3.kernel")
    version = {"v5e": 5, "v5p": 5, "v6e": 6, "tpu7x": 7}[args.chip]
    kernel.get_tpu_version = lambda: version  # it would ask the device, and there is none

    fetched, computed = map(int, blocks.split("/"))
    with tempfile.TemporaryDirectory() as dump:
        os.environ["LIBTPU_INIT_ARGS"] = f"--xla_jf_dump_to={dump} --xla_jf_dump_llo_text=true"  # libtpu reads it once
        devices = topologies.get_topology_desc(platform="tpu", topology_name=TOPOLOGIES[args.chip]).devices
        mesh = jax.sharding.Mesh(np.array(devices[:1]), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
        here = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
        (heads, kv_heads), batch, width = args.heads, args.batch, args.context // 128
        pages_shape = (batch * width, 128, kv_heads, 2, 128)
        shapes = [(batch, heads, 128), (batch, kv_heads, 128), (batch, kv_heads, 128), pages_shape]
        arrays = [jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=here) for shape in shapes]
        sizes = [(batch,), (batch * width,), (batch + 1,), (3,)]
        arrays += [jax.ShapeDtypeStruct(size, jnp.int32, sharding=here) for size in sizes]

        def step(*arrays: Any) -> Any:
            how = {"d_block_sizes": (1, fetched, 1, computed), "m_block_sizes": (8, 512, 8, 512)}
            how |= {"sm_scale": 128**-0.5, "sliding_window": window, "vmem_limit_bytes": 96 * 2**20}
            return kernel.ragged_paged_attention(*arrays, **how)

        with jax.set_mesh(mesh):
            jax.jit(step, donate_argnums=3).trace(*arrays).lower(lowering_platforms=("tpu",)).compile()
        bundles = next(b for b in Path(dump).glob("*RPAd*final_bundles.txt") if "analysis" not in b.name)
        usage = next(Path(dump).glob("*RPAd*final_hlo-static-per-bundle-utilization.txt"))
        regions = read_regions(bundles, usage)
    products = [r for r in regions if r.mxu > EDGE]
    if [r.depth for r in products] != [3]:
        raise ValueError(f"expected products at depth 3 alone, found {[(r.depth, r.bundles) for r in products]}")
    length = args.context - 29
    low = 0 if window is None else (length - 1 - window) // fetched * fetched
    visits, tiles, pages = (-(-(length - low) // size) for size in (fetched, computed, 128))
    each = {depth: sum(r.bundles for r in regions if r.depth == depth and r.mxu <= EDGE) for depth in (1, 2, 3)}
    cycles = batch * (each[1] + visits * each[2] + pages * each[3] + tiles * products[0].bundles)
    moved = batch * (pages * 128 * 2 * kv_heads + 2 * heads) * 128 * 2
    return {"cycles": cycles, "tile": products[0].bundles, "bytes": moved}


def one(args: argparse.Namespace) -> None:
    """The child process: compile with the dump on, count, print one line of JSON."""
    if args.sizes:
        from pallas_kernels._tuned import shape
        from pallas_kernels.paged_attention import tuned

        tuned.table()[args.chip][shape(args.heads[0] // args.heads[1], 128)] = tuned.Tiles(*args.sizes)
    if args.rpa:
        print(json.dumps(rpa(args, args.rpa[0])))
        return
    kv_dtype, window, page_size = CASES[args.one]
    if args.rpa3:
        print(json.dumps(rpa3(args, args.rpa3[0], window)))
        return
    with tempfile.TemporaryDirectory() as dump:
        os.environ["LIBTPU_INIT_ARGS"] = f"--xla_jf_dump_to={dump} --xla_jf_dump_llo_text=true"
        plan = compile_here(args, kv_dtype, window, page_size)
        bundles = next(b for b in Path(dump).glob("*-paged_attention*-final_bundles.txt") if "analysis" not in b.name)
        usage = next(Path(dump).glob("*-paged_attention*-final_hlo-static-per-bundle-utilization.txt"))
        itemsize = 2 if kv_dtype == "bfloat16" else 1
        print(json.dumps(count(read_regions(bundles, usage), args, plan, window, itemsize)))


def in_child(args: argparse.Namespace, index: int, sizes: Any = None, peer: tuple[str, ...] = ()) -> dict | None:
    """What is found for a case, of a peer for its options; None with the reason printed. `sizes`: Tiles if not the table's."""
    command = [sys.executable, __file__, "--one", str(index), "--chip", args.chip, "--heads", *map(str, args.heads)]
    command += ["--batch", str(args.batch), "--context", str(args.context)]
    command += ["--sizes", json.dumps(sizes)] if sizes else []
    command += peer
    env = os.environ | {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    if done.returncode:
        print(f"{' '.join(peer)} {CASES[index]}: {done.stderr.strip().splitlines()[-1][:200]}", file=sys.stderr)
        return None
    return json.loads(done.stdout.strip().splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--chip", choices=TOPOLOGIES, default="v6e")
    parser.add_argument("--heads", type=int, nargs=2, default=(64, 8), metavar=("QUERY", "KV"))
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--context", type=int, default=8192)
    parser.add_argument("--rpa", nargs="*", default=[], metavar="PAGES/QUERIES")
    parser.add_argument("--rpa3", nargs="*", default=[], metavar="FETCHED/COMPUTED")
    parser.add_argument("--tpu-inference", type=Path, help="where the unpacked wheel lies")
    parser.add_argument("--one", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--sizes", type=json.loads, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one is not None:
        return one(args)
    print(
        f"{args.chip}, {args.heads[0]}/{args.heads[1]} heads of 128, batch {args.batch}, context {args.context}; one step:"
    )
    print("| pages | window | bundles of a tile | static cycles | MB | cycles of the bytes | cycles / those |")
    print("|---|---|---|---|---|---|---|")
    if args.rpa3 and args.tpu_inference is None:
        parser.error("--rpa3 needs --tpu-inference FOLDER")
    calls = [(f"{kind}, {slots} slots", window, i, ()) for i, (kind, window, slots) in enumerate(CASES)]
    calls += [(f"bfloat16, 128 slots, jax's at {blocks}", None, 0, ("--rpa", blocks)) for blocks in args.rpa]
    for blocks in args.rpa3:
        peer = ("--rpa3", blocks, "--tpu-inference", str(args.tpu_inference))
        calls += [(f"bfloat16, 128 slots, version 3 at {blocks}", CASES[i][1], i, peer) for i in (0, 3)]
    for name, window, i, peer in calls:
        if (found := in_child(args, i, peer=peer)) is None:
            raise SystemExit(1)
        row = f"| {name} | {window} | {found['tile']:,} | {found['cycles']:,} |"
        row += f" {found['bytes'] / 1e6:,.0f} |"
        if args.chip in BYTES_PER_CYCLE:
            memory = found["bytes"] / BYTES_PER_CYCLE[args.chip]
            row += f" {memory:,.0f} | {found['cycles'] / memory:.2f} |"
        print(row, flush=True)
    return None


if __name__ == "__main__":
    main()
