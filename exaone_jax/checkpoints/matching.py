"""Do the tensors that were found fit the configuration? Asked of headers alone, before any data is read."""

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from exaone_jax.checkpoints.names import MTP_PREFIX, TensorMap, tensor_map
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


@dataclass(frozen=True)
class Fit:
    """How tensors differ from a configuration: names, and for `shapes` and `dtypes` name -> "found ..., expected ..."."""

    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    shapes: dict[str, str]
    dtypes: dict[str, str]


def fit(config: ModelConfig, found: Mapping[str, TensorInfo]) -> Fit:
    """Compare the tensors found with those of the configuration: names, shapes, dtypes."""
    maps = {tensor.name: tensor for tensor in tensor_map(config)}
    present = {name: found[name] for name in maps if name in found}
    return Fit(
        missing=tuple(name for name in maps if name not in found),
        unexpected=tuple(name for name in found if name not in maps),
        shapes={
            name: f"found {list(info.shape)}, expected {list(maps[name].shape)}"
            for name, info in present.items()
            if info.shape != maps[name].shape
        },
        dtypes=_wrong_dtypes(maps, present),
    )


def _wrong_dtypes(maps: Mapping[str, TensorMap], present: Mapping[str, TensorInfo]) -> dict[str, str]:
    """Dtypes that no weight may have, or other ones than most of their kind: a lie that keeps the size shows only so."""
    kinds: dict[str, list[str]] = {}
    for name in present:
        tensor = maps[name]
        kind = "vision tensors" if tensor.carried else "router biases" if tensor.keep_float32 else "weights"
        kinds.setdefault(kind, []).append(name)
    wrong = {}
    for kind, names in kinds.items():
        usual = Counter(present[name].dtype for name in names).most_common(1)[0][0]
        for name in names:
            dtype, allowed = present[name].dtype, maps[name].dtypes
            if dtype not in allowed:
                wrong[name] = f"found {dtype}, expected {' or '.join(allowed)}"
            elif dtype != usual:
                wrong[name] = f"found {dtype}, the other {kind} are {usual}"
    return wrong


def check_tensors(
    config: ModelConfig, found: Mapping[str, TensorInfo], where: str, allow_extra: re.Pattern[str] | None = None
) -> tuple[str, ...]:
    """Every tensor of the configuration is there with its shape and an allowed dtype, and no other is.

    All weights share one dtype, all router biases one, and all vision tensors one.
    Returns the extra names that `allow_extra` matches in full.

    Raises:
        CheckpointError: with one collapsed table each of what is missing, unexpected, of wrong shape, of wrong dtype.
    """
    differs = fit(config, found)
    refused = [name for name in differs.unexpected if allow_extra is None or not allow_extra.fullmatch(name)]
    lines = [
        *table("missing tensors", differs.missing),
        *table("tensors that the configuration does not have", map(printable, refused)),
        *table("wrong shape", (f"{name}: {both}" for name, both in differs.shapes.items())),
        *table("wrong dtype", (f"{name}: {both}" for name, both in differs.dtypes.items())),
    ]
    if lines:
        raise CheckpointError("\n".join([f"{where}: the tensors do not fit config.json ({config.model_type})", *lines]))
    return differs.unexpected
