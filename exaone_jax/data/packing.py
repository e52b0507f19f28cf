"""Packing documents of any length into rows of one length."""

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import jax
import numpy as np

from exaone_jax.errors import InputError

Array = np.ndarray | jax.Array


class PackedRows(NamedTuple):
    """Rows of several documents; also one row (`[T]`) or a batch of them (`[B, T]`).

    tokens: int32 `[N, T]`.
    segment_ids: int32 `[N, T]`, 1, 2, … for the documents of a row in their order, each in one run; 0 is padding, last.
    loss_mask: bool `[N, T]`, which tokens are to be predicted; None: all.
    """

    tokens: Array
    segment_ids: Array
    loss_mask: Array | None = None


def pack(documents: Iterable[np.ndarray], length: int, pad_id: int) -> PackedRows:
    """Best-fit packing: each token of the documents (1-D, integers) lands in exactly one place.

    A document longer than `length` is cut into pieces, of which all but the last fill a row each; pieces do not see each
    other. The rest go, longest first, where they leave the least room (arXiv 2404.10830). The same documents in the same
    order give the same rows.

    Raises InputError where `length` is not positive or there is no token to pack.
    """
    if length < 1:
        raise InputError(f"rows must be at least one token long, found length {length}")
    pieces = [piece for document in documents for piece in _cut(document, length)]
    if not pieces:
        raise InputError("there is no token to pack: every document is empty")
    rows = _best_fit(pieces, length)
    tokens = np.full((len(rows), length), pad_id, np.int32)
    segment_ids = np.zeros((len(rows), length), np.int32)
    for row, members in enumerate(rows):
        end = 0
        for segment, member in enumerate(members, start=1):
            start, end = end, end + len(pieces[member])
            tokens[row, start:end], segment_ids[row, start:end] = pieces[member], segment
    return PackedRows(tokens, segment_ids)


def _cut(document: np.ndarray, length: int) -> Iterator[np.ndarray]:
    return (document[start : start + length] for start in range(0, len(document), length))


def _best_fit(pieces: list[np.ndarray], length: int) -> list[list[int]]:
    """Which pieces, by index, share each row."""
    rows: list[list[int]] = []
    with_room: list[list[int]] = [[] for _ in range(length + 1)]  # rows by the room they have left
    for piece in sorted(range(len(pieces)), key=lambda i: -len(pieces[i])):  # stable: ties stay in order
        size = len(pieces[piece])
        room = next((room for room in range(size, length + 1) if with_room[room]), None)
        if room is None:
            row, room = len(rows), length
            rows.append([])
        else:
            row = with_room[room].pop()
        rows[row].append(piece)
        with_room[room - size].append(row)
    return rows
