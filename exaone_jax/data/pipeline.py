"""From packed rows to an endless, shuffled stream of batches with random access."""

import grain

from exaone_jax.data.packing import PackedRows
from exaone_jax.errors import InputError


class _Rows:
    """PackedRows as a Grain source: `source[i]` is row i."""

    def __init__(self, rows: PackedRows):
        self._rows = rows

    def __len__(self) -> int:
        return len(self._rows.tokens)

    def __getitem__(self, index: int) -> PackedRows:
        return PackedRows(self._rows.tokens[index], self._rows.segment_ids[index])


def pipeline(rows: PackedRows, batch_size: int, seed: int) -> "grain.MapDataset[PackedRows]":
    """Batches `[B, T]` without end, in another order of rows each epoch.

    Batch i is a function of (rows, batch_size, seed, i) alone, so the position of a run in its data is its step number.
    Rows that do not fill the last batch of an epoch open the first of the next one.

    Raises InputError where there are fewer rows than a batch holds.
    """
    if not 1 <= batch_size <= len(rows.tokens):
        raise InputError(f"batch_size must be from 1 to the {len(rows.tokens)} rows there are, found {batch_size}")
    return grain.MapDataset.source(_Rows(rows)).seed(seed).shuffle().repeat().batch(batch_size)
