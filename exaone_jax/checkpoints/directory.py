"""A Hugging Face checkpoint directory: one `model.safetensors`, or shards with an index, and the small files beside them."""

import json
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path, PureWindowsPath
from types import TracebackType
from typing import Any

from exaone_jax.checkpoints.matching import collapse, table
from exaone_jax.checkpoints.safetensors import (
    MAX_HEADER_BYTES,
    Bits,
    Header,
    SafetensorsFile,
    TensorInfo,
    describe_foreign,
)
from exaone_jax.errors import CheckpointError

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
CONFIG_FILE = "config.json"
WEIGHT_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".msgpack", ".h5", ".gguf", ".onnx", ".joblib")
MAX_SMALL_FILE = 256 << 20  # the largest tokenizer.json published with EXAONE has about 20 MB
_SHARD = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.safetensors")


@dataclass(frozen=True)
class SmallFile:
    """A file that travels with the weights. path: relative to the checkpoint, with forward slashes."""

    path: str
    size: int


@dataclass(frozen=True)
class SkippedFile:
    """A file that stays behind, and why."""

    path: str
    reason: str


@dataclass
class HFDirectory:
    """An open, checked Hugging Face checkpoint directory: headers read, data not.

    Attributes:
        files: open weight files by name, in the order of their names.
        tensors: name -> dtype and shape, in file order.
        index: the bytes of the index file, None for a single file.
    """

    path: Path
    files: dict[str, SafetensorsFile]
    index: bytes | None
    tensors: dict[str, TensorInfo] = field(default_factory=dict)
    file_of: dict[str, str] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)

    def read_rows(self, name: str, begin: int = 0, end: int | None = None) -> Bits:
        """Rows of a tensor as raw bits, Hugging Face layout."""
        return self.files[self.file_of[name]].read_rows(name, begin, end)

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors.values())

    def close(self) -> None:
        for file in self.files.values():
            file.close()

    def __enter__(self) -> "HFDirectory":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def open_hf(path: Path | str) -> HFDirectory:
    """Open a checkpoint directory and check everything that headers and the index can tell.

    Raises:
        CheckpointError: see the bad-input tests; every message names the file and what was expected.
    """
    path = Path(path)
    if not path.is_dir():
        what = "is a file" if path.exists() else "does not exist"
        raise CheckpointError(f"{path}: {what}, expected a directory with {CONFIG_FILE} and safetensors files")
    try:
        names = sorted(entry.name for entry in path.iterdir())
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from error
    weights = [name for name in names if name.endswith(".safetensors")]
    if not weights and INDEX_FILE not in names:
        raise CheckpointError(_no_weights(path, names))
    if INDEX_FILE not in names:
        return _open_files(path, _single(path, weights), None)
    raw = _read_limited(resolve_inside(path, INDEX_FILE))
    weight_map, total_size = parse_index(raw, str(path / INDEX_FILE))
    _check_shards(path, weights, set(weight_map.values()))
    directory = _open_files(path, sorted(set(weight_map.values())), raw)
    try:
        check_index(weight_map, total_size, directory.tensors, directory.file_of, str(path / INDEX_FILE))
    except CheckpointError:
        directory.close()
        raise
    if total_size is None:
        directory.warnings.append(f"{path / INDEX_FILE}: states no total_size")
    return directory


def holds_weights(path: Path) -> bool:
    """Is there anything in a directory that says it is a checkpoint, readable or not, and no mere config.json?"""
    return any(entry.name.endswith((".safetensors", INDEX_FILE, *WEIGHT_SUFFIXES)) for entry in path.iterdir())


def _no_weights(path: Path, names: list[str]) -> str:
    others = [name for name in names if name.endswith(WEIGHT_SUFFIXES)]
    if not others:
        return f"{path}: holds no safetensors file; expected {SINGLE_FILE} or {INDEX_FILE} with its shards"
    return (
        f"{path}: holds weights only as {', '.join(others[:3])}. Pickles may run code when loaded and are never read: "
        "convert them to safetensors where they were made"
    )


def _single(path: Path, weights: list[str]) -> list[str]:
    if weights == [SINGLE_FILE]:
        return weights
    raise CheckpointError(
        f"{path}: {INDEX_FILE} is missing, so one {SINGLE_FILE} is expected; found {', '.join(weights[:5])}"
        + (f" and {len(weights) - 5} more" if len(weights) > 5 else "")
    )


def _read_limited(path: Path, limit: int = MAX_HEADER_BYTES) -> bytes:
    try:
        size = path.stat().st_size
        if size > limit:
            raise CheckpointError(f"{path}: {size} bytes, expected at most {limit}")
        return path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from error


def parse_index(raw: bytes, where: str) -> tuple[dict[str, str], int | None]:
    """-> tensor name -> file name, and total_size where the index states it. File names never leave the directory."""

    def pairs(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len(dict(pairs)) != len(pairs):
            names = [key for key, _ in pairs]
            raise CheckpointError(f"{where}: duplicate name {next(n for n in names if names.count(n) > 1)!a}")
        return dict(pairs)

    try:
        index = json.loads(raw.decode("utf-8"), object_pairs_hook=pairs)
    except (ValueError, RecursionError) as error:
        if isinstance(error, CheckpointError):
            raise
        kind = describe_foreign(raw[:512])
        raise CheckpointError(f"{where}: " + (f"is {kind}" if kind else f"not valid JSON: {error}")) from error
    weight_map = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{where}: expected an object with a weight_map that is not empty")
    for name, file in weight_map.items():
        if not is_shard_name(file):
            raise CheckpointError(
                f"{where}: tensor {name!a} is said to be in {file!a}, expected the name of a .safetensors file in the "
                "same directory"
            )
    metadata = index.get("metadata") or {}
    total = metadata.get("total_size") if isinstance(metadata, dict) else None
    if total is not None and (isinstance(total, bool) or not isinstance(total, int | float) or total != total // 1):
        raise CheckpointError(f"{where}: total_size {total!a} is not a number of bytes")
    return weight_map, None if total is None else int(total)


def is_shard_name(file: object) -> bool:
    """Is it the name of a .safetensors file, which never leaves the directory that it is joined to?"""
    if not isinstance(file, str) or not file.endswith(".safetensors") or "\0" in file or file.startswith("."):
        return False
    path = PureWindowsPath(file)  # on every system: it knows drives, UNC names and both separators
    return path.name == file and not path.drive


def _check_shards(path: Path, weights: list[str], named: set[str]) -> None:
    missing, extra = sorted(named - set(weights)), sorted(set(weights) - named)
    if missing:
        raise CheckpointError(
            "\n".join([f"{path}: shards that the index names are missing", *table("missing", missing)])
        )
    if extra:
        kind = "shards of another export" if any(_SHARD.fullmatch(name) for name in extra) else "other weights"
        if SINGLE_FILE in extra:
            kind = "a single-file checkpoint beside a sharded one"
        raise CheckpointError(
            f"{path}: files that the index does not name ({kind}): {', '.join(collapse(extra)[:5])}; "
            "remove the files that are stale"
        )


def _open_files(path: Path, names: list[str], index: bytes | None) -> HFDirectory:
    with ExitStack() as stack:
        files = {name: stack.enter_context(SafetensorsFile(resolve_inside(path, name))) for name in names}
        tensors, file_of = join_headers({name: file.header for name, file in files.items()}, str(path))
        warnings = [warning for file in files.values() for warning in file.header.warnings]
        stack.pop_all()
    return HFDirectory(path, files, index, tensors, file_of, warnings)


def join_headers(headers: Mapping[str, Header], where: str) -> tuple[dict[str, TensorInfo], dict[str, str]]:
    """-> the tensors of several files, and the file of each. Raises CheckpointError for a tensor in two of them."""
    tensors: dict[str, TensorInfo] = {}
    file_of: dict[str, str] = {}
    for file, header in headers.items():
        for name, info in header.tensors.items():
            if name in tensors:
                raise CheckpointError(f"{where}: tensor {name!a} is both in {file_of[name]} and in {file}")
            tensors[name], file_of[name] = info, file
    return tensors, file_of


def check_index(
    weight_map: Mapping[str, str],
    total_size: int | None,
    tensors: Mapping[str, TensorInfo],
    file_of: Mapping[str, str],
    where: str,
) -> None:
    """Raises CheckpointError unless a parsed index says what the headers say (see `parse_index` and `join_headers`)."""
    for name, file in weight_map.items():
        if file_of.get(name) != file:
            there = f"it is in {file_of[name]}" if name in file_of else "no file has it"
            raise CheckpointError(f"{where}: tensor {name!a} is said to be in {file}; {there}")
    unlisted = [name for name in file_of if name not in weight_map]
    if unlisted:
        lines = table("tensors in the files that the index does not list", map(ascii, unlisted))
        raise CheckpointError("\n".join([where, *lines]))
    nbytes = sum(info.nbytes for info in tensors.values())
    if total_size is not None and total_size != nbytes:
        raise CheckpointError(f"{where}: total_size is {total_size}, the files hold {nbytes} bytes of tensors")


def resolve_inside(root: Path, name: str) -> Path:
    """The real path of a file of the checkpoint. Links may lead inside it, or as the Hugging Face cache has them:
    from `models--*/snapshots/<revision>/` to `models--*/blobs/`."""
    real, base = (root / name).resolve(), root.resolve()
    allowed = [base]
    if base.parent.name == "snapshots":
        allowed.append(base.parent.parent / "blobs")
    if not any(real.is_relative_to(place) for place in allowed):
        raise CheckpointError(f"{root / name}: is a link to {real}, outside the checkpoint directory")
    return real


def small_files(
    directory: Path, skip: frozenset[str], with_code: bool = False
) -> tuple[list[SmallFile], list[SkippedFile]]:
    """The files that go along with a conversion, and those that do not, with the reason. `skip`: not mentioned at all."""
    kept, skipped = [], []
    for relative in sorted(_walk(directory)):
        if relative.split("/")[0] in skip:
            continue
        reason = _why_not(directory, relative, with_code)
        if reason:
            skipped.append(SkippedFile(relative, reason))
        else:
            kept.append(SmallFile(relative, resolve_inside(directory, relative).stat().st_size))
    return kept, skipped


def _walk(directory: Path) -> Iterator[str]:
    """Every file below; of folders only those that are not entered: links and hidden ones (.git, .cache)."""
    for folder, folders, files in os.walk(directory, followlinks=False):
        base = Path(folder).relative_to(directory)
        links = [name for name in folders if (Path(folder) / name).is_symlink()]
        hidden = [name for name in folders if name.startswith(".") and name not in links]
        folders[:] = [name for name in folders if name not in (*links, *hidden)]
        yield from ((base / name).as_posix() for name in (*files, *links, *hidden))


def _why_not(directory: Path, relative: str, with_code: bool) -> str | None:
    path = directory / relative
    if relative.endswith(".py") and not with_code:
        return "code is copied only if asked for"
    if relative.endswith(WEIGHT_SUFFIXES):
        return "weights in another format; pickles may run code"
    if relative.endswith((".safetensors", ".safetensors.index.json")):
        return "weights outside the checkpoint"
    if path.is_symlink() and path.is_dir():
        return "a link to a directory"
    if path.is_dir():
        return "a hidden folder"
    if not path.is_file():
        return "not a regular file"
    if path.stat().st_size > MAX_SMALL_FILE:
        return f"larger than {MAX_SMALL_FILE >> 20} MiB"
    return None
