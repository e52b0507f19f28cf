"""Packing documents of any length into rows of one length."""

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, NamedTuple, TypeAlias

import numpy as np

from exaone_jax.errors import InputError

if TYPE_CHECKING:
    import jax  # not when it runs: the processes that tokenise need none

    Array: TypeAlias = np.ndarray | jax.Array


class PackedRows(NamedTuple):
    """Rows of several documents; also one row (`[T]`) or a batch of them (`[B, T]`).

    tokens: int32 `[N, T]`.
    segment_ids: int32 `[N, T]`, 1, 2, … for the documents of a row in their order, each in one run; 0 is padding, last.
    loss_mask: bool `[N, T]`, which tokens are to be predicted; None: all.
    """

    tokens: "Array"
    segment_ids: "Array"
    loss_mask: "Array | None" = None


def pack(documents: Iterable[np.ndarray], length: int, pad_id: int) -> PackedRows:
    """Best-fit packing: each token of the documents (1-D, integers) lands in exactly one place.

    A document longer than `length` is cut into pieces, of which all but the last fill a row each; pieces do not see each
    other. The rest go, longest first, where they leave the least room (arXiv 2404.10830). The same documents in the same
    order give the same rows.

    Raises InputError where `length` is not positive or there is no token to pack.
    """
    if length < 1:
        raise InputError(f"rows must be at least one token long, found length {length}")
    pieces = [document[start : start + length] for document in documents for start in range(0, len(document), length)]
    if not pieces:
        raise InputError("there is no token to pack: every document is empty")
    rows = [lay([pieces[i] for i in row], length, pad_id) for row in best_fit([len(p) for p in pieces], length)]
    return PackedRows(np.stack([row.tokens for row in rows]), np.stack([row.segment_ids for row in rows]))


def lay(
    pieces: Sequence[np.ndarray], length: int, pad_id: int, masks: Sequence[np.ndarray | None] | None = None
) -> PackedRows:
    """One row `[T]` of pieces, one after the other. masks: bool, as the pieces; None is a piece of which all tokens count."""
    tokens, segment_ids = np.full(length, pad_id, np.int32), np.zeros(length, np.int32)
    loss_mask = None if masks is None else np.zeros(length, bool)
    end = 0
    for segment, piece in enumerate(pieces, start=1):
        start, end = end, end + len(piece)
        tokens[start:end], segment_ids[start:end] = piece, segment
        if masks is not None and loss_mask is not None:
            mask = masks[segment - 1]
            loss_mask[start:end] = True if mask is None else mask
    return PackedRows(tokens, segment_ids, loss_mask)


def best_fit(sizes: Sequence[int], length: int) -> list[list[int]]:
    """Which pieces, by index, share each row; sizes are from 1 to `length`."""
    rows: list[list[int]] = []
    with_room: dict[int, list[int]] = {}  # rows by the room they have left
    rooms = 0  # the keys of with_room as bits: the least room that is enough is the lowest bit from `size` on
    for piece in np.argsort(-np.asarray(sizes, np.int64), kind="stable").tolist():  # stable: ties stay in order
        size = sizes[piece]
        enough = rooms >> size
        if enough:
            room = size + (enough & -enough).bit_length() - 1
            row = with_room[room].pop()
            if not with_room[room]:
                rooms ^= 1 << room
        else:
            row, room = len(rows), length
            rows.append([])
        rows[row].append(piece)
        left = room - size
        if left:
            with_room.setdefault(left, []).append(row)
            rooms |= 1 << left
    return rows
