"""Do the tensors that were found fit the configuration? Asked of headers alone, before any data is read."""

import re
from collections.abc import Iterable, Mapping
from typing import Any

from exaone_jax.checkpoints.names import MTP_PREFIX, tensor_map
from exaone_jax.checkpoints.safetensors import TensorInfo
from exaone_jax.config.hf import quantization
from exaone_jax.config.model import ModelConfig
from exaone_jax.errors import CheckpointError, ConfigError

_NUMBER = re.compile(r"(?<=\.)\d+(?=\.|$)")
_MAX_LINES = 20


def _ranges(numbers: Iterable[int]) -> str:
    """{0, 1, 2, 5} -> "0...2, 5"."""
    runs: list[list[int]] = []
    for number in sorted(set(numbers)):
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ", ".join(str(first) if first == last else f"{first}...{last}" for first, last in runs)


def collapse(names: Iterable[str]) -> list[str]:
    """Fold names that differ in their numbers: ["layers.0.x", ..., "layers.47.x"] -> ["layers.{0...47}.x (48)"]."""
    groups: dict[tuple[str, ...], list[tuple[int, ...]]] = {}
    for name in names:
        groups.setdefault(tuple(_NUMBER.split(name)), []).append(tuple(map(int, _NUMBER.findall(name))))
    lines = []
    for pieces, rows in groups.items():
        columns = [_ranges(column) for column in zip(*rows, strict=True)]
        marks = [column if column.isdigit() else f"{{{column}}}" for column in columns]
        line = "".join(piece + mark for piece, mark in zip(pieces, [*marks, ""], strict=True))
        lines.append(line if len(rows) == 1 else f"{line} ({len(rows)})")
    return lines


def table(title: str, names: Iterable[str]) -> list[str]:
    """`title` and the collapsed names under it, at most 20 lines; nothing for no names."""
    lines = collapse(names)
    if not lines:
        return []
    shown = [f"  {line}" for line in lines[:_MAX_LINES]]
    more = [f"  ... and {len(lines) - _MAX_LINES} more rows"] if len(lines) > _MAX_LINES else []
    return [f"{title}:", *shown, *more]


def printable(name: str) -> str:
    """A name from a file, with escapes for what a terminal would obey or could not show."""
    return ascii(name)[1:-1]


def without_mtp(config: ModelConfig, names: Iterable[str]) -> ModelConfig:
    """The configuration of what is there: transformers drops `mtp.*` on saving, so a checkpoint may lack all of it."""
    if config.mtp_layer is None or any(name.startswith(MTP_PREFIX) for name in names):
        return config
    return config.model_copy(update={"mtp_layer": None, "mtp_num_steps": 1})


def checked_quantization(extra: dict[str, Any], where: str) -> dict[str, Any] | None:
    """The `quantization_config` among the uninterpreted keys of a config.json. Raises ConfigError unless an object."""
    found: object = quantization(extra)
    if found is None or isinstance(found, dict):
        return found
    raise ConfigError(f"{where}: quantization_config: found {ascii(found)[:200]}, expected an object")


def check_tensors(
    config: ModelConfig, found: Mapping[str, TensorInfo], where: str, allow_extra: re.Pattern[str] | None = None
) -> tuple[str, ...]:
    """Every tensor of the configuration is there with its shape and an allowed dtype, and no other is.

    Returns the extra names that `allow_extra` matches in full.

    Raises:
        CheckpointError: with one collapsed table each of what is missing, unexpected, of wrong shape, of wrong dtype.
    """
    maps = {tensor.name: tensor for tensor in tensor_map(config)}
    extra = [name for name in found if name not in maps]
    refused = [name for name in extra if allow_extra is None or not allow_extra.fullmatch(name)]
    present = [(name, tensor, found[name]) for name, tensor in maps.items() if name in found]
    shapes = [
        f"{name}: found {list(info.shape)}, expected {list(tensor.shape)}"
        for name, tensor, info in present
        if info.shape != tensor.shape
    ]
    dtypes = [
        f"{name}: found {info.dtype}, expected {' or '.join(tensor.dtypes)}"
        for name, tensor, info in present
        if info.dtype not in tensor.dtypes
    ]
    lines = [
        *table("missing tensors", (name for name in maps if name not in found)),
        *table("tensors that the configuration does not have", map(printable, refused)),
        *table("wrong shape", shapes),
        *table("wrong dtype", dtypes),
    ]
    if lines:
        raise CheckpointError("\n".join([f"{where}: the tensors do not fit config.json ({config.model_type})", *lines]))
    return tuple(extra)


def check_stacks(config: ModelConfig, found: Mapping[str, TensorInfo], where: str) -> None:
    """Tensors that are stacked into one parameter share one dtype."""
    first: dict[object, tuple[str, str]] = {}
    for tensor in tensor_map(config):
        name, dtype = first.setdefault(tensor.path, (tensor.name, found[tensor.name].dtype))
        if found[tensor.name].dtype != dtype:
            raise CheckpointError(
                f"{where}: {tensor.name} is {found[tensor.name].dtype} but {name} is {dtype}; "
                "tensors of one stacked parameter must share a dtype"
            )
