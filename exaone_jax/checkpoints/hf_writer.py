"""Writes a Hugging Face checkpoint directory: shards filled from several threads, their index, in a given layout."""

import json
import os
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from exaone_jax.checkpoints.atomic import storage_errors, write_new
from exaone_jax.checkpoints.directory import INDEX_FILE, SINGLE_FILE
from exaone_jax.checkpoints.safetensors import DTYPE_BITS, Bits, Header, TensorInfo, build_header
from exaone_jax.errors import CheckpointError

MAX_SHARD_BYTES = 5 * 10**9


@dataclass(frozen=True)
class HFLayout:
    """The weight files to write: name -> header, and the bytes of the index (None: a single file needs none)."""

    files: dict[str, Header]
    index: bytes | None

    @property
    def nbytes(self) -> int:
        return sum(header.file_size for header in self.files.values()) + len(self.index or b"")


def plan_layout(tensors: Mapping[str, TensorInfo], max_shard_bytes: int = MAX_SHARD_BYTES) -> HFLayout:
    """The layout of a checkpoint that has none yet: shards of at most 5 GB in the order of `tensors`, HF's file names.

    A tensor larger than `max_shard_bytes` gets a shard of its own.
    """
    shards: list[dict[str, TensorInfo]] = [{}]
    filled = 0
    for name, info in tensors.items():
        if shards[-1] and filled + info.nbytes > max_shard_bytes:
            shards.append({})
            filled = 0
        shards[-1][name] = info
        filled += info.nbytes
    headers = [build_header((name, info.dtype, info.shape) for name, info in shard.items()) for shard in shards]
    if len(headers) == 1:
        return HFLayout({SINGLE_FILE: headers[0]}, None)
    names = [f"model-{number:05d}-of-{len(headers):05d}.safetensors" for number in range(1, len(headers) + 1)]
    files = dict(zip(names, headers, strict=True))
    return HFLayout(files, _index(files))


def _index(files: Mapping[str, Header]) -> bytes:
    infos = [info for header in files.values() for info in header.tensors.values()]
    metadata = {
        "total_parameters": sum(info.nbytes * 8 // DTYPE_BITS[info.dtype] for info in infos),
        "total_size": sum(info.nbytes for info in infos),
    }
    weight_map = {name: file for file, header in files.items() for name in header.tensors}
    return json.dumps({"metadata": metadata, "weight_map": weight_map}, indent=2, sort_keys=True).encode() + b"\n"


class HFWriter:
    """Fills the weight files of a layout in a (partial) directory; `finish` writes the index last."""

    def __init__(self, root: Path, layout: HFLayout):
        self.root, self.layout = root, layout
        self._place: dict[str, tuple[str, TensorInfo]] = {}
        self._fds: dict[str, int] = {}
        # The kernel lets one thread at a time write to a file; others would wait for it spinning.
        self._locks = {name: threading.Lock() for name in layout.files}
        try:
            for name, header in layout.files.items():
                self._create(name, header)
        except BaseException:
            self.close()
            raise

    def _create(self, name: str, header: Header) -> None:
        with storage_errors(str(self.root / name)):
            self._fds[name] = os.open(self.root / name, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
            os.ftruncate(self._fds[name], header.file_size)
            _write_all(self._fds[name], header.raw, 0)
        self._place |= {tensor: (name, info) for tensor, info in header.tensors.items()}

    def write_rows(self, name: str, begin: int, end: int, bits: Bits) -> None:
        """Rows `begin:end` of a tensor as raw bits. Threads may write at once."""
        file, info = self._place[name]
        row_bytes = info.nbytes // info.shape[0] if info.shape else info.nbytes
        if bits.nbytes != (end - begin) * row_bytes and info.shape:
            raise CheckpointError(f"tensor {name!a}: {bits.nbytes} bytes for {end - begin} rows of {row_bytes}")
        with storage_errors(str(self.root / file)), self._locks[file]:
            _write_all(self._fds[file], bits.reshape(-1).view("u1").data, info.start + begin * row_bytes)

    def finish(self) -> None:
        """Close the weight files and write the index."""
        self.close()
        if self.layout.index is not None:
            write_new(self.root / INDEX_FILE, self.layout.index)

    def close(self) -> None:
        for fd in self._fds.values():
            os.close(fd)
        self._fds.clear()


def _write_all(fd: int, data: bytes | memoryview, offset: int) -> None:
    view = memoryview(data)
    while view:
        count = os.pwrite(fd, view, offset)
        view, offset = view[count:], offset + count
