"""Parameters from a checkpoint, in either form, straight to devices: each device's slices are read and nothing else."""

from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from typing import Any

import jax
import numpy as np
from numpy.typing import DTypeLike, NDArray

from exaone_jax.checkpoints.bits import FLOATS, as_bits, as_float
from exaone_jax.checkpoints.copying import default_workers
from exaone_jax.checkpoints.directory import CONFIG_FILE, HFDirectory, open_hf
from exaone_jax.checkpoints.matching import check_tensors, checked_quantization, without_mtp
from exaone_jax.checkpoints.names import Parameter, ParameterPath, TensorMap, parameters, path_name
from exaone_jax.checkpoints.native import TRAIN_MANIFEST, NativeDirectory, is_native, rows_per_chunk
from exaone_jax.config.hf import read_config_and_extra
from exaone_jax.config.model import ModelConfig
from exaone_jax.errors import CheckpointError

Checkpoint = HFDirectory | NativeDirectory


def open_checkpoint(path: Path | str) -> tuple[ModelConfig, Checkpoint]:
    """Open a Hugging Face directory or a native one, checked against its config.json by headers alone.

    The configuration returned is that of the tensors that are there: where config.json promises multi-token prediction
    but no `mtp.*` tensor exists (transformers drops them), `mtp_layer` is None. Close the checkpoint when done.

    Raises:
        CheckpointError, ConfigError: naming what was found and what was expected.
    """
    path = Path(path)
    if is_native(path):
        native = NativeDirectory(path)
        return native.config, native
    if (path / TRAIN_MANIFEST).is_file():
        raise CheckpointError(
            f"{path}: a saved step of a run with `lora` holds adapters alone, expected the model that its `export` wrote"
        )
    directory = open_hf(path)
    try:
        config = checked_config(directory)
        check_tensors(config, directory.tensors, str(path))
    except BaseException:
        directory.close()
        raise
    return config, directory


def checked_config(directory: HFDirectory) -> ModelConfig:
    """The configuration of an open Hugging Face directory, less an MTP layer that it has no tensors of."""
    config, extra = read_config_and_extra(directory.path / CONFIG_FILE)
    if (quantised := checked_quantization(extra, str(directory.path / CONFIG_FILE))) is not None:
        method = quantised.get("quant_method", "?")
        raise CheckpointError(
            f"{directory.path}: the weights are quantised (quant_method {method!a}), expected BF16, F16 or F32 weights"
        )
    return without_mtp(config, directory.tensors)


def checkpoint_config(path: Path | str) -> ModelConfig:
    """The configuration of the tensors that a checkpoint holds; see `open_checkpoint`."""
    config, checkpoint = open_checkpoint(path)
    checkpoint.close()
    return config


def read_params(
    path: Path | str,
    *,
    dtype: DTypeLike | None = None,
    mesh_shardings: Mapping[ParameterPath, jax.sharding.Sharding] | None = None,
) -> dict[ParameterPath, jax.Array]:
    """Read the parameters of a checkpoint.

    Args:
        path: Hugging Face directory (sharded or not) or native checkpoint.
        dtype: float dtype of the result; None keeps the stored one. The router bias is float32 always.
        mesh_shardings: sharding of every parameter, by path. None puts each on the default device.

    Returns:
        Arrays by path, as a flat nnx state has them; shapes as in `names.parameters(config)`. Without `mtp.*` where the
        checkpoint has none. Tensors that the language model does not use (vision tower) are not read.

    Raises:
        CheckpointError, ConfigError: malformed, incomplete, or not what config.json says.
        KeyError: mesh_shardings lacks a parameter.
    """
    config, checkpoint = open_checkpoint(path)
    with checkpoint:
        return read_open(config, checkpoint, dtype=dtype, mesh_shardings=mesh_shardings)


def read_open(
    config: ModelConfig,
    checkpoint: Checkpoint,
    *,
    dtype: DTypeLike | None = None,
    mesh_shardings: Mapping[ParameterPath, jax.sharding.Sharding] | None = None,
    each: Callable[[ParameterPath, jax.Array], Any] = lambda _, array: array,
) -> dict[ParameterPath, Any]:
    """`read_params` of a checkpoint that `open_checkpoint` opened. each: what becomes of an array before the next is read."""
    result = {}
    for path, parameter in parameters(config).items():
        read = _reader(checkpoint, parameter, dtype)
        if mesh_shardings is None:
            array = jax.device_put(read(tuple(slice(0, size) for size in parameter.shape)))
        else:
            array = _sharded(parameter, mesh_shardings[path], read)
        result[path] = each(path, array)
        del array  # or it is there until the next one is
    return result


_Read = Callable[[tuple[slice, ...]], NDArray[Any]]


def _reader(checkpoint: Checkpoint, parameter: Parameter, dtype: DTypeLike | None) -> _Read:
    """A function from an index of slices with known bounds to the values there, in the dtype asked for."""
    stored = checkpoint.tensors[parameter.tensors[0].name].dtype
    target = FLOATS[stored] if dtype is None else np.dtype(dtype)
    if parameter.keep_float32:
        target = np.dtype(np.float32)
    if target not in FLOATS.values():
        raise CheckpointError(
            f"{path_name(parameter.path)}: cannot be loaded as {target}, expected bfloat16, float16 or float32"
        )

    def read(index: tuple[slice, ...]) -> NDArray[Any]:
        return _assemble(checkpoint, parameter, index, stored, target)

    return read


def _assemble(
    checkpoint: Checkpoint, parameter: Parameter, index: tuple[slice, ...], stored: str, target: np.dtype[Any]
) -> NDArray[Any]:
    """A slice of a parameter from the rows of the tensors stacked in it, blocks of rows read by several threads."""
    depth = len(parameter.stacked)
    lead, unit = index[:depth], index[depth:]
    out = np.empty(tuple(part.stop - part.start for part in index), target)
    blocks = []
    for tensor in parameter.tensors:
        if all(part.start <= place < part.stop for part, place in zip(lead, tensor.index, strict=True)):
            slot = out[tuple(at - part.start for at, part in zip(tensor.index, lead, strict=True))]
            rows, *rest = unit
            size = rows_per_chunk(tensor.shape, FLOATS[stored].itemsize)
            cuts = [rows.start, *range(rows.start // size * size + size, rows.stop, size), rows.stop]
            blocks += [(tensor, slice(*cut), rest, rows.start, slot) for cut in pairwise(cuts)]
    with ThreadPoolExecutor(min(default_workers(), max(1, len(blocks))), thread_name_prefix="load") as pool:
        list(pool.map(lambda block: _fill(checkpoint, stored, *block), blocks))
    return out


def _fill(
    checkpoint: Checkpoint,
    stored: str,
    tensor: TensorMap,
    rows: slice,
    rest: list[slice],
    first: int,
    slot: NDArray[Any],
) -> None:
    """Read whole rows of one tensor and put their part `rest` into its place; row `first` is the first of the place."""
    same = FLOATS[stored] == slot.dtype  # then nothing but bits is moved
    target = as_bits(slot) if same else slot
    bits = checkpoint.read_rows(tensor.name, rows.start, rows.stop)
    block = (bits if same else as_float(bits, stored))[(slice(None), *rest)]
    place = slice(rows.start - first, rows.stop - first)
    target[place] = block


def _sharded(parameter: Parameter, sharding: jax.sharding.Sharding, read: _Read) -> jax.Array:
    """Each device's slice, read once for all the devices that hold the same one."""
    done: dict[tuple[tuple[int, int], ...], NDArray[Any]] = {}

    def callback(index: tuple[slice, ...] | None) -> NDArray[Any]:
        parts = index if index is not None else ()
        bounds = tuple(part.indices(size)[:2] for part, size in zip(parts, parameter.shape, strict=True))
        if bounds not in done:
            done[bounds] = read(tuple(slice(*bound) for bound in bounds))
        return done[bounds]

    return jax.make_array_from_callback(parameter.shape, sharding, callback)
