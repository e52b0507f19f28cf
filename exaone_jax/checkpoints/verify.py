"""Compare two checkpoints, in any mix of forms: tensor by tensor, bit by bit, what their configurations compute, and
the files beside the weights."""

import filecmp
import re
import threading
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from exaone_jax.checkpoints.bits import FLOATS, count_nonfinite
from exaone_jax.checkpoints.copying import OnProgress, copy_tensors, default_workers
from exaone_jax.checkpoints.directory import CONFIG_FILE, open_hf, resolve_inside
from exaone_jax.checkpoints.load import Checkpoint
from exaone_jax.checkpoints.matching import printable, table, without_mtp
from exaone_jax.checkpoints.names import tensor_map
from exaone_jax.checkpoints.native import NativeDirectory, files_beside_weights, is_native
from exaone_jax.checkpoints.safetensors import Bits, TensorInfo
from exaone_jax.config.hf import read_config
from exaone_jax.config.model import ModelConfig

MAX_EXAMPLES = 10


@dataclass(frozen=True)
class TensorDifference:
    """A tensor whose bits differ: how many elements, and the first of them in row-major order with both bit patterns."""

    name: str
    elements: int
    first_index: tuple[int, ...]
    a_bits: str
    b_bits: str

    def __str__(self) -> str:
        where = list(self.first_index)
        return f"{printable(self.name)}: {self.elements} elements differ, the first at {where}: {self.a_bits} and {self.b_bits}"


@dataclass
class VerifyReport:
    """What two checkpoints have in common. `ok`: `same`, and no NaN or infinity.

    Attributes:
        different: tensors whose bits differ, by name, with the count of differing elements.
        examples: the first ten of them in detail.
        mismatched: tensors of different dtype or shape, with both.
        only_in_a, only_in_b: names that the other lacks.
        missing: names that the configuration has and neither checkpoint.
        files: files beside the weights (tokenizer, chat template, ...) that both have, with different bytes.
        files_only_in_a, files_only_in_b: such files that the other lacks; to be known, but no difference of the model.
        config: fields of the configuration that differ, with both values.
        nan, inf: counts by tensor, in whichever of the two has more.
    """

    a: str
    b: str
    allow_nonfinite: bool
    tensors: int = 0
    bytes: int = 0
    different: dict[str, int] = field(default_factory=dict)
    examples: list[TensorDifference] = field(default_factory=list)
    mismatched: dict[str, str] = field(default_factory=dict)
    only_in_a: list[str] = field(default_factory=list)
    only_in_b: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    files: list[str] = field(default_factory=list)
    files_only_in_a: list[str] = field(default_factory=list)
    files_only_in_b: list[str] = field(default_factory=list)
    config: dict[str, str] = field(default_factory=dict)
    nan: dict[str, int] = field(default_factory=dict)
    inf: dict[str, int] = field(default_factory=dict)

    @property
    def same(self) -> bool:
        """Every tensor of the configuration is in both with the same bits, and configurations and files agree."""
        tensors = self.different or self.mismatched or self.only_in_a or self.only_in_b or self.missing
        return not (tensors or self.config or self.files)

    @property
    def finite(self) -> bool:
        return not (self.nan or self.inf)

    @property
    def ok(self) -> bool:
        return self.same and (self.allow_nonfinite or self.finite)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"same": self.same, "finite": self.finite, "ok": self.ok}

    def lines(self) -> list[str]:
        """For people: one collapsed table a kind of difference, and one line of summary."""
        nonfinite = {name: (self.nan.get(name, 0), self.inf.get(name, 0)) for name in self.nan | self.inf}
        verdict = "the same" if self.same else "DIFFERENT"
        return [
            *table("configuration differs", (f"{name}: {values}" for name, values in self.config.items())),
            *table(f"only in {self.a}", map(printable, self.only_in_a)),
            *table(f"only in {self.b}", map(printable, self.only_in_b)),
            *table("in neither, though the configuration has them", self.missing),
            *table("files differ", map(printable, self.files)),
            *table(f"files only in {self.a}", map(printable, self.files_only_in_a)),
            *table(f"files only in {self.b}", map(printable, self.files_only_in_b)),
            *table(
                "different dtype or shape", (f"{printable(name)}: {both}" for name, both in self.mismatched.items())
            ),
            *table("different bits", map(printable, self.different)),
            *(f"  {example}" for example in self.examples),
            *table("NaN or infinity", map(printable, nonfinite)),
            *([f"  {sum(self.nan.values())} NaN, {sum(self.inf.values())} infinities"] if nonfinite else []),
            f"{self.tensors} tensors, {self.bytes:,} bytes compared: {verdict}",
        ]


def verify(
    a: Path | str,
    b: Path | str,
    *,
    allow_nonfinite: bool = False,
    workers: int | None = None,
    on_progress: OnProgress | None = None,
) -> VerifyReport:
    """Compare two checkpoints, each a Hugging Face directory or a native one.

    Tensors are compared by their Hugging Face names in their Hugging Face layout, so how they are sharded does not matter.
    A tensor that one side lacks is a difference and no error; a file that breaks its format is an error.

    Raises:
        CheckpointError, ConfigError: one of the two cannot be read.
    """
    config_a, checkpoint_a = _open(Path(a))
    with checkpoint_a:
        config_b, checkpoint_b = _open(Path(b))
        with checkpoint_b:
            report = VerifyReport(str(a), str(b), allow_nonfinite)
            report.config = dict(config_differences(config_a, config_b))
            _compare_files(checkpoint_a.path, checkpoint_b.path, report)
            common = _compare_headers(checkpoint_a, checkpoint_b, report)
            found = checkpoint_a.tensors.keys() | checkpoint_b.tensors.keys()
            report.missing = [tensor.name for tensor in tensor_map(config_a) if tensor.name not in found]
            comparison = _Comparison(checkpoint_b, common, report)
            copy_tensors(
                checkpoint_a, comparison, common, workers=workers or default_workers(), on_progress=on_progress
            )
            comparison.finish()
    return report


def _open(path: Path) -> tuple[ModelConfig, Checkpoint]:
    """Open without asking whether the tensors fit the configuration: a missing one is for the report."""
    if is_native(path):
        native = NativeDirectory(path)
        return native.config, native
    directory = open_hf(path)
    try:
        return without_mtp(read_config(path / CONFIG_FILE), directory.tensors), directory
    except BaseException:
        directory.close()
        raise


def config_differences(a: ModelConfig, b: ModelConfig) -> Iterator[tuple[str, str]]:
    """(field, "one value and the other") of two configurations, layer by layer where their numbers of layers agree."""
    for name in ModelConfig.model_fields:
        one, other = getattr(a, name), getattr(b, name)
        if one == other:
            continue
        if name != "layers" or len(one) != len(other):
            yield name, f"{_short(one)} and {_short(other)}"
            continue
        for layer, (spec, other_spec) in enumerate(zip(one, other, strict=True)):
            for part in type(spec).model_fields:
                if getattr(spec, part) != getattr(other_spec, part):
                    yield f"layers.{layer}.{part}", f"{getattr(spec, part)} and {getattr(other_spec, part)}"


def _short(value: object) -> str:
    text = re.sub(r"\s+", " ", str(value))
    return text if len(text) <= 120 else f"{text[:117]}..."


def _compare_headers(a: Checkpoint, b: Checkpoint, report: VerifyReport) -> dict[str, TensorInfo]:
    """Names, dtypes and shapes; returns the tensors whose data can be compared, in the order of `a`."""
    report.only_in_a = [name for name in a.tensors if name not in b.tensors]
    report.only_in_b = [name for name in b.tensors if name not in a.tensors]
    common = {}
    for name, info in a.tensors.items():
        other = b.tensors.get(name)
        if other is None:
            continue
        if (info.dtype, info.shape) != (other.dtype, other.shape):
            report.mismatched[name] = f"{info.dtype} {list(info.shape)} and {other.dtype} {list(other.shape)}"
        else:
            common[name] = info
    report.tensors, report.bytes = len(common), sum(info.nbytes for info in common.values())
    return common


def _compare_files(a: Path, b: Path, report: VerifyReport) -> None:
    """The files beside the weights; config.json is compared by its meaning and not here."""
    files_a, files_b = ([file.path for file in files_beside_weights(path)[0]] for path in (a, b))
    report.files_only_in_a = [name for name in files_a if name not in files_b]
    report.files_only_in_b = [name for name in files_b if name not in files_a]
    both = (name for name in files_a if name in files_b)
    report.files = [
        name for name in both if not filecmp.cmp(resolve_inside(a, name), resolve_inside(b, name), shallow=False)
    ]


class _Comparison:
    """A sink that reads the same rows from the other checkpoint and compares."""

    def __init__(self, other: Checkpoint, infos: dict[str, TensorInfo], report: VerifyReport):
        self._other, self._infos, self._report, self._lock = other, infos, report, threading.Lock()
        self._first: dict[str, tuple[int, TensorDifference]] = {}

    def write_rows(self, name: str, begin: int, end: int, bits: Bits) -> None:
        info, other = self._infos[name], self._other.read_rows(name, begin, end)
        same = np.array_equal(bits, other)
        counts = [0, 0]
        if info.dtype in FLOATS:
            sides = [bits] if same else [bits, other]
            counts = [max(pair) for pair in zip(*(count_nonfinite(side, info.dtype) for side in sides), strict=True)]
        with self._lock:
            for total, count in zip((self._report.nan, self._report.inf), counts, strict=True):
                if count:
                    total[name] = total.get(name, 0) + count
            if not same:
                self._differ(name, begin, bits, other)

    def _differ(self, name: str, begin: int, a: Bits, b: Bits) -> None:
        unequal = np.flatnonzero((a != b).reshape(-1))
        self._report.different[name] = self._report.different.get(name, 0) + unequal.size
        if name in self._first and self._first[name][0] < begin:
            return
        index = [int(i) for i in np.unravel_index(unequal[0], a.shape)]
        if index:
            index[0] += begin
        digits = 2 * a.dtype.itemsize
        both = (f"0x{int(side.reshape(-1)[unequal[0]]):0{digits}x}" for side in (a, b))
        self._first[name] = (begin, TensorDifference(name, 0, tuple(index), *both))

    def finish(self) -> None:
        """Put what the threads found into the order of the tensors."""
        report = self._report
        for counts in (report.different, report.nan, report.inf):
            ordered = {name: counts[name] for name in self._infos if name in counts}
            counts.clear()
            counts.update(ordered)
        for name in list(report.different)[:MAX_EXAMPLES]:
            first = self._first[name][1]
            report.examples.append(
                TensorDifference(name, report.different[name], first.first_index, first.a_bits, first.b_bits)
            )
