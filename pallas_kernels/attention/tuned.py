"""Tile sizes of the TPU kernels: `tuned.json`, by chip and shape, as `benchmarks/tpu_tune.py` found them."""

import functools
from pathlib import Path
from typing import NamedTuple

from pallas_kernels._tuned import find, read_table

TABLE = Path(__file__).with_name("tuned.json")


class Tiles(NamedTuple):
    """Everything is in rows or keys, and a multiple of 128."""

    window_rows: int  # rows (queries x heads of a group) of one grid step of the window kernels
    window_unroll: int  # query tiles that the window forward lays side by side, so that the scheduler can overlap them
    window_unroll_backward: int
    flash_rows: int  # rows of one grid step of the flash forward
    flash_rows_backward: int
    flash_keys: int  # keys of one tile of scores
    flash_block: int  # keys that one grid step of the flash forward fetches; a multiple of flash_keys
    flash_chunk: int  # keys whose gradients the flash backward holds on chip; a multiple of flash_keys


@functools.cache
def table() -> dict[str, dict[str, Tiles]]:
    """{chip: {shape: Tiles}}. v5p and TPU7x have half the VMEM of v5e and v6e, so their chunks are shorter."""
    return read_table(TABLE, Tiles)


def tiles(device_kind: str, group: int, head_dim: int) -> Tiles:
    """Returns the tile sizes for a device kind as jax names it; v6e's where it is none of the known ones."""
    return find(table(), device_kind, group, head_dim)
