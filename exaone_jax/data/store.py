"""Documents by their number: in memory, or in the ArrayRecord files that `exaone-jax data prepare` writes."""

import hashlib
import json
import threading
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from exaone_jax.data.documents import Counts, Document
from exaone_jax.data.sources import MANIFEST, open_array_record
from exaone_jax.errors import ConfigError, InputError

LAYOUT = 1  # of prepared directories; a reader of another refuses them


class Store(Protocol):
    """lengths: int32 `[documents]`. has_masks: whether any document has a loss mask. fingerprint: of all content."""

    lengths: np.ndarray
    has_masks: bool
    counts: Counts
    fingerprint: str

    def __getitem__(self, number: int) -> Document: ...


class MemoryStore:
    """Documents tokenised on the spot."""

    def __init__(self, documents: Iterable[Document], counts: Counts):
        self._documents = list(documents)
        self.counts = counts
        self.lengths = np.array([len(document.tokens) for document in self._documents], np.int32)
        self.has_masks = any(document.loss_mask is not None for document in self._documents)
        digest = hashlib.sha256()
        for document in self._documents:
            digest.update(pack_document(document))
        self.fingerprint = hashlib.sha256(digest.digest() + self.lengths.tobytes()).hexdigest()

    def __getitem__(self, number: int) -> Document:
        return self._documents[number]


def pack_document(document: Document) -> bytes:
    """The bytes of a record: 0 or 1, whether a mask follows; tokens as little-endian int32; the mask, eight to a byte."""
    mask = b"" if document.loss_mask is None else np.packbits(document.loss_mask).tobytes()
    return bytes([document.loss_mask is not None]) + document.tokens.astype("<i4").tobytes() + mask


def unpack_document(record: bytes, length: int) -> Document:
    """The document of `length` tokens in a record. Raises InputError where the record is not of that length."""
    masked, mask_bytes = record[:1] == b"\x01", -(-length // 8)
    if len(record) != 1 + 4 * length + masked * mask_bytes:
        raise InputError(f"a record of {len(record)} bytes does not hold a document of {length} tokens")
    tokens = np.frombuffer(record, "<i4", length, 1).astype(np.int32, copy=False)
    packed = np.frombuffer(record, np.uint8, mask_bytes, 1 + 4 * length) if masked else None
    return Document(tokens, None if packed is None else np.unpackbits(packed, count=length).astype(bool))


class PreparedStore:
    """A directory that `exaone-jax data prepare` wrote: shards of records, the lengths of their documents, a manifest.

    Raises ConfigError where it is incomplete, changed since, or made with another tokenizer than `tokenizer` names.
    """

    def __init__(self, directory: Path, tokenizer: str):
        self._directory = directory
        manifest = read_manifest(directory)
        if manifest["tokenizer"] != tokenizer:
            raise ConfigError(f"{directory}: was prepared with another tokenizer than this run's; prepare it again")
        self._shards: list[dict[str, Any]] = manifest["shards"]
        for shard in self._shards:
            file = directory / f"{shard['name']}.array_record"
            size = file.stat().st_size if file.is_file() else None
            if size != shard["bytes"]:
                found = "missing" if size is None else f"{size:,} bytes"
                raise ConfigError(f"{file}: {found}; the manifest says {shard['bytes']:,} bytes")
        self.lengths = np.concatenate([np.zeros(0, np.int32), *(self._lengths(shard) for shard in self._shards)])
        self._ends = np.cumsum([shard["documents"] for shard in self._shards])
        self._readers: dict[int, Any] = {}
        self._lock = threading.Lock()
        self.counts = Counts(**manifest["counts"])
        self.has_masks = manifest["has_masks"]
        self.fingerprint = hashlib.sha256("".join(shard["sha256"] for shard in self._shards).encode()).hexdigest()

    def __getitem__(self, number: int) -> Document:
        place = int(np.searchsorted(self._ends, number, side="right"))
        shard = self._shards[place]
        record = number - int(self._ends[place]) + shard["documents"]
        try:
            (data,) = self._reader(place).read([record])
            return unpack_document(data, int(self.lengths[number]))
        except (RuntimeError, ValueError, IndexError) as error:
            file = self._directory / f"{shard['name']}.array_record"
            raise InputError(f"{file}, record {record}: not readable: {error}") from error

    def _reader(self, place: int) -> Any:
        """A shard's reader, opened once."""
        with self._lock:
            if place not in self._readers:
                self._readers[place] = open_array_record(
                    self._directory / f"{self._shards[place]['name']}.array_record"
                )
            return self._readers[place]

    def _lengths(self, shard: dict[str, Any]) -> np.ndarray:
        file = self._directory / f"{shard['name']}.lengths.npy"
        try:
            lengths = np.load(file, allow_pickle=False)
        except (OSError, ValueError) as error:
            raise ConfigError(f"{file}: not readable: {error}") from error
        if lengths.shape != (shard["documents"],) or int(lengths.sum()) != shard["tokens"]:
            raise ConfigError(f"{file}: does not agree with the manifest's documents and tokens")
        return lengths


def read_manifest(directory: Path) -> dict[str, Any]:
    """Raises ConfigError where it is not a manifest of this layout."""
    file = directory / MANIFEST
    try:
        manifest = json.loads(file.read_bytes())
        layout = manifest["layout"]
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{file}: not a manifest of prepared data: {error!r}") from error
    if layout != LAYOUT:
        raise ConfigError(f"{file}: layout is {layout!r}; this version reads {LAYOUT}")
    return manifest
