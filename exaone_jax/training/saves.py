"""Saved steps of a run: written beside the training by a thread, whole or not at all, checked when they are read.

<run_dir>/checkpoints/step_00000013/
  exaone_jax.json, config.json, params/, tokenizer.json, ...   a native checkpoint, as `load` and `convert to-hf` take it
  state/            zarr3 arrays of all else that a step changes: optimizer, average, counts
  train.json        manifest, written last: step, fingerprints, every array and the digest of every small file
While it is written it is called step_00000013.partial. Array data carries crc32c, in chunks that no two devices share, so
that every process writes its own. Which step is the latest is decided by number and manifest, never by a clock.
"""

import hashlib
import json
import math
import re
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

import jax
import ml_dtypes  # noqa: F401  (registers bfloat16 with numpy)
import numpy as np
import tensorstore as ts
from flax import nnx

from exaone_jax.checkpoints.atomic import check_free_space, copy_file, storage_errors, sync, sync_tree, write_new
from exaone_jax.checkpoints.directory import CONFIG_FILE
from exaone_jax.checkpoints.names import path_name
from exaone_jax.checkpoints.native import (
    CHUNK_BYTES,
    MANIFEST,
    PARAMS,
    TRAIN_MANIFEST,
    TRAIN_STATE,
    Manifest,
    array_metadata,
    orbax_checkpoint_metadata,
    orbax_metadata,
)
from exaone_jax.config import ModelConfig, to_hf
from exaone_jax.errors import CheckpointError, ConfigError, StorageError
from exaone_jax.training.step import TrainState

FORMAT, VERSION = "exaone_jax training state", 1
_STEP = re.compile(r"step_(\d{8,})")
_PARTIAL = re.compile(r"step_\d{8,}\.(partial|deleted)")
_CODES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16", "int32": "I32", "uint32": "U32"}
_HEADROOM = 1 << 20
_PEERS_PATIENCE = 1800.0  # seconds that a process waits for the others to write their parts


class DamagedStep(CheckpointError):
    """A saved step is not what was written."""


@dataclass(frozen=True)
class Identity:
    """What a run must have in common with a saved step to go on from it. fingerprints: name -> digest, of data and the like.

    adapters: whether the parameters are adapters alone, which are no checkpoint by themselves.
    """

    config: ModelConfig
    fingerprints: Mapping[str, str]
    adapters: bool = False


def step_folder(folder: Path, step: int) -> Path:
    return folder / f"step_{step:08d}"


def saved_steps(folder: Path) -> list[int]:
    """Of which there is a directory, good or bad, latest first."""
    found = (_STEP.fullmatch(path.name) for path in folder.iterdir()) if folder.is_dir() else ()
    return sorted((int(match[1]) for match in found if match), reverse=True)


def named_arrays(state: TrainState) -> dict[str, jax.Array]:
    """Every array that steps change by the name of its folder. The model's own lie where a native checkpoint has them."""
    model = [*nnx.to_flat_state(state.params), *nnx.to_flat_state(state.router_biases)]
    arrays = {f"{PARAMS}/{path_name(cast(tuple, path))}": variable.get_value() for path, variable in model}
    rest = {"optimizer": state.opt_state, "step": state.step, "ema": state.ema, "history": state.history}
    for path, leaf in jax.tree_util.tree_flatten_with_path(rest)[0]:
        arrays[f"{TRAIN_STATE}/{jax.tree_util.keystr(path, simple=True, separator='.')}"] = leaf
    return arrays


def with_arrays(state: TrainState, arrays: Mapping[str, Any]) -> TrainState:
    """`state` with other leaves, by the names of `named_arrays`."""
    names = iter(named_arrays(state))

    def model(part: nnx.State) -> nnx.State:
        leaves = [(path, variable.replace(arrays[next(names)])) for path, variable in nnx.to_flat_state(part)]
        return nnx.from_flat_state(leaves)

    params, biases = model(state.params), model(state.router_biases)
    rest = {"optimizer": state.opt_state, "step": state.step, "ema": state.ema, "history": state.history}
    leaves, treedef = jax.tree.flatten(rest)
    filled = jax.tree.unflatten(treedef, [arrays[next(names)] for _ in leaves])
    changed = (filled[name] for name in ("optimizer", "step", "ema", "history"))
    return TrainState(params, biases, *changed, frozen=state.frozen)


@dataclass(frozen=True)
class _Part:
    """A piece of an array that this process writes: `data` at `index`."""

    name: str
    index: tuple[slice, ...]
    data: np.ndarray


class Saver:
    """Saves steps to `folder`, one at a time, in a thread.

    Args:
        identity: of the run. files: small ones to go along, the tokenizer's, by their names there.
        keep: how many good steps stay.
        tell: called with (event, facts) from the thread: "saved" and "not saved".
    """

    def __init__(
        self,
        folder: Path,
        identity: Identity,
        files: Mapping[str, Path],
        keep: int,
        tell: Callable[[str, dict[str, Any]], None],
    ):
        self.folder, self.identity, self._files, self._keep, self._tell = folder, identity, files, keep, tell
        self._thread: threading.Thread | None = None
        self._error: StorageError | None = None
        self._rank, self._count = jax.process_index(), jax.process_count()

    def save(self, state: TrainState, step: int) -> None:
        """Copy a state to the host, and write it while training goes on. Waits where the save before is not done."""
        self.wait()
        arrays = named_arrays(state)
        for array in arrays.values():
            array.copy_to_host_async()
        parts, layout = [], {}
        for name, array in arrays.items():
            layout[name] = _describe(array)
            parts += [  # a copy: the next step takes the buffers over
                _Part(name, shard.index, np.array(shard.data))
                for shard in array.addressable_shards
                if shard.replica_id == 0
            ]
        self._thread = threading.Thread(target=self._run, args=(step, parts, layout), name="save", daemon=False)
        self._thread.start()

    def wait(self) -> StorageError | None:
        """Until the save in flight is done; returns why the last one failed, None where it did not."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        return self._error

    def _run(self, step: int, parts: list[_Part], layout: dict[str, Any]) -> None:
        started, final = time.perf_counter(), step_folder(self.folder, step)
        self._error = None
        try:
            with storage_errors(str(final)):
                self._write(final, step, parts, layout)
        except StorageError as error:
            self._error = error
            self._tell("not saved", {"step": step, "error": str(error)})
            return
        self._tell("saved", {"step": step, "seconds": round(time.perf_counter() - started, 3)})

    def _write(self, final: Path, step: int, parts: list[_Part], layout: dict[str, Any]) -> None:
        partial = final.with_name(f"{final.name}.partial")
        try:
            partial.mkdir(parents=True, exist_ok=True)
            check_free_space(partial, sum(part.data.nbytes for part in parts) + _HEADROOM)
            problem = ""
            _write_parts(partial, parts, layout, synced=self._count > 1)
        except (StorageError, OSError) as error:
            problem = str(error)
        if self._count == 1:
            self._commit(partial, final, step, layout, [problem])
        elif self._rank == 0:
            self._commit(partial, final, step, layout, self._hear_others(partial, problem))
        else:
            _say(partial, self._rank, problem)
            _await(lambda: not partial.exists(), f"{final}: process 0 did not commit it")
            if not final.exists():
                raise StorageError(problem or f"{final}: another process could not write its part")

    def _hear_others(self, partial: Path, problem: str) -> list[str]:
        said = [_said(partial, rank) for rank in range(1, self._count)]
        try:
            _await(lambda: all(path.exists() for path in said), f"{partial}: not every process wrote its part")
        except StorageError as error:
            return [problem, str(error)]
        problems = [problem, *(path.read_text() for path in said)]
        for path in said:
            path.unlink()
        return problems

    def _commit(self, partial: Path, final: Path, step: int, layout: dict[str, Any], problems: list[str]) -> None:
        try:
            if problem := next(filter(None, problems), None):
                raise StorageError(problem)
            _write_small(partial, step, layout, self.identity, self._files)
            sync_tree(partial)
            if final.exists():  # a step that is saved again, after a fall-back to one before
                _remove(final)
            partial.rename(final)
            sync(self.folder)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
        for old in saved_steps(self.folder)[self._keep :]:
            if old < step:
                _remove(step_folder(self.folder, old))


def sweep(folder: Path) -> None:
    """Remove what a killed run left half written or half removed."""
    for path in folder.iterdir() if folder.is_dir() else ():
        if _PARTIAL.fullmatch(path.name):
            shutil.rmtree(path)


def read_step(folder: Path, like: TrainState, identity: Identity) -> TrainState:
    """A saved step, every array read and checked.

    Args:
        like: shapes, dtypes and shardings of the state, as jax.ShapeDtypeStructs.

    Raises:
        DamagedStep: something is missing or not as it was written.
        ConfigError: it is whole, and of another run: another model, optimizer or data.
    """
    manifest = _read_manifest(folder)
    wanted = named_arrays(like)
    _check_same_run(folder, manifest, wanted, identity)
    context = ts.Context({"cache_pool": {"total_bytes_limit": 0}})
    arrays = {}
    for name, struct in wanted.items():
        try:
            store = _open(folder / name, manifest["arrays"][name], context, write=False)
            arrays[name] = jax.make_array_from_callback(struct.shape, struct.sharding, _reading(store))
        except (ValueError, RuntimeError, OSError) as error:  # a checksum that is wrong, a chunk that is gone
            raise DamagedStep(f"{folder / name}: cannot be read: {str(error)[:1000]}") from error
    return with_arrays(like, arrays)


def set_aside(folder: Path) -> Path:
    """Rename a damaged step, so that nothing takes it for a good one."""
    target = next(
        path for number in range(1, 1000) if not (path := folder.with_name(f"{folder.name}.corrupt-{number}")).exists()
    )
    folder.rename(target)
    return target


def _describe(array: jax.Array) -> dict[str, Any]:
    code = _CODES.get(array.dtype.name)
    if code is None:
        raise ConfigError(f"a state of dtype {array.dtype} cannot be saved, expected one of {', '.join(_CODES)}")
    chunk = chunk_shape(array.sharding.shard_shape(array.shape), array.dtype.itemsize)
    return {"shape": list(array.shape), "dtype": code, "chunk": list(chunk)}


def chunk_shape(shard: tuple[int, ...], itemsize: int) -> tuple[int, ...]:
    """The largest even cut of one device's part of an array that is no larger than CHUNK_BYTES, leading axes first."""
    chunk = list(shard)
    for axis, size in enumerate(shard):
        rest = math.prod(chunk[axis + 1 :]) * itemsize
        if size * rest <= CHUNK_BYTES:
            break
        chunk[axis] = next((d for d in range(max(1, CHUNK_BYTES // max(rest, 1)), 0, -1) if size % d == 0), 1)
    return tuple(max(1, size) for size in chunk)


def _open(folder: Path, array: Mapping[str, Any], context: ts.Context, *, write: bool) -> Any:
    """The metadata on disk must be what was written: a store of other metadata is refused."""
    kvstore = {"driver": "file", "path": f"{folder}/"}
    metadata = array_metadata(tuple(array["shape"]), tuple(array["chunk"]), array["dtype"])
    spec: dict[str, Any] = {"driver": "zarr3", "kvstore": kvstore, "metadata": metadata}
    if write:
        spec |= {"store_data_equal_to_fill_value": True}
        return ts.open(spec, create=True, open=True, context=context).result()
    return ts.open(spec | {"fill_missing_data_reads": False}, open=True, read=True, context=context).result()


def _write_parts(partial: Path, parts: list[_Part], layout: Mapping[str, Any], *, synced: bool) -> None:
    context = ts.Context({"cache_pool": {"total_bytes_limit": 0}, "file_io_sync": synced})
    stores, pending = {}, []
    try:
        for part in parts:
            if part.name not in stores:
                stores[part.name] = _open(partial / part.name, layout[part.name], context, write=True)
            store = stores[part.name]
            target = store[part.index] if part.index else store
            pending.append(target.write(part.data, can_reference_source_data_indefinitely=True))
        for future in pending:
            future.result()
    except (ValueError, RuntimeError) as error:
        raise StorageError(f"{partial}: cannot be written: {str(error)[:1000]}") from error


def _write_small(
    partial: Path, step: int, layout: Mapping[str, Any], identity: Identity, files: Mapping[str, Path]
) -> None:
    """Everything but the arrays, the manifest last."""
    copied = {name: copy_file(source, partial / name) for name, source in files.items()}
    small = {} if identity.adapters else _native_files(layout, identity.config, copied)
    for name, data in small.items():
        write_new(partial / name, data)
    body = {
        "format": FORMAT,
        "version": VERSION,
        "step": step,
        "config": identity.config.model_dump(mode="json"),
        "fingerprints": dict(identity.fingerprints),
        "arrays": dict(layout),
        "files": copied | {name: hashlib.sha256(data).hexdigest() for name, data in small.items()},
    }
    write_new(partial / TRAIN_MANIFEST, json.dumps(body | {"sha256": _digest(body)}, indent=1).encode() + b"\n")


def _native_files(layout: Mapping[str, Any], config: ModelConfig, copied: dict[str, str]) -> dict[str, bytes]:
    """Which make a native checkpoint of the folder."""
    config = config.model_copy(update={"dtype": "float32"})
    params = {name.removeprefix(f"{PARAMS}/"): array for name, array in layout.items() if name.startswith(PARAMS)}
    dtypes = {name: array["dtype"] for name, array in params.items()}
    native = Manifest(config, config.mtp_layer is not None, dtypes, carried={}, copied=copied)
    shapes = [(_path(name), tuple(array["shape"])) for name, array in params.items()]
    return {
        CONFIG_FILE: json.dumps(to_hf(config), indent=2, ensure_ascii=False).encode() + b"\n",
        f"{PARAMS}/_METADATA": json.dumps(orbax_metadata(shapes)).encode(),
        f"{PARAMS}/_CHECKPOINT_METADATA": json.dumps(orbax_checkpoint_metadata()).encode(),
        f"{PARAMS}/commit_success.txt": b"",
        MANIFEST: json.dumps(native.to_dict(), indent=1).encode() + b"\n",
    }


def _path(name: str) -> tuple[str | int, ...]:
    return tuple(int(part) if part.isdecimal() else part for part in name.split("."))


def _digest(body: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def _read_manifest(folder: Path) -> dict[str, Any]:
    where = folder / TRAIN_MANIFEST
    try:
        body = json.loads(where.read_bytes())
        said = body.pop("sha256")
    except FileNotFoundError as error:
        raise DamagedStep(f"{folder}: no saved step, {TRAIN_MANIFEST} is missing") from error
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DamagedStep(f"{where}: cannot be read: {error}") from error
    if _digest(body) != said:
        raise DamagedStep(f"{where}: is not what was written: its sha256 is another")
    if (body["format"], body["version"]) != (FORMAT, VERSION):
        raise CheckpointError(
            f"{where}: {body['format']} version {body['version']}, this release reads version {VERSION}"
        )
    for name, digest in body["files"].items():
        try:
            found = hashlib.sha256((folder / name).read_bytes()).hexdigest()
        except OSError as error:
            raise DamagedStep(f"{folder / name}: cannot be read: {error.strerror}") from error
        if found != digest:
            raise DamagedStep(f"{folder / name}: is not what was written: its sha256 is another")
    return body


def _check_same_run(
    folder: Path, manifest: Mapping[str, Any], wanted: Mapping[str, jax.Array], identity: Identity
) -> None:
    if manifest["config"] != identity.config.model_dump(mode="json"):
        raise ConfigError(f"{folder}: is of another model than this run's; expected a new run_dir, or the model it has")
    for name, digest in identity.fingerprints.items():
        if manifest["fingerprints"].get(name) != digest:
            raise ConfigError(
                f"{folder}: was saved with another {name} than this run's; expected the same, or a new run_dir "
                "(with init_from, its weights)"
            )
    saved = {name: tuple(array["shape"]) for name, array in manifest["arrays"].items()}
    shapes = {name: tuple(struct.shape) for name, struct in wanted.items()}
    for name in sorted(saved.keys() | shapes.keys()):
        if saved.get(name) != shapes.get(name):
            raise ConfigError(
                f"{folder}: {name}: found {_shape(saved.get(name))}, expected {_shape(shapes.get(name))}; was the optimizer, "
                "ema or guard.window changed?"
            )


def _shape(shape: tuple[int, ...] | None) -> str:
    return "none" if shape is None else str(list(shape))


def _reading(store: Any) -> Callable[[tuple[slice, ...] | None], np.ndarray]:
    done: dict[str, np.ndarray] = {}

    def read(index: tuple[slice, ...] | None) -> np.ndarray:
        if str(index) not in done:  # once for all devices that hold the same
            done[str(index)] = (store[index] if index else store).read(order="C").result()
        return done[str(index)]

    return read


def _remove(folder: Path) -> None:
    """A kill in between leaves a name that no one takes for a step."""
    gone = folder.with_name(f"{folder.name}.deleted")
    shutil.rmtree(gone, ignore_errors=True)
    folder.rename(gone)
    shutil.rmtree(gone)


def _said(partial: Path, rank: int) -> Path:
    return partial / f"written-{rank}"


def _say(partial: Path, rank: int, problem: str) -> None:
    """For process 0: this one is done."""
    draft = partial / f"writing-{rank}"
    draft.write_text(problem)
    draft.rename(_said(partial, rank))


def _await(done: Callable[[], bool], message: str) -> None:
    deadline = time.monotonic() + _PEERS_PATIENCE
    while not done():
        if time.monotonic() > deadline:
            raise StorageError(f"{message} within {_PEERS_PATIENCE:g} s")
        time.sleep(0.02)


def rows_of(array: jax.Array, limit: int = 1 << 28) -> Iterator[np.ndarray]:
    """The values of an array on any devices, in order, in pieces of about `limit` bytes; every process gets them all."""
    sharding = array.sharding
    if not isinstance(sharding, jax.NamedSharding) or len(sharding.device_set) == 1:
        yield np.asarray(array)
        return
    whole, rows = jax.NamedSharding(sharding.mesh, jax.P()), array if array.ndim else array[None]
    if size := limit // (rows.nbytes // len(rows)):
        for start in range(0, len(rows), size):
            piece = _rows(rows, start, min(size, len(rows) - start), whole)
            yield np.asarray(piece.addressable_data(0))
        return
    for place in range(len(rows)):  # of a stack of layers, each too large
        yield from rows_of(_row(rows, place, jax.NamedSharding(sharding.mesh, jax.P(*sharding.spec[1:]))), limit)


@partial(jax.jit, static_argnums=(2, 3))
def _rows(array: jax.Array, start: int, size: int, sharding: jax.NamedSharding) -> jax.Array:
    return jax.lax.with_sharding_constraint(jax.lax.dynamic_slice_in_dim(array, start, size), sharding)


@partial(jax.jit, static_argnums=2)
def _row(array: jax.Array, place: int, sharding: jax.NamedSharding) -> jax.Array:
    return jax.lax.with_sharding_constraint(jax.lax.dynamic_index_in_dim(array, place, keepdims=False), sharding)


def parameters_sha256(state: TrainState) -> str:
    """Of the names and bits of the parameters and router biases, in order of name; the same on any mesh."""
    digest = hashlib.sha256()
    for name, array in sorted(named_arrays(state).items()):
        if name.startswith(f"{PARAMS}/"):
            digest.update(name.encode())
            for part in rows_of(array):
                digest.update(part.tobytes())
    return digest.hexdigest()
