"""Tile sizes of the TPU kernels: as large as fit on chip, because the wider a tile, the more products a byte from HBM serves.

The sizes that bound them are data, keyed by the start of jax's `device_kind`.
"""

from collections.abc import Callable
from typing import NamedTuple

_LANES = 128


class Chip(NamedTuple):
    """vmem: bytes that a kernel's tiles may take. rows_forward, rows_backward: rows of a tile; vocab: most of its words."""

    vmem: int
    rows_forward: int
    rows_backward: int
    vocab_forward: int
    vocab_backward: int


class Tiles(NamedTuple):
    """rows: 128 times a power of two. vocab: a multiple of 128 that divides the vocabulary."""

    rows: int
    vocab: int


# v5p and TPU7x have half the VMEM of v5e and v6e.
_LARGE, _SMALL = Chip(104 * 2**20, 1024, 256, 512, 1280), Chip(54 * 2**20, 1024, 128, 512, 768)
_CHIPS = {"TPU v5 lite": _LARGE, "TPU v5e": _LARGE, "TPU v5": _SMALL, "TPU v6": _LARGE, "TPU7": _SMALL}


def chip(device_kind: str) -> Chip:
    """Of a device kind as jax names it; the smaller where it is none of the known ones."""
    return next((found for name, found in _CHIPS.items() if device_kind.startswith(name)), _SMALL)


def forward_tiles(device_kind: str, num_rows: int, size: int, vocab: int, itemsize: int) -> Tiles | None:
    """The tiles of the forward kernel, or None where none fit: x and weight twice each, and three tiles of scores."""

    def cost(tiles: Tiles) -> int:
        return 2 * size * itemsize * (tiles.rows + tiles.vocab) + 12 * tiles.rows * tiles.vocab

    found = chip(device_kind)
    return _largest(found.vmem, found.rows_forward, found.vocab_forward, num_rows, vocab, cost)


def backward_tiles(
    device_kind: str, num_rows: int, size: int, vocab: int, itemsize: int, weight_itemsize: int
) -> Tiles | None:
    """The tiles of the backward kernel, or None where none fit: x, weight and the weight's gradient twice each, its sum and
    two blocks of x's gradient in float32, and four tiles of scores."""

    def cost(tiles: Tiles) -> int:
        words = tiles.vocab * size * (2 * itemsize + 4 + 2 * weight_itemsize)
        return words + tiles.rows * size * (2 * itemsize + 8) + 16 * tiles.rows * tiles.vocab

    found = chip(device_kind)
    return _largest(found.vmem, found.rows_backward, found.vocab_backward, num_rows, vocab, cost)


def _largest(
    vmem: int, most_rows: int, most_words: int, num_rows: int, vocab: int, cost: Callable[[Tiles], int]
) -> Tiles | None:
    rows = most_rows
    while rows // 2 >= max(num_rows, _LANES):
        rows //= 2
    while rows >= _LANES:
        words = [n for n in range(_LANES, min(most_words, vocab) + 1, _LANES) if vocab % n == 0]
        fitting = [n for n in words if cost(Tiles(rows, n)) <= vmem]
        # Of tiles that fit, the first with a good share of the words wanted: then the rows are worth more.
        if fitting and (fitting[-1] >= min(words[-1], 256) or rows == _LANES):
            return Tiles(rows, fitting[-1])
        rows //= 2
    return None
