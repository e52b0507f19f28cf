"""Block sizes of the TPU kernel: `tuned.json`, by chip and shape, as `benchmarks/tpu_tune.py` found them."""

import functools
from pathlib import Path
from typing import NamedTuple

from pallas_kernels._tuned import find, read_table

TABLE = Path(__file__).with_name("tuned.json")


class Tiles(NamedTuple):
    """How much one step takes."""

    rows: int  # queries of a long item; a multiple of 16
    keys: int  # keys of one tile of scores; a multiple of 128
    block: int  # most keys that are fetched at once; a multiple of `keys`
    block_bytes: int  # about how many bytes of keys and values are fetched at once: latency times bandwidth, and some


@functools.cache
def table() -> dict[str, dict[str, Tiles]]:
    """{chip: {shape: Tiles}}. v5p and TPU7x have half the VMEM of v5e and v6e, so their items are shorter."""
    return read_table(TABLE, Tiles)


def tiles(device_kind: str, group: int, head_dim: int) -> Tiles:
    """Returns the block sizes for a device kind as jax names it; v6e's where it is none of the known ones."""
    return find(table(), device_kind, group, head_dim)
