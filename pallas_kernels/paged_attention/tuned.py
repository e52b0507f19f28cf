"""Block sizes of the TPU kernel, as data; keyed by the start of jax's `device_kind`."""

from typing import NamedTuple


class Tiles(NamedTuple):
    """How much one step takes."""

    rows: int  # queries of a long item; a multiple of 16
    keys: int  # keys of one tile of scores; a multiple of 128
    block: int  # most keys that are fetched at once; a multiple of `keys`
    block_bytes: int  # about how many bytes of keys and values are fetched at once: latency times bandwidth, and some


# v5p and TPU7x have half the VMEM of v5e and v6e.
_V6E = Tiles(rows=128, keys=512, block=2048, block_bytes=4 * 2**20)
_TILES = {
    "TPU v5 lite": _V6E,
    "TPU v5e": _V6E,
    "TPU v5": _V6E._replace(rows=64),
    "TPU v6": _V6E,
    "TPU7": _V6E._replace(rows=64),
}


def tiles(device_kind: str) -> Tiles:
    """Returns the block sizes for a device kind as jax names it; v6e's where it is none of the known ones."""
    for name, found in _TILES.items():
        if device_kind.startswith(name):
            return found
    return _V6E
