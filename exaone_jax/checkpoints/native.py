"""The native form: TensorStore arrays that stock Orbax restores as the parameter tree, and all that the way back needs.

<checkpoint>/
  exaone_jax.json   manifest, written last
  params/           an Orbax PyTree checkpoint: one zarr3 array a parameter, one chunk a layer or expert,
                        crc32c on data
  carried/          zarr3 arrays of tensors that are kept as they are (vision tower)
  source/           headers and index of the Hugging Face files it came from, verbatim
  config.json, tokenizer.json, ...   byte copies
"""

import json
import math
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

import ml_dtypes  # noqa: F401  (registers bfloat16 with numpy for tensorstore's answers)
import numpy as np
import tensorstore as ts
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, NonNegativeInt, ValidationError

from exaone_jax.checkpoints.atomic import storage_errors, write_new
from exaone_jax.checkpoints.bits import as_bits
from exaone_jax.checkpoints.directory import (
    CONFIG_FILE,
    INDEX_FILE,
    SkippedFile,
    SmallFile,
    is_shard_name,
    small_files,
)
from exaone_jax.checkpoints.matching import printable
from exaone_jax.checkpoints.names import Parameter, ParameterPath, parameters, path_name, tensor_map
from exaone_jax.checkpoints.safetensors import DTYPE_BITS, Bits, TensorInfo
from exaone_jax.config.hf import read_config
from exaone_jax.config.model import ModelConfig
from exaone_jax.errors import CheckpointError, StorageError

MANIFEST = "exaone_jax.json"
PARAMS, CARRIED_FOLDER, SOURCE = "params", "carried", "source"
SOURCE_INDEX = "index.json"  # in SOURCE
# What a saved step of training has besides; see exaone_jax.training.saves.
TRAIN_MANIFEST, TRAIN_STATE = "train.json", "state"
RESERVED = frozenset({MANIFEST, PARAMS, CARRIED_FOLDER, SOURCE, TRAIN_MANIFEST, TRAIN_STATE})
FORMAT, VERSION = "exaone_jax native checkpoint", 1
# A larger tensor is cut into several chunks: that bounds memory, and malloc reuses blocks of this size.
CHUNK_BYTES = 16 << 20
_ZARR_DTYPE = {"BF16": "bfloat16", "F16": "float16", "F32": "float32", "F64": "float64"} | {
    "U8": "uint8", "I8": "int8", "U16": "uint16", "I16": "int16", "U32": "uint32", "I32": "int32", "U64": "uint64",
    "I64": "int64", "BOOL": "uint8", "F8_E4M3": "uint8", "F8_E5M2": "uint8", "F8_E8M0": "uint8",
}  # fmt: skip


@dataclass(frozen=True)
class SourceFile:
    """A safetensors file as it was: name and verbatim header (with the 8 bytes of its length), size of the whole file."""

    name: str
    header: bytes
    size: int


@dataclass(frozen=True)
class SourceLayout:
    """The files a checkpoint came from, so that they can be written again byte for byte."""

    files: tuple[SourceFile, ...]
    index: bytes | None


@dataclass
class Manifest:
    """What exaone_jax.json says. dtypes: safetensors dtype of each parameter; carried: name -> (dtype, shape)."""

    config: ModelConfig
    has_mtp: bool
    dtypes: dict[str, str]
    carried: dict[str, TensorInfo]
    copied: dict[str, str] = field(default_factory=dict)
    source: SourceLayout | None = None

    def to_dict(self) -> dict[str, Any]:
        carried = {name: {"dtype": info.dtype, "shape": list(info.shape)} for name, info in self.carried.items()}
        result: dict[str, Any] = {
            "format": FORMAT,
            "version": VERSION,
            "model_type": self.config.model_type,
            "mtp": self.has_mtp,
            "dtypes": self.dtypes,
            "carried": carried,
            "copied": self.copied,
            "source": None,
        }
        if self.source is not None:
            files = [{"name": file.name, "size": file.size} for file in self.source.files]
            result["source"] = {"files": files, "index": self.source.index is not None}
        return result


def rows_per_chunk(shape: tuple[int, ...], itemsize: int) -> int:
    """How many rows of a Hugging Face tensor make one chunk: all of them up to 16 MiB, else an even share near that."""
    rows, total = (shape[0] if shape else 1), math.prod(shape) * itemsize
    pieces = -(-total // CHUNK_BYTES)
    even = next((n for n in range(pieces, 2 * pieces) if rows % n == 0), pieces) if pieces else 1
    return max(1, -(-rows // even))


def chunk_shape(shape: tuple[int, ...], itemsize: int) -> tuple[int, ...]:
    """The chunk of a tensor of this shape: `rows_per_chunk` of its rows, whole."""
    return (rows_per_chunk(shape, itemsize), *shape[1:]) if shape else ()


def array_metadata(shape: tuple[int, ...], chunk: tuple[int, ...], dtype: str) -> dict[str, Any]:
    return {
        "shape": list(shape),
        "data_type": _ZARR_DTYPE[dtype],
        "fill_value": 0,
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": list(chunk)}},
        # c.0.5.0.0 and not c/0/5/0/0: no two folders of its own for every expert
        "chunk_key_encoding": {"name": "default", "configuration": {"separator": "."}},
        "codecs": [{"name": "bytes", "configuration": {"endian": "little"}}, {"name": "crc32c"}],
    }


def _open_array(folder: Path, context: ts.Context, metadata: dict[str, Any] | None) -> ts.TensorStore:
    spec: dict[str, Any] = {"driver": "zarr3", "kvstore": {"driver": "file", "path": f"{folder}/"}}
    if metadata is None:
        # A chunk that is gone is an error and not zeros.
        return ts.open(spec | {"fill_missing_data_reads": False}, open=True, read=True, context=context).result()
    spec |= {"metadata": metadata, "store_data_equal_to_fill_value": True}
    return ts.open(spec, create=True, context=context).result()


def orbax_metadata(paths: Iterable[tuple[ParameterPath, tuple[int, ...]]]) -> dict[str, Any]:
    """`_METADATA` of an Orbax PyTree checkpoint (use_ocdbt false, use_zarr3 true)."""
    tree = {}
    for path, shape in paths:
        keys = tuple(map(str, path))
        tree[str(keys)] = {
            "key_metadata": [{"key": key, "key_type": 2} for key in keys],  # 2: a key of a dict
            # jax.Array would ask for a sharding file, which names the devices of the machine that wrote it.
            "value_metadata": {"value_type": "np.ndarray", "skip_deserialize": False, "write_shape": list(shape)},
        }
    return {
        "tree_metadata": tree,
        "use_ocdbt": False,
        "use_zarr3": True,
        "store_array_data_equal_to_fill_value": True,
        "custom_metadata": None,
    }


def orbax_checkpoint_metadata() -> dict[str, Any]:
    handler = "orbax.checkpoint._src.handlers.pytree_checkpoint_handler.PyTreeCheckpointHandler"
    now = time.time_ns()
    return {
        "item_handlers": handler,
        "metrics": {},
        "performance_metrics": {},
        "init_timestamp_nsecs": now,
        "commit_timestamp_nsecs": now,
        "custom_metadata": {},
    }


class NativeWriter:
    """Writes tensors, a range of rows at a time and from several threads, into the (partial) directory of a native form.

    Args:
        root: directory to write in; it exists.
        manifest: says the configuration, the dtypes and what is carried. `finish` writes it.
    """

    def __init__(self, root: Path, manifest: Manifest, workers: int):
        self.root, self.manifest = root, manifest
        self._context = ts.Context(
            {
                "cache_pool": {"total_bytes_limit": 0},
                "file_io_concurrency": {"limit": workers},
                "file_io_sync": False,  # the whole directory is synced at the end
                "file_io_locking": {"mode": "none"},  # it belongs to one process
            }
        )
        self._maps = {tensor.name: tensor for tensor in tensor_map(manifest.config) if not tensor.carried}
        self._arrays: dict[str, ts.TensorStore] = {}
        with storage_errors(str(root)), _writing(root):
            for parameter in parameters(manifest.config).values():
                self._create_parameter(parameter)
            for name, info in manifest.carried.items():
                self._create_carried(name, info)

    def _create_parameter(self, parameter: Parameter) -> None:
        name = path_name(parameter.path)
        dtype, first = self.manifest.dtypes[name], parameter.tensors[0]
        chunk = (*(1 for _ in parameter.stacked), *chunk_shape(first.shape, DTYPE_BITS[dtype] // 8))
        metadata = array_metadata(parameter.shape, chunk, dtype)
        self._arrays[name] = _open_array(self.root / PARAMS / name, self._context, metadata)

    def _create_carried(self, name: str, info: TensorInfo) -> None:
        if not info.nbytes:
            return
        chunk = chunk_shape(info.shape, DTYPE_BITS[info.dtype] // 8)
        metadata = array_metadata(info.shape, chunk, info.dtype)
        self._arrays[name] = _open_array(self.root / CARRIED_FOLDER / name, self._context, metadata)

    def write_rows(self, name: str, begin: int, end: int, bits: Bits) -> None:
        """Rows `begin:end` of the Hugging Face tensor `name`, as raw bits in its own layout."""
        tensor = self._maps.get(name)
        if tensor is None:
            array = self._arrays[name]
            target = array[begin:end] if array.ndim else array
        else:
            array = self._arrays[path_name(tensor.path)]
            target = array[(*tensor.index, slice(begin, end))]
        with _writing(self.root):
            typed = bits.view(array.dtype.numpy_dtype)
            target.write(typed, can_reference_source_data_indefinitely=True).result()

    def finish(self) -> None:
        """Write Orbax's metadata, the source layout and, last, the manifest."""
        shapes = [(path, parameter.shape) for path, parameter in parameters(self.manifest.config).items()]
        params = self.root / PARAMS
        write_new(params / "_METADATA", json.dumps(orbax_metadata(shapes)).encode())
        write_new(params / "_CHECKPOINT_METADATA", json.dumps(orbax_checkpoint_metadata()).encode())
        write_new(params / "commit_success.txt", b"")
        if self.manifest.source is not None:
            for number, file in enumerate(self.manifest.source.files):
                write_new(self.root / SOURCE / f"{number:05d}.header", file.header)
            if self.manifest.source.index is not None:
                write_new(self.root / SOURCE / SOURCE_INDEX, self.manifest.source.index)
        write_new(self.root / MANIFEST, json.dumps(self.manifest.to_dict(), indent=1).encode() + b"\n")


class _writing:
    """TensorStore reports what the system refused as ValueError and the like: make it a StorageError."""

    def __init__(self, where: Path):
        self._where = where

    def __enter__(self) -> None:
        return None

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if isinstance(value, ValueError | RuntimeError):
            raise StorageError(f"{self._where}: cannot be written: {str(value)[:1000]}") from value


class NativeDirectory:
    """An open native checkpoint. `tensors` and `read_rows` speak Hugging Face's names and layout, as HFDirectory does.

    Attributes:
        config: of the tensors that are there (without MTP where the checkpoint has none).
        manifest: see Manifest.
    """

    def __init__(self, path: Path | str):
        self.path = Path(path)
        self.manifest = _read_manifest(self.path)
        self.config = self.manifest.config
        self._parameters = parameters(self.config)
        self._maps = {tensor.name: tensor for tensor in tensor_map(self.config) if not tensor.carried}
        self._context = ts.Context({"cache_pool": {"total_bytes_limit": 0}})
        self._arrays: dict[str, ts.TensorStore] = {}
        for parameter in self._parameters.values():
            name = path_name(parameter.path)
            self._open(self.path / PARAMS / name, name, parameter.shape, self.manifest.dtypes.get(name))
        for name, info in self.manifest.carried.items():
            if info.nbytes:
                self._open(self.path / CARRIED_FOLDER / name, name, info.shape, info.dtype)
        self.tensors = {
            name: TensorInfo(self.manifest.dtypes[path_name(tensor.path)], tensor.shape)
            for name, tensor in self._maps.items()
        } | self.manifest.carried
        self.warnings: list[str] = []

    @property
    def num_arrays(self) -> int:
        return len(self._arrays)

    def _open(self, folder: Path, name: str, shape: tuple[int, ...], dtype: str | None) -> None:
        if dtype is None:
            raise CheckpointError(f"{self.path / MANIFEST}: has no dtype for parameter {name}")
        try:
            array = _open_array(folder, self._context, None)
        except ValueError as error:
            raise CheckpointError(f"{folder}: cannot be opened: {str(error)[:1000]}") from error
        found = (tuple(array.shape), array.dtype.name)
        if found != (shape, _ZARR_DTYPE[dtype]):
            raise CheckpointError(
                f"{folder}: found {found[1]} of shape {list(found[0])}, expected {_ZARR_DTYPE[dtype]} of {list(shape)}"
            )
        self._arrays[name] = array

    def _read(self, view: ts.TensorStore, name: str) -> NDArray[Any]:
        try:
            return view.read(order="C").result()
        except (ValueError, RuntimeError) as error:  # a checksum that does not match, a chunk that is gone
            raise CheckpointError(f"{self.path}: {name} cannot be read: {str(error)[:1000]}") from error

    def read_rows(self, name: str, begin: int = 0, end: int | None = None) -> Bits:
        """Rows of a tensor as raw bits, Hugging Face layout."""
        tensor = self._maps.get(name)
        if tensor is None:
            info = self.manifest.carried[name]
            if not info.nbytes:
                return np.empty(info.shape, f"<u{DTYPE_BITS[info.dtype] // 8}")
            array = self._arrays[name]
            return as_bits(
                self._read(array[begin : info.shape[0] if end is None else end] if info.shape else array, name)
            )
        array = self._arrays[path_name(tensor.path)]
        rows = slice(begin, tensor.shape[0] if end is None else end)
        return as_bits(self._read(array[(*tensor.index, rows)], name))

    def close(self) -> None:
        self._arrays.clear()

    def __enter__(self) -> "NativeDirectory":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def files_beside_weights(path: Path) -> tuple[list[SmallFile], list[SkippedFile]]:
    """`small_files` of a checkpoint in either form, less its config.json, which callers compare or write by its meaning."""
    return small_files(path, RESERVED | {CONFIG_FILE, INDEX_FILE})


def is_native(path: Path | str) -> bool:
    return (Path(path) / MANIFEST).is_file()


def _read_manifest(path: Path) -> Manifest:
    where = path / MANIFEST
    try:
        raw = json.loads(where.read_bytes())
    except FileNotFoundError as error:
        raise CheckpointError(f"{path}: no native checkpoint, {MANIFEST} is missing") from error
    except OSError as error:
        raise CheckpointError(f"{where}: cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{where}: not valid JSON: {error}") from error
    if not isinstance(raw, dict) or raw.get("format") != FORMAT:
        raise CheckpointError(f"{where}: not the manifest of a native checkpoint")
    if type(raw.get("version")) is not int or raw["version"] != VERSION:  # True == 1
        raise CheckpointError(f"{where}: version {raw.get('version')!r}, this release reads {VERSION}")
    try:
        return _parse_manifest(path, _ManifestFile.model_validate(raw))
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        key = ".".join(map(str, first["loc"]))
        raise CheckpointError(f"{where}: damaged: {printable(key)}: {first['msg']}") from error
    except FileNotFoundError as error:
        raise CheckpointError(f"{where}: damaged: {error}") from error


class _Strict(BaseModel):
    model_config = ConfigDict(strict=True)


class _CarriedTensor(_Strict):
    dtype: str
    shape: list[NonNegativeInt]


class _RecordedFile(_Strict):
    name: str
    size: NonNegativeInt


class _RecordedSource(_Strict):
    files: list[_RecordedFile]
    index: bool


class _ManifestFile(_Strict):
    """exaone_jax.json, as `Manifest.to_dict` writes it."""

    mtp: bool
    dtypes: dict[str, str]
    carried: dict[str, _CarriedTensor]
    copied: dict[str, str]
    source: _RecordedSource | None


def _parse_manifest(path: Path, raw: _ManifestFile) -> Manifest:
    config = read_config(path / CONFIG_FILE)
    if not raw.mtp:
        config = config.model_copy(update={"mtp_layer": None, "mtp_num_steps": 1})
    carried = {name: TensorInfo(info.dtype, tuple(info.shape)) for name, info in raw.carried.items()}
    for name, dtype in (raw.dtypes | {name: info.dtype for name, info in carried.items()}).items():
        if dtype not in _ZARR_DTYPE:
            raise CheckpointError(f"{path / MANIFEST}: {name!a} has unknown dtype {dtype!a}")
    for name in carried:
        check_carried_name(name)
    source = None
    if raw.source is not None:
        folder = path / SOURCE
        files = tuple(
            SourceFile(file.name, (folder / f"{number:05d}.header").read_bytes(), file.size)
            for number, file in enumerate(raw.source.files)
        )
        for file in files:
            if not is_shard_name(file.name):
                raise CheckpointError(f"{path / MANIFEST}: {file.name!a} is not the name of a .safetensors file")
        source = SourceLayout(files, (folder / SOURCE_INDEX).read_bytes() if raw.source.index else None)
    return Manifest(config, raw.mtp, raw.dtypes, carried, raw.copied, source)


def check_carried_name(name: str) -> None:
    """A carried tensor's name becomes a folder name: it must be a plain one.

    Raises:
        CheckpointError: for separators, leading dots, control characters, names over 200 characters.
    """
    plain = name.replace("_", "a").replace("-", "a").replace(".", "a")
    if not (plain.isascii() and plain.isalnum()) or name.startswith(".") or len(name) > 200:
        raise CheckpointError(f"tensor {ascii(name)[:200]} cannot be carried: its name is not a plain file name")


def check_carried_dtype(name: str, info: TensorInfo) -> None:
    """Raises CheckpointError for dtypes that no array can hold (below one byte, complex)."""
    if info.dtype not in _ZARR_DTYPE:
        raise CheckpointError(f"tensor {ascii(name)[:200]} of dtype {info.dtype} cannot be carried")
