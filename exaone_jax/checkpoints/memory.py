"""Parameters in memory, seen as the tensors of a Hugging Face checkpoint."""

from collections.abc import Mapping
from types import TracebackType
from typing import Any

import jax
import numpy as np
from flax import nnx
from numpy.typing import NDArray

from exaone_jax.checkpoints.bits import FLOATS, as_bits
from exaone_jax.checkpoints.directory import HFDirectory
from exaone_jax.checkpoints.matching import table
from exaone_jax.checkpoints.names import SAFETENSORS_DTYPE, parameters, path_name, tensor_map
from exaone_jax.checkpoints.native import NativeDirectory
from exaone_jax.checkpoints.safetensors import Bits, TensorInfo
from exaone_jax.config.model import ModelConfig
from exaone_jax.errors import CheckpointError


def flatten(params: object, prefix: str = "") -> dict[str, Any]:
    """A nested or flat tree of arrays or nnx variables -> dotted path -> array. Integer and string keys count alike."""
    if isinstance(params, nnx.Variable):
        return {prefix: params.get_value()}
    if isinstance(params, list | tuple):
        params = dict(enumerate(params))
    if not isinstance(params, Mapping):
        return {prefix: params}
    flat: dict[str, Any] = {}
    for key, value in params.items():
        name = path_name(key) if isinstance(key, tuple) else str(key)
        flat |= flatten(value, f"{prefix}.{name}" if prefix else name)
    return flat


class MemoryTree:
    """A tensor source over parameters in memory, cast to `config.dtype` a unit at a time; carried tensors from a checkpoint.

    Raises:
        CheckpointError: names missing, unknown or misshapen parameters, or a carried tensor that is nowhere.
    """

    def __init__(self, params: object, config: ModelConfig, carried: HFDirectory | NativeDirectory | None):
        self.config, self._carried = config, carried
        self._leaves = flatten(params)
        self._check()
        self._maps = {tensor.name: tensor for tensor in tensor_map(config)}
        self.tensors = {name: self._info(name) for name in self._maps}

    def _check(self) -> None:
        expected = {path_name(path): parameter.shape for path, parameter in parameters(self.config).items()}
        found = {name: tuple(np.shape(leaf)) for name, leaf in self._leaves.items()}
        wrong = [
            f"{name}: found {list(found[name])}, expected {list(shape)}"
            for name, shape in expected.items()
            if name in found and found[name] != shape
        ]
        foreign = [
            f"{name}: {leaf.dtype}"
            for name, leaf in self._leaves.items()
            if name in expected and np.dtype(leaf.dtype) not in FLOATS.values()
        ]
        lines = [
            *table("missing parameters", (name for name in expected if name not in found)),
            *table("parameters that the configuration does not have", (name for name in found if name not in expected)),
            *table("wrong shape", wrong),
            *table("wrong dtype", foreign),
        ]
        if lines:
            raise CheckpointError("\n".join(["the parameters in memory do not fit the configuration", *lines]))

    def _info(self, name: str) -> TensorInfo:
        tensor = self._maps[name]
        if not tensor.carried:
            dtype = "F32" if tensor.keep_float32 else SAFETENSORS_DTYPE[self.config.dtype]
            return TensorInfo(dtype, tensor.shape)
        if self._carried is None or name not in self._carried.tensors:
            raise CheckpointError(
                f"{name}: the configuration has a vision tower, whose tensors are not in memory; give a checkpoint that has "
                "them (extra_files_from), or a configuration without `vision`"
            )
        info = self._carried.tensors[name]
        return TensorInfo(info.dtype, info.shape)

    def read_rows(self, name: str, begin: int = 0, end: int | None = None) -> Bits:
        """Rows of a tensor as raw bits, Hugging Face layout."""
        tensor, info = self._maps[name], self.tensors[name]
        if tensor.carried and self._carried is not None:
            return self._carried.read_rows(name, begin, end)
        values = _values(self._leaves[path_name(tensor.path)], (*tensor.index, slice(begin, end)))
        return as_bits(np.ascontiguousarray(values.astype(FLOATS[info.dtype], copy=False)))

    def close(self) -> None:
        if self._carried is not None:
            self._carried.close()

    def __enter__(self) -> "MemoryTree":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _values(leaf: Any, index: tuple[int | slice, ...]) -> NDArray[Any]:
    """A slice on the host. On the CPU the array itself is seen; elsewhere only the slice leaves the device."""
    if isinstance(leaf, jax.Array):
        if not leaf.is_fully_addressable:
            raise CheckpointError(
                "parameters that are spread over several hosts cannot be written by one: gather them first"
            )
        if leaf.is_fully_replicated and next(iter(leaf.devices())).platform == "cpu":
            return np.asarray(leaf)[index]
        return np.asarray(leaf[index])
    return np.asarray(leaf)[index]
