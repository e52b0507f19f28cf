"""Tile sizes of the TPU kernels, as data: what `benchmarks/tpu_schedule.py` counted fewest bundles for.

Keyed by the start of jax's `device_kind`. Counted for bfloat16, head dimension 128, 8 query heads on a kv head, T = 8192.
"""

from typing import NamedTuple


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


# v5p and TPU7x have half the VMEM of v5e and v6e.
_V6E = Tiles(8192, 4, 2, 2048, 1024, 512, 1024, 8192)
_TILES = {
    "TPU v5 lite": _V6E,
    "TPU v5e": _V6E,
    "TPU v5": _V6E._replace(flash_chunk=4096),
    "TPU v6": _V6E,
    "TPU7": _V6E._replace(flash_chunk=4096),
}


def tiles(device_kind: str) -> Tiles:
    """Returns the tile sizes for a device kind as jax names it; v6e's where it is none of the known ones."""
    for name, found in _TILES.items():
        if device_kind.startswith(name):
            return found
    return _V6E
