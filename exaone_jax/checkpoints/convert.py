"""Hugging Face directory <-> native form, and parameters in memory -> either. HF -> native -> HF gives the same bytes."""

import json
import re
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import DTypeLike

from exaone_jax.checkpoints.atomic import check_free_space, check_output, copy_file, new_directory, write_new
from exaone_jax.checkpoints.copying import OnProgress, copy_tensors, default_workers
from exaone_jax.checkpoints.directory import (
    CONFIG_FILE,
    INDEX_FILE,
    SINGLE_FILE,
    HFDirectory,
    SkippedFile,
    SmallFile,
    check_index,
    join_headers,
    open_hf,
    parse_index,
    resolve_inside,
    small_files,
)
from exaone_jax.checkpoints.hf_writer import MAX_SHARD_BYTES, HFLayout, HFWriter, plan_layout
from exaone_jax.checkpoints.load import checked_config, open_checkpoint
from exaone_jax.checkpoints.matching import check_tensors
from exaone_jax.checkpoints.memory import MemoryTree
from exaone_jax.checkpoints.names import path_name, tensor_map
from exaone_jax.checkpoints.native import (
    MANIFEST,
    RESERVED,
    SOURCE,
    SOURCE_INDEX,
    Manifest,
    NativeDirectory,
    NativeWriter,
    SourceFile,
    SourceLayout,
    check_carried_dtype,
    check_carried_name,
    files_beside_weights,
    is_native,
)
from exaone_jax.checkpoints.safetensors import TensorInfo, parse_header
from exaone_jax.config.hf import from_hf as config_from_hf
from exaone_jax.config.hf import read_config_and_extra
from exaone_jax.config.hf import to_hf as config_to_hf
from exaone_jax.config.model import ModelConfig
from exaone_jax.errors import CheckpointError, StorageError

_HEADROOM = 64 << 20  # free space asked for beyond the tensors: headers, metadata, small files
_CHUNK_OVERHEAD = 4096 + 64  # a chunk file's checksum, rounding to blocks, and its directory entry
NO_MTP = "config.json has an MTP layer but the checkpoint has no MTP weights: the model is loaded without MTP"


@dataclass
class ConvertReport:
    """What a conversion did, or in a dry run would do. Byte counts are of tensor data.

    mtp: "present", "absent" (config.json has the layer, the checkpoint no tensor of it) or "none" (no such layer).
    """

    direction: str
    src: str
    dst: str
    dry_run: bool
    model_type: str
    tensors: int
    parameters: int
    bytes: int
    weight_files: list[str]
    mtp: str
    extra_tensors: list[str] = field(default_factory=list)
    copied: list[SmallFile] = field(default_factory=list)
    not_copied: list[SkippedFile] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    workers: int = 1
    seconds: float = 0.0

    @property
    def bytes_per_second(self) -> float:
        return self.bytes / self.seconds if self.seconds else 0.0

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"bytes_per_second": self.bytes_per_second}


def from_hf(
    src: Path | str,
    dst: Path | str,
    *,
    dry_run: bool = False,
    overwrite: bool = False,
    allow_extra: str | None = None,
    with_code: bool = False,
    workers: int | None = None,
    on_progress: OnProgress | None = None,
) -> ConvertReport:
    """Convert a Hugging Face directory into the native form.

    Args:
        src: directory with config.json and safetensors, sharded or not.
        dst: directory to make. It appears whole or not at all.
        dry_run: check everything that headers, config and free space tell; write nothing.
        overwrite: replace a checkpoint at `dst`.
        allow_extra: regular expression; tensors that the configuration lacks and whose full name it matches are carried.
        with_code: copy `*.py` files too (some old checkpoints carry their model's code); nothing here ever runs them.
        workers: threads. Memory is bounded by about three chunks of at most 16 MiB a worker.
        on_progress: called with (bytes done, bytes in all), one call at a time.

    Raises:
        CheckpointError, ConfigError: the source is malformed, incomplete or contradicts its config.json; nothing is read
            of the data and nothing written when headers tell.
        StorageError: the output exists, there is no space, or the system refuses to write.
    """
    started, src, dst = time.perf_counter(), Path(src), Path(dst)
    _check_apart(src, dst)
    if is_native(src):
        raise CheckpointError(f"{src}: is a native checkpoint already, expected a Hugging Face directory")
    with open_hf(src) as directory:
        manifest, report = _plan_from_hf(directory, dst, allow_extra, with_code)
        report.dry_run, report.workers = dry_run, workers or default_workers()
        check_output(dst, overwrite)
        needed = report.bytes + report.tensors * _CHUNK_OVERHEAD + sum(file.size for file in report.copied)
        check_free_space(dst, needed + _HEADROOM)
        if dry_run:
            return report
        with new_directory(dst, overwrite=overwrite, may_go=_may_go) as partial:
            for file in report.copied:
                manifest.copied[file.path] = copy_file(resolve_inside(src, file.path), partial / file.path)
            writer = NativeWriter(partial, manifest, report.workers)
            order = _file_order(directory)
            copy_tensors(directory, writer, order, workers=report.workers, on_progress=on_progress)
            writer.finish()
    report.seconds = time.perf_counter() - started
    return report


def _plan_from_hf(
    directory: HFDirectory, dst: Path, allow_extra: str | None, with_code: bool
) -> tuple[Manifest, ConvertReport]:
    """Everything that can be wrong with the source, asked of its headers and config.json."""
    config = checked_config(directory)
    where = str(directory.path)
    extra = check_tensors(config, directory.tensors, where, _pattern(allow_extra))
    for name in extra:
        check_carried_name(name)
        check_carried_dtype(name, directory.tensors[name])
    manifest = _manifest(config, directory.tensors, extra)
    layout = [SourceFile(name, file.header.raw, file.header.file_size) for name, file in directory.files.items()]
    manifest.source = SourceLayout(tuple(layout), directory.index)
    copied, skipped = small_files(directory.path, frozenset({*directory.files, INDEX_FILE}), with_code)
    for file in [file for file in copied if file.path.split("/")[0] in RESERVED]:
        copied.remove(file)
        skipped.append(SkippedFile(file.path, "its name belongs to the native form"))
    report = _report("from_hf", directory.path, dst, config, directory.tensors)
    report.weight_files, report.copied, report.not_copied = list(directory.files), copied, skipped
    report.extra_tensors, report.warnings = list(extra), [*directory.warnings, *_dtype_warnings(config, directory)]
    _report_mtp(report, directory.path, manifest.has_mtp)
    return manifest, report


def _pattern(allow_extra: str | None) -> re.Pattern[str] | None:
    if allow_extra is None:
        return None
    try:
        return re.compile(allow_extra)
    except re.error as error:
        raise CheckpointError(f"allow_extra {allow_extra!a} is not a regular expression: {error}") from error


def _manifest(config: ModelConfig, tensors: Mapping[str, TensorInfo], extra: tuple[str, ...]) -> Manifest:
    dtypes = {path_name(t.path): tensors[t.name].dtype for t in tensor_map(config) if not t.carried}
    names = [t.name for t in tensor_map(config) if t.carried] + list(extra)
    carried = {name: TensorInfo(tensors[name].dtype, tensors[name].shape) for name in names}
    return Manifest(config, config.mtp_layer is not None, dtypes, carried)


def _report(
    direction: str, src: Path, dst: Path, config: ModelConfig, tensors: Mapping[str, TensorInfo]
) -> ConvertReport:
    parameters = sum(int(np.prod(info.shape, dtype=object)) for info in tensors.values())
    data = sum(info.nbytes for info in tensors.values())
    mtp = "none" if config.mtp_layer is None else "present"
    return ConvertReport(
        direction, str(src), str(dst), False, config.model_type, len(tensors), parameters, data, [], mtp
    )


def _report_mtp(report: ConvertReport, src: Path, has_mtp: bool) -> None:
    promised = read_config_and_extra(src / CONFIG_FILE)[0].mtp_layer is not None
    if promised and not has_mtp:
        report.mtp = "absent"
        report.warnings.append(NO_MTP)


def _dtype_warnings(config: ModelConfig, directory: HFDirectory) -> Iterator[str]:
    expected = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}[config.dtype]
    found = {directory.tensors[t.name].dtype for t in tensor_map(config) if not t.keep_float32}
    if found != {expected}:
        yield f"{directory.path}: config.json says {config.dtype}, the tensors are {', '.join(sorted(found))}"


def _file_order(directory: HFDirectory) -> dict[str, TensorInfo]:
    """Tensors in the order in which they lie on disk."""
    names = sorted(directory.tensors, key=lambda name: (directory.file_of[name], directory.tensors[name].start))
    return {name: directory.tensors[name] for name in names}


def _may_go(entry: Path, partial: Path) -> bool:
    """May overwriting remove an entry of an old checkpoint? Its own parts may go, and files that are written again."""
    old = entry.parent
    if entry.name in RESERVED:
        return is_native(old)
    if entry.is_dir() and not entry.is_symlink():
        files = (path for path in entry.rglob("*") if path.is_symlink() or not path.is_dir())
        return (partial / entry.name).is_dir() and all((partial / path.relative_to(old)).is_file() for path in files)
    if entry.name.endswith(".safetensors"):
        return entry.name in _weight_names(old)
    return entry.name in (CONFIG_FILE, INDEX_FILE) or (partial / entry.name).is_file()


def _weight_names(directory: Path) -> set[str]:
    index = directory / INDEX_FILE
    if not index.exists():
        return {SINGLE_FILE}
    try:
        return set(parse_index(index.read_bytes(), str(index))[0].values())
    except CheckpointError:
        return set()


def _check_apart(src: Path, dst: Path) -> None:
    a, b = src.resolve(), dst.resolve()
    if a == b or a.is_relative_to(b) or b.is_relative_to(a):
        raise StorageError(f"{dst}: the output lies in, around or on the source {src}")


def to_hf(
    src: Path | str,
    dst: Path | str,
    *,
    dry_run: bool = False,
    overwrite: bool = False,
    max_shard_bytes: int | None = None,
    workers: int | None = None,
    on_progress: OnProgress | None = None,
) -> ConvertReport:
    """Convert a native checkpoint into a Hugging Face directory.

    A checkpoint that came from Hugging Face gets its own files back byte for byte; one that did not, or a call that gives
    `max_shard_bytes`, is written in shards of at most that size (5 GB) with Hugging Face's names.
    Other arguments and errors as in `from_hf`; data that does not match its checksum raises CheckpointError.
    """
    started, src, dst = time.perf_counter(), Path(src), Path(dst)
    _check_apart(src, dst)
    with NativeDirectory(src) as native:
        layout = _hf_layout(native, max_shard_bytes)
        report = _report("to_hf", src, dst, native.config, native.tensors)
        _report_mtp(report, src, native.manifest.has_mtp)
        report.dry_run, report.workers = dry_run, workers or default_workers()
        report.weight_files = list(layout.files)
        with_code = any(name.endswith(".py") for name in native.manifest.copied)  # it was asked for on the way here
        report.copied, report.not_copied = small_files(src, RESERVED, with_code)
        report.extra_tensors = [name for name in native.tensors if name not in _mapped(native.config)]
        check_output(dst, overwrite)
        check_free_space(dst, layout.nbytes + sum(file.size for file in report.copied) + _HEADROOM)
        if dry_run:
            return report
        with new_directory(dst, overwrite=overwrite, may_go=_may_go) as partial:
            digests = {f.path: copy_file(resolve_inside(src, f.path), partial / f.path) for f in report.copied}
            _write_hf(native, partial, layout, report.workers, on_progress)
    report.warnings.extend(_changed_files(native.manifest.copied, digests))
    report.seconds = time.perf_counter() - started
    return report


def _mapped(config: ModelConfig) -> set[str]:
    return {tensor.name for tensor in tensor_map(config)}


def _write_hf(
    source: NativeDirectory | MemoryTree, root: Path, layout: HFLayout, workers: int, on_progress: OnProgress | None
) -> None:
    writer = HFWriter(root, layout)
    try:
        order = {name: info for header in layout.files.values() for name, info in header.tensors.items()}
        copy_tensors(source, writer, order, workers=workers, on_progress=on_progress)
        writer.finish()
    finally:
        writer.close()


def _hf_layout(native: NativeDirectory, max_shard_bytes: int | None) -> HFLayout:
    recorded = native.manifest.source
    if recorded is None or max_shard_bytes is not None:
        return plan_layout(native.tensors, MAX_SHARD_BYTES if max_shard_bytes is None else max_shard_bytes)
    files = {file.name: parse_header(file.header, file.size, f"{native.path}: {file.name}") for file in recorded.files}
    named, file_of = join_headers(files, str(native.path))
    kept = {name: (info.dtype, info.shape) for name, info in native.tensors.items()}
    if {name: (info.dtype, info.shape) for name, info in named.items()} != kept:
        raise CheckpointError(f"{native.path}: the recorded headers and the arrays are not of the same tensors")
    if recorded.index is not None:
        where = str(native.path / SOURCE / SOURCE_INDEX)
        check_index(*parse_index(recorded.index, where), named, file_of, where)
    elif list(files) != [SINGLE_FILE]:
        raise CheckpointError(f"{native.path / MANIFEST}: records {', '.join(files)} without an index")
    return HFLayout(files, recorded.index)


def _changed_files(recorded: Mapping[str, str], now: Mapping[str, str]) -> Iterator[str]:
    for path, digest in recorded.items():
        if path not in now:
            yield f"{path}: came with the checkpoint and is gone"
        elif now[path] != digest:
            yield f"{path}: was changed after the conversion"


def save_hf(
    params: object,
    config: ModelConfig,
    dst: Path | str,
    *,
    extra_files_from: Path | str | None = None,
    dtype: DTypeLike | None = None,
    overwrite: bool = False,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    workers: int | None = None,
    on_progress: OnProgress | None = None,
) -> ConvertReport:
    """Write parameters in memory as a Hugging Face directory: safetensors, index, config.json.

    Args:
        params: an nnx state, a nested dict, or a flat dict keyed by path; leaves are arrays or nnx variables. Other
            variables than parameters (optimizer, rngs) must not be in it.
        config: of the model that the parameters belong to.
        extra_files_from: a checkpoint whose small files (tokenizer, chat template, generation config) are copied, whose
            unknown config keys are kept, and whose carried tensors (EXAONE 4.5's vision tower) are written again.
        dtype: of the weights on disk; None writes `config.dtype`. The router bias is float32 always.
        overwrite, max_shard_bytes, workers, on_progress: as in `to_hf`.

    Raises:
        CheckpointError: a parameter is missing, unknown, or of a wrong shape.
        StorageError: as in `from_hf`.
    """
    config = _stored_config(config, dtype)
    with MemoryTree(params, config, _carried_source(config, extra_files_from)) as tree:
        return _save(tree, Path(dst), "save_hf", extra_files_from, overwrite, max_shard_bytes, workers, on_progress)


def save_native(
    params: object,
    config: ModelConfig,
    dst: Path | str,
    *,
    extra_files_from: Path | str | None = None,
    dtype: DTypeLike | None = None,
    overwrite: bool = False,
    workers: int | None = None,
    on_progress: OnProgress | None = None,
) -> ConvertReport:
    """Write parameters in memory in the native form, without a recorded Hugging Face layout. Arguments as `save_hf`."""
    config = _stored_config(config, dtype)
    with MemoryTree(params, config, _carried_source(config, extra_files_from)) as tree:
        return _save(tree, Path(dst), "save_native", extra_files_from, overwrite, None, workers, on_progress)


def _stored_config(config: ModelConfig, dtype: DTypeLike | None) -> ModelConfig:
    if dtype is None:
        return config
    name = np.dtype(dtype).name
    if name not in ("float32", "bfloat16", "float16"):
        raise CheckpointError(f"weights cannot be stored as {name}, expected bfloat16, float16 or float32")
    return config.model_copy(update={"dtype": name})


def _carried_source(config: ModelConfig, path: Path | str | None) -> HFDirectory | NativeDirectory | None:
    return open_checkpoint(path)[1] if config.vision is not None and path is not None else None


def _save(
    tree: MemoryTree,
    dst: Path,
    direction: str,
    extra_files_from: Path | str | None,
    overwrite: bool,
    max_shard_bytes: int | None,
    workers: int | None,
    on_progress: OnProgress | None,
) -> ConvertReport:
    """Write a tree: as Hugging Face files where `max_shard_bytes` is given, else in the native form."""
    started, config = time.perf_counter(), tree.config
    extra = Path(extra_files_from) if extra_files_from is not None else None
    report = _report(direction, Path("memory"), dst, config, tree.tensors)
    report.workers = workers or default_workers()
    if extra is not None:
        report.copied, report.not_copied = _extra_files(extra)
    config_json = _config_json(config, extra)
    check_output(dst, overwrite)
    check_free_space(dst, report.bytes + report.tensors * _CHUNK_OVERHEAD + _HEADROOM)
    with new_directory(dst, overwrite=overwrite, may_go=_may_go) as partial:
        for file in report.copied:
            copy_file(resolve_inside(extra or partial, file.path), partial / file.path)
        write_new(partial / CONFIG_FILE, config_json)
        if max_shard_bytes is None:
            names = tuple(name for name in tree.tensors if name not in _mapped(config))
            writer = NativeWriter(partial, _manifest(config, tree.tensors, names), report.workers)
            copy_tensors(tree, writer, tree.tensors, workers=report.workers, on_progress=on_progress)
            writer.finish()
        else:
            layout = plan_layout(tree.tensors, max_shard_bytes)
            report.weight_files = list(layout.files)
            _write_hf(tree, partial, layout, report.workers, on_progress)
    report.seconds = time.perf_counter() - started
    return report


def _extra_files(path: Path) -> tuple[list[SmallFile], list[SkippedFile]]:
    copied, skipped = files_beside_weights(path)
    return copied, [file for file in skipped if not file.path.endswith(".safetensors")]


def _config_json(config: ModelConfig, extra_files_from: Path | None) -> bytes:
    """config.json with the unknown keys of the checkpoint that the extra files come from, and proof that it reads back."""
    extra: dict[str, Any] = {}
    if extra_files_from is not None and (extra_files_from / CONFIG_FILE).exists():
        extra = {
            key: value
            for key, value in read_config_and_extra(extra_files_from / CONFIG_FILE)[1].items()
            if key != "quantization_config"
        }
    raw = config_to_hf(config, extra)
    if config_from_hf(raw)[0] != config:
        raise CheckpointError("the configuration cannot be written as a config.json that reads back the same")
    return json.dumps(raw, indent=2, ensure_ascii=False).encode() + b"\n"
