"""verify must see every change, in any mix of forms."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from exaone_jax.checkpoints import convert
from exaone_jax.checkpoints.bits import count_nonfinite
from exaone_jax.checkpoints.directory import SINGLE_FILE
from exaone_jax.checkpoints.safetensors import Bits, SafetensorsFile, write_file
from exaone_jax.checkpoints.verify import TensorDifference, VerifyReport, verify
from exaone_jax.errors import CheckpointError
from tests.checkpoints.synthetic import exaone_moe, write_checkpoint

Tensors = dict[str, tuple[str, Bits]]


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A finite checkpoint in both forms."""
    root = tmp_path_factory.mktemp("verify")
    source = write_checkpoint(root / "hf", exaone_moe(), finite=True)
    convert.from_hf(source, root / "native")
    return source, root / "native"


def changed(source: Path, tmp_path: Path, change: Callable[[Tensors], object]) -> Path:
    path = Path(shutil.copytree(source, tmp_path / "changed"))
    with SafetensorsFile(path / SINGLE_FILE) as file:
        tensors = {name: (info.dtype, file.read_rows(name)) for name, info in file.header.tensors.items()}
    change(tensors)
    (path / SINGLE_FILE).unlink()
    write_file(path / SINGLE_FILE, tensors)
    return path


def test_same(pair: tuple[Path, Path]):
    for a in pair:
        for b in pair:
            report = verify(a, b)
            assert report.ok
            assert report.lines() == [f"{report.tensors} tensors, {report.bytes:,} bytes compared: the same"]
            assert json.loads(json.dumps(report.to_dict()))["ok"] is True


L = "model.layers.{}."
ATTENTION, EXPERT = L + "self_attn.{}.weight", L + "mlp.experts.{}.{}.weight"


def swap(a: str, b: str) -> Callable[[Tensors], object]:
    return lambda tensors: tensors.update({a: tensors[b], b: tensors[a]})


def set_bits(name: str, function: Callable[[Bits], Bits]) -> Callable[[Tensors], object]:
    return lambda tensors: tensors.update({name: (tensors[name][0], function(tensors[name][1]))})


def negative_zero(bits: Bits) -> Bits:
    bits = bits.copy()
    bits[0] = 0x8000
    return bits


MUTATIONS = {
    "swapped k and v": swap(ATTENTION.format(2, "k_proj"), ATTENTION.format(2, "v_proj")),
    "swapped layers": swap(ATTENTION.format(2, "q_proj"), ATTENTION.format(3, "q_proj")),
    "swapped experts": swap(EXPERT.format(2, 0, "gate_proj"), EXPERT.format(2, 1, "gate_proj")),
    "swapped gate and up": swap(EXPERT.format(2, 0, "gate_proj"), EXPERT.format(2, 0, "up_proj")),
    "swapped norms": swap("mtp.pre_fc_norm_hidden.weight", "mtp.pre_fc_norm_embedding.weight"),
    "tensor turned over": set_bits(EXPERT.format(2, 0, "gate_proj"), lambda bits: np.ascontiguousarray(bits[::-1])),
    "transposed expert": set_bits(EXPERT.format(2, 0, "gate_proj"), lambda bits: np.ascontiguousarray(bits.T)),
    "transposed square": set_bits(ATTENTION.format(1, "k_proj"), lambda bits: np.ascontiguousarray(bits.T)),
    "one bit": set_bits("model.norm.weight", lambda bits: bits ^ np.eye(1, 32, 5, np.uint16)[0]),
    "dropped bias": lambda tensors: tensors.pop(L.format(3) + "mlp.e_score_correction_bias"),
    "dropped mtp": lambda tensors: [tensors.pop(name) for name in list(tensors) if name.startswith("mtp.")],
    "extra tensor": lambda tensors: tensors.update({"extra": ("F32", np.zeros(1, np.uint32))}),
    "bias in another dtype": lambda tensors: tensors.update(
        {L.format(3) + "mlp.e_score_correction_bias": ("BF16", np.zeros(4, np.uint16))}
    ),
}


@pytest.mark.parametrize("name", MUTATIONS)
def test_mutations_fail(name: str, pair: tuple[Path, Path], tmp_path: Path):
    path = changed(pair[0], tmp_path, MUTATIONS[name])
    for other in pair:
        for a, b in ((path, other), (other, path)):
            report = verify(a, b)
            assert not report.ok
            assert not report.same
            assert "DIFFERENT" in report.lines()[-1]


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"sliding_windows": [17, 16, 16, 0, 16, 16, 16, 0]}, "layers.0.window"),  # one key too long
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 1e5}}, "rope_theta"),
        ({"routed_scaling_factor": 1.0}, "moe"),
        ({"rms_norm_eps": 1e-6}, "rms_norm_eps"),
    ],
)
def test_configurations_that_compute_something_else_fail(
    changes: dict, field: str, pair: tuple[Path, Path], tmp_path: Path
):
    path = Path(shutil.copytree(pair[0], tmp_path / "changed"))
    raw = json.loads((path / "config.json").read_text()) | changes
    if "sliding_windows" in changes:
        raw.pop("sliding_window", None)
    (path / "config.json").write_text(json.dumps(raw))
    report = verify(path, pair[1])
    assert not report.ok
    assert field in report.config


def test_files_beside_the_weights(pair: tuple[Path, Path], tmp_path: Path):
    path = Path(shutil.copytree(pair[0], tmp_path / "changed"))
    (path / "tokenizer.json").write_bytes(pair[0].joinpath("tokenizer.json").read_bytes() + b" ")
    (path / "LICENSE").unlink()
    (path / "notes.txt").write_text("mine")
    report = verify(path, pair[1])
    assert report.files == ["tokenizer.json"]
    assert (report.files_only_in_a, report.files_only_in_b) == (["notes.txt"], ["LICENSE"])
    assert not report.same
    assert "files differ:" in report.lines()
    shutil.copy(pair[0] / "tokenizer.json", path)
    assert verify(path, pair[1]).ok, "a file that one side lacks is reported and no more"


def test_a_tensor_that_both_lack(pair: tuple[Path, Path], tmp_path: Path):
    name = EXPERT.format(2, 0, "gate_proj")
    path = changed(pair[0], tmp_path, lambda tensors: tensors.pop(name))
    report = verify(path, path)
    assert report.missing == [name]
    assert not report.ok


def test_detail(pair: tuple[Path, Path], tmp_path: Path):
    """The report says which element, with both bit patterns, and folds the names."""

    def change(tensors: Tensors) -> None:
        for layer in range(1, 5):
            dtype, bits = tensors[ATTENTION.format(layer, "q_proj")]
            bits = bits.copy()
            bits[5, 7], bits[6, 0] = 0x1234, 0x5678
            tensors[ATTENTION.format(layer, "q_proj")] = (dtype, bits)

    report = verify(pair[1], changed(pair[0], tmp_path, change))
    assert list(report.different.values()) == [2] * 4
    first = report.examples[0]
    assert (first.name, first.first_index, first.b_bits) == (ATTENTION.format(1, "q_proj"), (5, 7), "0x1234")
    assert any("layers.{1...4}.self_attn.q_proj.weight (4)" in line for line in report.lines())


def test_names_are_printed_without_control_characters():
    name = "\x1b]0;owned\x07\ud800\n"
    report = VerifyReport("a", "b", False, only_in_a=[name], only_in_b=[name], mismatched={name: "x"})
    report.different, report.nan, report.inf = {name: 1}, {name: 1}, {name: 1}
    report.examples = [TensorDifference(name, 1, (0,), "0x0", "0x1")]
    lines = report.lines()
    assert all(line.isascii() and line.isprintable() for line in lines)
    assert sum(r"\x1b]0;owned\x07\ud800\n" in line for line in lines) == 6


def test_first_difference_across_chunks(pair: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("exaone_jax.checkpoints.native.CHUNK_BYTES", 128)

    def change(bits: Bits) -> Bits:
        bits = bits.copy()
        bits[40, 3], bits[90, 1] = 1, 1
        return bits

    report = verify(pair[0], changed(pair[0], tmp_path, set_bits("model.embed_tokens.weight", change)))
    assert report.examples[0].first_index == (40, 3)
    assert report.examples[0].elements == 2


def test_nan_and_infinity_fail_unless_allowed(pair: tuple[Path, Path], tmp_path: Path):
    def change(tensors: Tensors) -> None:
        bits = tensors["model.norm.weight"][1].copy()
        bits[:3] = 0x7F80, 0x7FC1, 0xFFFF
        tensors["model.norm.weight"] = ("BF16", bits)
        bias = L.format(3) + "mlp.e_score_correction_bias"
        tensors[bias] = ("F32", np.array([0x7F800000, 0x7F800001, 0, 1], np.uint32))

    path = changed(pair[0], tmp_path, change)
    report = verify(path, path)
    assert report.same
    assert not report.ok
    assert report.nan == {"model.norm.weight": 2, L.format(3) + "mlp.e_score_correction_bias": 1}
    assert report.inf == {"model.norm.weight": 1, L.format(3) + "mlp.e_score_correction_bias": 1}
    assert any("3 NaN, 2 infinities" in line for line in report.lines())
    assert verify(path, path, allow_nonfinite=True).ok


def test_count_nonfinite_agrees_with_numpy():
    """All 65,536 patterns of the 16-bit dtypes."""
    from exaone_jax.checkpoints.bits import FLOATS

    every = np.arange(65536, dtype=np.uint16)
    for dtype in ("BF16", "F16"):
        values = every.view(FLOATS[dtype]).astype(np.float32)
        assert count_nonfinite(every, dtype) == (np.isnan(values).sum(), np.isinf(values).sum())


def test_a_broken_file_is_an_error_and_not_a_difference(pair: tuple[Path, Path], tmp_path: Path):
    path = Path(shutil.copytree(pair[0], tmp_path / "broken"))
    (path / SINGLE_FILE).write_bytes((path / SINGLE_FILE).read_bytes()[:-1])
    with pytest.raises(CheckpointError, match="truncated"):
        verify(pair[0], path)


def test_signed_zero_differs(pair: tuple[Path, Path], tmp_path: Path):
    """-0.0 == 0.0 for floats; bits tell them apart."""
    zero = changed(pair[0], tmp_path, set_bits("model.norm.weight", lambda bits: np.zeros_like(bits)))
    other = changed(zero, tmp_path / "x", set_bits("model.norm.weight", negative_zero))
    assert not verify(zero, other).same
