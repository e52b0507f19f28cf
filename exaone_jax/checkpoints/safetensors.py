"""The safetensors format, read strictly and written by ourselves.

Reader: every rule of the format's README, and some that libraries leave out (duplicate names, holes, overlaps, trailing bytes,
header bombs), checked from the header and the file's size before any tensor byte is read. Reads are `preadv`, never a memory
map: a file that shrinks after it was opened is an error and not a SIGBUS. Writer: a header is a function of its tensors alone.
"""

import json
import math
import os
import stat
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray

from exaone_jax.errors import CheckpointError

Bits = NDArray[
    np.unsignedinteger[Any]
]  # tensor data as unsigned integers of the dtype's width: no float op can touch it

DTYPE_BITS = {
    **dict.fromkeys(("F4", "F4_E2M1"), 4),
    **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    **dict.fromkeys(("U16", "I16", "F16", "BF16"), 16),
    **dict.fromkeys(("U32", "I32", "F32"), 32),
    **dict.fromkeys(("U64", "I64", "F64", "C64"), 64),
}
MAX_HEADER_BYTES = 100_000_000  # cap of the reference implementation
SMALL_HEADER_BYTES = 16 << 20  # beyond this a header may not be larger than the data it describes
MAX_TENSORS = 250_000  # the largest EXAONE has 59,396 in all its files together
_MAX_DIMENSION = 2**53
_MAX_READ = 1 << 30  # Linux moves at most 2 GiB - 4 KiB in one call
_ENTRY_FIELDS = {"dtype", "shape", "data_offsets"}
_HEAD = 512  # bytes looked at to say what a file that is no safetensors really is


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """dtype (safetensors spelling), shape, and where the bytes lie: `start` counts from the beginning of the file."""

    dtype: str
    shape: tuple[int, ...]
    start: int = 0

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * DTYPE_BITS[self.dtype] // 8


@dataclass(frozen=True)
class Header:
    """A checked header. raw: its bytes with the 8 of the length; tensors: in the order in which the header names them."""

    raw: bytes
    tensors: dict[str, TensorInfo]
    metadata: dict[str, str]
    warnings: tuple[str, ...] = ()

    @property
    def file_size(self) -> int:
        return len(self.raw) + sum(tensor.nbytes for tensor in self.tensors.values())


@dataclass
class _Parser:
    where: str
    warnings: list[str] = field(default_factory=list)

    def fail(self, problem: str) -> NoReturn:
        raise CheckpointError(f"{self.where}: {problem}")

    def pairs(self, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(pairs)
        if len(result) != len(pairs):
            seen: set[str] = set()
            twice = next(key for key, _ in pairs if key in seen or seen.add(key))
            self.fail(f"duplicate name {twice!a} in the header")
        return result

    def parse(self, text: bytes) -> dict[str, Any]:
        try:
            header = json.loads(text.decode("utf-8"), object_pairs_hook=self.pairs)
        except (ValueError, RecursionError) as error:
            if isinstance(error, CheckpointError):
                raise
            self.fail(f"the header is not valid JSON: {error}")
        return header

    def metadata(self, header: dict[str, Any]) -> dict[str, str]:
        metadata = header.pop("__metadata__", {})
        if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
            self.fail("__metadata__ must map strings to strings")
        return metadata

    def entry(self, name: str, entry: object) -> tuple[str, tuple[int, ...], int, int]:
        """-> dtype, shape, begin, end, each valid by itself and agreeing with one another."""
        quoted = f"tensor {name!a}"
        if not isinstance(entry, dict) or not entry.keys() >= _ENTRY_FIELDS:
            self.fail(f"{quoted}: expected an object with dtype, shape and data_offsets")
        if extra := sorted(entry.keys() - _ENTRY_FIELDS):
            self.warnings.append(f"{self.where}: {quoted} has fields that the format does not know: {extra}")
        dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
        if not isinstance(dtype, str) or dtype not in DTYPE_BITS:
            self.fail(f"{quoted}: unknown dtype {dtype!a}")
        if not _is_sizes(shape) or any(size > _MAX_DIMENSION for size in shape):
            self.fail(f"{quoted}: shape {ascii(shape)[:200]} is not a list of sizes")
        if not _is_sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
            self.fail(f"{quoted}: data_offsets {ascii(offsets)[:200]} are not [begin, end] with 0 <= begin <= end")
        bits = math.prod(shape) * DTYPE_BITS[dtype]
        if bits != 8 * (offsets[1] - offsets[0]):
            self.fail(
                f"{quoted}: {dtype} of shape {list(shape)} needs {bits / 8:g} bytes, its data_offsets {offsets} span "
                f"{offsets[1] - offsets[0]}"
            )
        return dtype, tuple(shape), offsets[0], offsets[1]


def _is_sizes(value: object) -> bool:
    return isinstance(value, list) and all(type(item) is int and item >= 0 for item in value)


def describe_foreign(head: bytes) -> str | None:
    """What a file that begins with `head` is, where it is something often found under the name of a weight file."""
    text = head.lstrip().lower()
    if head.startswith(b"version https://git-lfs"):
        return "a git-lfs pointer, not the file itself: run `git lfs pull`"
    if text.startswith((b"<!doctype", b"<html", b"<?xml", b"<head")):
        return "an HTML or XML page (a failed download?)"
    if head.startswith(b"PK\x03\x04"):
        return "a zip archive (torch.save writes such files), which may run code when loaded: only safetensors are read"
    if head[:1] == b"\x80" and head[1:2] in (b"\x02", b"\x03", b"\x04", b"\x05"):
        return "a pickle, which may run code when loaded: only safetensors are read"
    for magic, kind in ((b"GGUF", "a GGUF file"), (b"\x1f\x8b", "a gzip archive"), (b"\x89HDF", "an HDF5 file")):
        if head.startswith(magic):
            return kind
    if head and not head.strip(b"\0"):
        return "a file of zero bytes (an interrupted write or download?)"
    return None


def _check_length(head: bytes, file_size: int, where: str) -> int:
    """The header's length from the first bytes of a file, or an error that says what the file is instead."""
    if file_size == 0:
        raise CheckpointError(f"{where}: the file is empty")
    length = int.from_bytes(head[:8], "little")
    problem = None
    if file_size < 8:
        problem = f"{file_size} bytes cannot hold a safetensors header"
    elif length > MAX_HEADER_BYTES:
        problem = f"header length {length} is more than the allowed {MAX_HEADER_BYTES}"
    elif length > file_size - 8:
        problem = f"truncated: header length {length} in a file of {file_size} bytes"
    elif length < 2 or head[8:9] != b"{":
        problem = "the header does not begin with '{'"
    if problem is None:
        return length
    kind = describe_foreign(head)
    raise CheckpointError(f"{where}: not a safetensors file: " + (f"it is {kind}" if kind else problem))


def parse_header(raw: bytes, file_size: int, where: str) -> Header:
    """Check the header bytes `raw` (with the 8 bytes of length) of a file of `file_size` bytes.

    Raises:
        CheckpointError: naming `where`, the tensor, what was found and what was expected.
    """
    length, parser = _check_length(raw[:_HEAD], file_size, where), _Parser(where)
    text, data_bytes = raw[8:], file_size - 8 - length
    if len(text) != length:
        parser.fail(f"truncated: {len(text)} header bytes, expected {length}")
    if length > max(SMALL_HEADER_BYTES, data_bytes):
        parser.fail(f"header of {length} bytes for {data_bytes} bytes of data: refused as a header bomb")
    if text.count(b'"data_offsets"') > MAX_TENSORS:
        parser.fail(f"more than {MAX_TENSORS} tensors in one file: refused as a header bomb")
    if not text.rstrip(b" ").endswith(b"}"):
        parser.fail("the header must end with '}' and then nothing but spaces")
    header = parser.parse(text)
    metadata = parser.metadata(header)
    entries = {name: parser.entry(name, entry) for name, entry in header.items()}
    _check_cover(parser, {name: entry[2:] for name, entry in entries.items()}, data_bytes)
    tensors = {name: TensorInfo(dtype, shape, len(raw) + begin) for name, (dtype, shape, begin, _) in entries.items()}
    return Header(raw, tensors, metadata, tuple(parser.warnings))


def _check_cover(parser: _Parser, spans: Mapping[str, tuple[int, int]], data_bytes: int) -> None:
    """The spans cover the data without hole or overlap, from the first byte to the last."""
    position, previous = 0, "the header"
    for name, (begin, end) in sorted(spans.items(), key=lambda item: item[1]):
        quoted = f"tensor {name!a}"
        if end > data_bytes:
            parser.fail(f"truncated: {quoted} ends at byte {end} of the data, the file has {data_bytes}")
        if begin > position:
            parser.fail(f"a hole of {begin - position} bytes between {previous} and {quoted}")
        if begin < position:
            parser.fail(f"{quoted} overlaps {previous} by {position - begin} bytes")
        position, previous = end, quoted
    if position < data_bytes:
        parser.fail(f"{data_bytes - position} trailing bytes after the last tensor")


class SafetensorsFile:
    """One open safetensors file whose header has been checked. Reads may come from several threads.

    Raises:
        CheckpointError: the file is absent, no regular file, or breaks a rule of the format.
    """

    def __init__(self, path: Path | str):
        self.path = Path(path)
        try:
            self._fd = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        except OSError as error:
            raise CheckpointError(f"{self.path}: cannot be opened: {error.strerror}") from error
        try:
            self.header = self._read_header()
        except BaseException:
            self.close()
            raise

    def _read_header(self) -> Header:
        status = os.fstat(self._fd)
        if not stat.S_ISREG(status.st_mode):
            kind = "a directory" if stat.S_ISDIR(status.st_mode) else "not a regular file"
            raise CheckpointError(f"{self.path}: {kind}, expected a safetensors file")
        head = os.pread(self._fd, _HEAD, 0)
        length = _check_length(head, status.st_size, str(self.path))
        raw = np.empty(8 + length, np.uint8)
        self._read(raw, 0)
        return parse_header(raw.tobytes(), status.st_size, str(self.path))

    def _read(self, out: NDArray[np.uint8], start: int) -> None:
        """Fill `out` from byte `start` of the file."""
        done, total = 0, out.size
        while done < total:
            count = os.preadv(self._fd, [out.data[done : done + _MAX_READ]], start + done)
            if count == 0:
                raise CheckpointError(
                    f"{self.path}: truncated after it was opened: {total - done} bytes at {start + done} are gone"
                )
            done += count

    def read_rows(self, name: str, begin: int = 0, end: int | None = None) -> Bits:
        """Rows `begin:end` of a tensor as raw bits, shape `[end - begin, ...]`; a scalar has shape `[]` and no rows."""
        tensor = self.header.tensors[name]
        width = DTYPE_BITS[tensor.dtype] // 8
        if DTYPE_BITS[tensor.dtype] % 8:
            raise CheckpointError(f"{self.path}: tensor {name!a} of dtype {tensor.dtype} cannot be read in rows")
        shape, offset = tensor.shape, 0
        if shape:
            offset = begin * math.prod(shape[1:]) * width
            shape = ((shape[0] if end is None else end) - begin, *shape[1:])
        out = np.empty(math.prod(shape) * width, np.uint8)
        self._read(out, tensor.start + offset)
        return out.view(f"<u{width}").reshape(shape)

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def __enter__(self) -> "SafetensorsFile":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def build_header(
    tensors: Iterable[tuple[str, str, tuple[int, ...]]], metadata: Mapping[str, str] | None = None
) -> Header:
    """The header of a file with these tensors (name, dtype, shape), laid out as the reference library does.

    Widest dtype first, then by name; `{"format": "pt"}` as metadata unless another is given (transformers asks for it).
    """
    ordered = sorted(tensors, key=lambda tensor: (-DTYPE_BITS[tensor[1]], tensor[0].encode()))
    entries: dict[str, Any] = {"__metadata__": dict(metadata if metadata is not None else {"format": "pt"})}
    position, spans = 0, {}
    for name, dtype, shape in ordered:
        if name in entries:
            raise CheckpointError(f"tensor {name!a} would be written twice")
        end = position + math.prod(shape) * DTYPE_BITS[dtype] // 8
        entries[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [position, end]}
        spans[name], position = position, end
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    raw = len(text).to_bytes(8, "little") + text
    infos = {name: TensorInfo(dtype, tuple(shape), len(raw) + spans[name]) for name, dtype, shape in ordered}
    return Header(raw, infos, entries["__metadata__"])


def write_file(
    path: Path | str, tensors: Mapping[str, tuple[str, NDArray[Any]]], metadata: Mapping[str, str] | None = None
) -> None:
    """Write a small file whole: name -> (dtype, array of that dtype's width). For large ones see `hf_writer`."""
    header = build_header(((name, dtype, array.shape) for name, (dtype, array) in tensors.items()), metadata)
    with Path(path).open("xb") as file:
        file.write(header.raw)
        for name, info in header.tensors.items():
            data = np.ascontiguousarray(tensors[name][1]).tobytes()
            if len(data) != info.nbytes:
                raise CheckpointError(f"tensor {name!a}: {len(data)} bytes of data, {info.dtype} needs {info.nbytes}")
            file.write(data)
        file.flush()
        os.fsync(file.fileno())
