"""Rows of packed documents with random access: `rows[i]` is a function of files, configuration, length and i alone.

Documents are dealt into blocks by a fixed permutation, and each block is packed by itself, so that a row is found without
packing what comes before it, and start-up needs only every block's number of rows. An epoch visits the blocks, and the rows
of a block, in an order of its own; the documents that share a row stay the same. Each document is in an epoch exactly once.
"""

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from exaone_jax.config.data import DataConfig, SourceConfig
from exaone_jax.data.documents import Counts, Document, Encoder
from exaone_jax.data.order import Interleave, permuted
from exaone_jax.data.packing import PackedRows, best_fit, lay
from exaone_jax.data.sources import is_prepared, parts_of
from exaone_jax.data.store import MemoryStore, PreparedStore, Store
from exaone_jax.errors import ConfigError, InputError
from exaone_jax.text import ChatTemplate, Tokenizer

_BLOCK_ROWS = 1024  # about
_BLOCK_DOCUMENTS = 1 << 16  # at most
_MANY = 1 << 62  # the length of what has no end


@dataclass(frozen=True)
class SourceReport:
    """Of one source, an epoch: documents and tokens as they are in its rows, and what `overlong` did.

    padding: the part of the rows that holds no token. counts: what encoding its records came to.
    """

    path: str
    documents: int
    rows: int
    tokens: int
    padding: float
    split: int
    truncated: int
    dropped: int
    counts: Counts

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


class Piece(NamedTuple):
    """`size` tokens of a document from `start` on."""

    document: int
    start: int
    size: int


class PackedSource:
    """The rows of one source: endless, `source[i]` is row i.

    seed: None leaves the order of the files.
    """

    def __init__(self, store: Store, config: DataConfig, length: int, pad_id: int, seed: tuple[int, ...] | None):
        self._store, self._length, self._pad_id, self._seed = store, length, pad_id, seed
        self._overlong, self._best_fit = config.overlong, config.packing == "best_fit"
        lengths = store.lengths
        tokens, long = int(lengths.sum()), lengths > length
        self.split, self.truncated, self.dropped = (
            int(long.sum()) if config.overlong == policy else 0 for policy in ("split", "truncate", "drop")
        )
        self.tokens = (
            tokens if config.overlong == "split" else int(np.minimum(lengths, length)[self._kept(lengths)].sum())
        )
        self.documents = len(lengths) - self.dropped
        per_block = _BLOCK_ROWS * length * max(1, len(lengths)) // max(1, tokens)
        self._block_size = min(max(1, per_block), _BLOCK_DOCUMENTS)
        self._rows_of_block = lru_cache(maxsize=16)(self._pack)
        blocks = range(-(-len(lengths) // self._block_size))
        self._rows_in_block = np.array([self._count(block) for block in blocks], np.int64)
        self._order_of = lru_cache(maxsize=4)(self._order)
        self.rows = int(self._rows_in_block.sum())

    def __getitem__(self, index: int) -> list[tuple[Piece, Document]]:
        """The pieces of a row, each with its tokens."""
        epoch, place = divmod(index, self.rows)
        order, ends = self._order_of(epoch)
        at = int(np.searchsorted(ends, place, side="right"))
        block = int(order[at])
        rows = self._rows_of_block(block)
        row = place - int(ends[at]) + len(rows)
        if self._seed is not None:
            row = int(permuted(np.array([row]), len(rows), *self._seed, epoch, block)[0])
        return [(piece, self._read(piece)) for piece in rows[row]]

    def _order(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """The blocks of an epoch in their order, and where the rows of each end."""
        order = np.arange(len(self._rows_in_block))
        if self._seed is not None:
            order = permuted(order, len(order), *self._seed, epoch)
        return order, np.cumsum(self._rows_in_block[order])

    def _pack(self, block: int) -> list[list[Piece]]:
        """The rows of a block: the pieces that fill one by themselves, then those that share."""
        numbers, full, rest = self._deal(block)
        rows = [
            [Piece(number, i * self._length, self._length)]
            for number, pieces in zip(numbers.tolist(), full.tolist(), strict=True)
            for i in range(pieces)
        ]
        shared = np.flatnonzero(rest)
        starts, sizes = (full[shared] * self._length).tolist(), rest[shared].tolist()
        ends = [Piece(*piece) for piece in zip(numbers[shared].tolist(), starts, sizes, strict=True)]
        return rows + [[ends[i] for i in row] for row in self._share(sizes)]

    def _count(self, block: int) -> int:
        """How many rows a block has."""
        _, full, rest = self._deal(block)
        return int(full.sum()) + len(self._share(rest[rest > 0].tolist()))

    def _share(self, sizes: list[int]) -> Sequence[Sequence[int]]:
        return best_fit(sizes, self._length) if self._best_fit else [(i,) for i in range(len(sizes))]

    def _deal(self, block: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Of each document of a block: its number, how many rows it fills, and the tokens it has besides."""
        total = len(self._store.lengths)
        numbers = np.arange(block * self._block_size, min((block + 1) * self._block_size, total))
        if self._seed is not None:
            numbers = permuted(numbers, total, *self._seed)
        lengths = self._store.lengths[numbers]
        numbers, lengths = numbers[self._kept(lengths)], lengths[self._kept(lengths)]
        return numbers, *np.divmod(
            lengths if self._overlong == "split" else np.minimum(lengths, self._length), self._length
        )

    def _kept(self, lengths: np.ndarray) -> np.ndarray:
        return (lengths > 0) & ((lengths <= self._length) | (self._overlong != "drop"))

    def _read(self, piece: Piece) -> Document:
        tokens, mask = self._store[piece.document]
        part = slice(piece.start, piece.start + piece.size)
        return Document(tokens[part], None if mask is None else mask[part])


class Rows:
    """`rows[i]` is row i, PackedRows `[T]`.

    For training it has no end: sources take their places by weight, each over and over, every time in another order. For
    evaluation the sources follow one another, each once, and what comes after is padding.

    Attributes:
      rows_per_epoch, tokens_per_epoch: of all sources, each once.
      fingerprint: of the documents, the configuration, the length and the tokenizer: the same one gives the same rows.
      report: of each source.
    """

    def __init__(self, sources: Sequence[PackedSource], weights: Sequence[float] | None, report: Sequence[SourceReport],
                 length: int, pad_id: int, masked: bool, fingerprint: str):  # fmt: skip
        """Args: weights, None for evaluation; masked, whether rows have loss masks."""
        self._sources, self._length, self._pad_id, self._masked = tuple(sources), length, pad_id, masked
        self._interleave = None if weights is None else Interleave(weights)
        self._ends = np.cumsum([source.rows for source in sources])
        self.rows_per_epoch = int(self._ends[-1])
        self.tokens_per_epoch = sum(source.tokens for source in sources)
        self.report, self.fingerprint = tuple(report), fingerprint

    def __getitem__(self, index: int) -> PackedRows:
        if index < 0:
            raise IndexError(f"row {index}: rows are counted from 0")
        documents = self._documents(index)
        masks = [document.loss_mask for document in documents] if self._masked else None
        return lay([document.tokens for document in documents], self._length, self._pad_id, masks)

    def _documents(self, index: int) -> list[Document]:
        if self._interleave is not None:
            source, place = self._interleave[index]
        elif index < self.rows_per_epoch:
            source = int(np.searchsorted(self._ends, index, side="right"))
            place = index - int(self._ends[source]) + self._sources[source].rows
        else:
            return []
        return [document for _, document in self._sources[source][place]]


def open_rows(
    config: DataConfig,
    tokenizer: Tokenizer,
    template: ChatTemplate | None,
    length: int,
    *,
    evaluation: bool = False,
) -> Rows:
    """The rows of `length` tokens of a configuration's sources, or with `evaluation` of those held out.

    What `exaone-jax data prepare` wrote is read as it is needed; other sources are tokenised here and kept in memory.

    Raises ConfigError or InputError where a source is missing, empty, malformed (with file and row) or made for another
    tokenizer.
    """
    if length < 1:
        raise ConfigError(f"rows must be at least one token long, found length {length}")
    chosen = config.eval_sources if evaluation else config.sources
    if not chosen:
        raise ConfigError("eval_sources: empty; there is nothing to evaluate on")
    pad_id = 0 if tokenizer.pad_id is None else tokenizer.pad_id
    shuffle = config.shuffle and not evaluation
    stores = [open_store(source, config, tokenizer, template) for source in chosen]
    packed = [
        PackedSource(store, config, length, pad_id, (config.seed, number) if shuffle else None)
        for number, store in enumerate(stores)
    ]
    for source, rows in zip(chosen, packed, strict=True):
        if not rows.rows:
            why = (
                f"all {rows.dropped:,} documents are longer than a row of {length:,}" if rows.dropped else "no document"
            )
            raise ConfigError(f"{source.path}: nothing to train on: {why}")
    weights = None if evaluation else [source.weight for source in chosen]
    identity = [
        length,
        tokenizer.fingerprint,
        weights,
        config.seed if shuffle else None,
        config.packing,
        config.overlong,
    ]
    fingerprint = hashlib.sha256(json.dumps([*identity, *(store.fingerprint for store in stores)]).encode()).hexdigest()
    masked = any(store.has_masks for store in stores)
    report = [_report(*each, length) for each in zip(chosen, packed, stores, strict=True)]
    return Rows(packed, weights, report, length, pad_id, masked, fingerprint)


def open_store(
    source: SourceConfig, config: DataConfig, tokenizer: Tokenizer, template: ChatTemplate | None
) -> MemoryStore | PreparedStore:
    """The documents of a source."""
    if is_prepared(source.path):
        return PreparedStore(Path(source.path), tokenizer.fingerprint)
    encoder, counts = Encoder(tokenizer, template, source, config.chat_template_kwargs), Counts()
    records = (record for part in parts_of(source) for record in part.records())
    return MemoryStore(encoder.documents(records, counts), counts)


def _report(source: SourceConfig, rows: PackedSource, store: Store, length: int) -> SourceReport:
    return SourceReport(
        path=source.path,
        documents=rows.documents,
        rows=rows.rows,
        tokens=rows.tokens,
        padding=1 - rows.tokens / (rows.rows * length),
        split=rows.split,
        truncated=rows.truncated,
        dropped=rows.dropped,
        counts=store.counts,
    )


class _Batches:
    """A Grain source of which element k is batch `start + k`, or some of its rows."""

    def __init__(self, rows: Rows, start: int, batch_size: int, local: Sequence[int]):
        self._rows, self._start, self._batch_size, self._local = rows, start, batch_size, tuple(local)

    def __len__(self) -> int:
        return _MANY

    def __getitem__(self, index: int) -> PackedRows:
        first = (self._start + index) * self._batch_size
        tokens, segment_ids, masks = zip(*(self._rows[first + row] for row in self._local), strict=True)
        return PackedRows(np.stack(tokens), np.stack(segment_ids), None if masks[0] is None else np.stack(masks))


def batches(
    rows: Rows,
    start: int,
    batch_size: int,
    local: slice | Sequence[int] | None = None,
    *,
    threads: int = 2,
    prefetch: int = 4,
) -> Iterator[PackedRows]:
    """Batches `[local rows, T]` from batch `start` on, without end: batch k is rows `[k B, (k + 1) B)`.

    local: which rows of each batch, for a host that computes only those; all if None. So the position of a run in its data
    is one number, the same on every host and for any number of them. threads, prefetch: batches are made ahead of use.

    Raises InputError where `batch_size` is not positive, or `local` names no row of a batch or one that it has not.
    """
    if batch_size < 1 or start < 0:
        raise InputError(f"expected a batch_size from 1 and a start from 0, found {batch_size} and {start}")
    chosen = range(batch_size)[slice(None) if local is None else local] if not isinstance(local, Sequence) else local
    if not chosen or not all(0 <= row < batch_size for row in chosen):
        raise InputError(f"local: expected rows from 0 to {batch_size - 1}, found {list(chosen)}")
    import grain  # here, because it brings jax, which the processes that tokenise need not load

    source = grain.MapDataset.source(_Batches(rows, start, batch_size, chosen))
    return iter(source.to_iter_dataset(grain.ReadOptions(num_threads=threads, prefetch_buffer_size=prefetch)))
