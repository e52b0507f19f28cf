"""The bad-input table for one file (facts, conversion section 2), the writer against the reference library, and fuzzing."""

import json
import os
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
from hypothesis import given
from hypothesis import strategies as st

from exaone_jax.checkpoints.safetensors import (
    MAX_HEADER_BYTES,
    MAX_TENSORS,
    SMALL_HEADER_BYTES,
    SafetensorsFile,
    build_header,
    parse_header,
    write_file,
)
from exaone_jax.errors import CheckpointError


def entry(dtype: str = "F32", shape: Any = (2,), offsets: Any = (0, 8)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


def encode(header: object, data: bytes = b"\0" * 8, before: str = "", after: str = "") -> bytes:
    text = header if isinstance(header, str) else json.dumps(header)
    raw = (before + text + after).encode("utf-8", "surrogatepass")
    return struct.pack("<Q", len(raw)) + raw + data


GOOD = encode({"a": entry()})
F32 = '{"dtype":"F32","shape":[2],"data_offsets":[0,8]}'
BAD = {
    "zero bytes": (b"", "empty"),
    "seven bytes": (b"1234567", "cannot hold"),
    "data truncated": (GOOD[:-1], "truncated"),
    "no data": (GOOD[:-8], "truncated"),
    "header truncated": (GOOD[:20], "truncated"),
    "trailing bytes": (GOOD + b"x", "trailing"),
    "polyglot zip": (GOOD + b"PK\x03\x04", "trailing"),
    "header over the cap": (struct.pack("<Q", MAX_HEADER_BYTES + 1) + b"{" * 64, "more than the allowed"),
    "header length 2^63": (struct.pack("<Q", 2**63) + b"{" * 64, "more than the allowed"),
    "header length 0": (struct.pack("<Q", 0) + b"{}", "zero bytes|begin with"),
    "overlap": (encode({"a": entry(), "b": entry(shape=(1,), offsets=(4, 8))}), "overlaps"),
    "alias": (encode({"a": entry(), "b": entry()}), "overlaps"),
    "hole": (encode({"a": entry(shape=(1,), offsets=(0, 4)), "b": entry(shape=(1,), offsets=(8, 12))}, b"0" * 12), "hole"),
    "first offset not 0": (encode({"a": entry(offsets=(4, 12))}, b"0" * 12), "hole"),
    "too few bytes": (encode({"a": entry(shape=(3,))}), "needs 12 bytes"),
    "too many bytes": (encode({"a": entry(shape=(1,))}), "needs 4 bytes"),
    "negative offset": (encode({"a": entry(offsets=(-8, 0))}), "data_offsets"),
    "end before begin": (encode({"a": entry(shape=(0,), offsets=(8, 0))}), "data_offsets"),
    "three offsets": (encode({"a": entry(offsets=(0, 8, 8))}), "data_offsets"),
    "float offset": (encode({"a": entry(offsets=(0, 8.0))}), "data_offsets"),
    "boolean offset": (encode({"a": entry("U8", (1,), (False, True))}, b"0"), "data_offsets"),
    "dimension overflow": (encode({"a": entry(shape=(2**33, 2**33))}), "needs"),
    "huge dimension": (encode({"a": entry(shape=(2**64, 0), offsets=(0, 0))}, b""), "list of sizes"),
    "negative dimension": (encode({"a": entry(shape=(-2,))}), "list of sizes"),
    "shape is no list": (encode({"a": entry() | {"shape": 2}}), "list of sizes"),
    "unknown dtype": (encode({"a": entry("F31")}), "unknown dtype"),
    "dtype is no string": (encode({"a": entry() | {"dtype": 3}}), "unknown dtype"),
    "duplicate name": (encode(f'{{"a":{F32},"a":{F32}}}'), "duplicate name 'a'"),
    "duplicate field": (encode('{"a":{"dtype":"F32","dtype":"F32","shape":[2],"data_offsets":[0,8]}}'), "duplicate"),
    "duplicate in metadata": (encode(f'{{"__metadata__":{{"k":"1","k":"2"}},"a":{F32}}}'), "duplicate"),
    "missing field": (encode({"a": {"dtype": "F32", "shape": [2]}}), "expected an object with"),
    "entry is a list": (encode({"a": []}), "expected an object with"),
    "metadata not strings": (encode({"__metadata__": {"n": 1}, "a": entry()}), "__metadata__"),
    "metadata is a list": (encode({"__metadata__": [], "a": entry()}), "__metadata__"),
    "leading space": (encode({"a": entry()}, before=" "), "begin with"),
    "trailing newline": (encode({"a": entry()}, after="\n"), "nothing but spaces"),
    "two objects": (encode({"a": entry()}, after="{}"), "not valid JSON"),
    "not json": (encode("{not json}"), "not valid JSON"),
    "not utf-8": (struct.pack("<Q", 4) + b'{"\xff}', "not valid JSON"),
    "deeply nested": (encode("{" + '"a":{' * 100_000 + "}" * 100_001), "not valid JSON"),
    "number of 5000 digits": (encode({"a": entry()}).replace(b"[2]", b"[2]") and encode('{"a":' + "9" * 5000 + "}"), "JSON"),
    "git-lfs pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 123\n", "git lfs pull"),
    "html": (b"<!DOCTYPE html><html><body>404 not found</body></html>", "HTML"),
    "html with space": (b"\n\n <HTML><head></head></html>" + b" " * 50, "HTML"),
    "pickle": (b"\x80\x04\x95" + b"\x1f" * 60, "pickle"),
    "pickle protocol 2": (b"\x80\x02}q\x00(X\x05\x00\x00\x00model", "pickle"),
    "torch zip": (b"PK\x03\x04" + b"\0" * 26 + b"archive/data.pkl", "zip archive"),
    "gguf": (b"GGUF" + b"\x03\0\0\0" * 20, "GGUF"),
    "zeros": (b"\0" * 4096, "zero bytes"),
}  # fmt: skip


def write(tmp_path: Path, data: bytes) -> Path:
    path = tmp_path / "x.safetensors"
    path.write_bytes(data)
    return path


@pytest.mark.parametrize("name", BAD)
def test_bad_file(name: str, tmp_path: Path):
    data, message = BAD[name]
    with pytest.raises(CheckpointError, match=message) as error, SafetensorsFile(write(tmp_path, data)):
        pass
    assert "x.safetensors" in str(error.value)


def test_header_bomb(tmp_path: Path):
    """1.6 million empty tensors in a header under the 100 MB cap cost other readers a gigabyte."""
    entries = ",".join(f'"{i}":{{"dtype":"F32","shape":[0],"data_offsets":[0,0]}}' for i in range(MAX_TENSORS + 1))
    bomb = "{" + entries + "}"
    assert len(bomb) < SMALL_HEADER_BYTES
    with pytest.raises(CheckpointError, match="header bomb"), SafetensorsFile(write(tmp_path, encode(bomb, b""))):
        pass
    large = encode({"a": entry()}, after=" " * SMALL_HEADER_BYTES)
    with pytest.raises(CheckpointError, match="header bomb"), SafetensorsFile(write(tmp_path, large)):
        pass


def test_directory_and_pipe(tmp_path: Path):
    with pytest.raises(CheckpointError, match="a directory"), SafetensorsFile(tmp_path):
        pass
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(CheckpointError, match="not a regular file"), SafetensorsFile(tmp_path / "pipe"):
        pass
    with pytest.raises(CheckpointError, match="cannot be opened"), SafetensorsFile(tmp_path / "none"):
        pass


def test_truncated_after_open_is_an_error_and_not_a_signal(tmp_path: Path):
    path = write(tmp_path, encode({"a": entry("U8", (1 << 20,), (0, 1 << 20))}, bytes(1 << 20)))
    with SafetensorsFile(path) as file:
        os.truncate(path, 4096)
        with pytest.raises(CheckpointError, match="truncated after it was opened"):
            file.read_rows("a")


def test_descriptor_is_closed_after_an_error(tmp_path: Path):
    path = write(tmp_path, GOOD + b"x")
    before = len(list(Path("/proc/self/fd").iterdir()))
    for _ in range(5):
        with pytest.raises(CheckpointError):
            SafetensorsFile(path)
    assert len(list(Path("/proc/self/fd").iterdir())) == before


@pytest.mark.parametrize(
    ("header", "names"),
    [
        ({"a": entry()}, ["a"]),
        ({"__metadata__": {"format": "pt"}, "a": entry()}, ["a"]),
        (
            {"e": entry(shape=(0,), offsets=(0, 0)), "a": entry(), "f": entry(shape=(3, 0), offsets=(8, 8))},
            ["e", "a", "f"],
        ),
        ({"": entry(shape=(1,), offsets=(0, 4)), "../../etc/passwd\0": entry(shape=(1,), offsets=(4, 8))}, None),
        ({"odd": entry("U8", (3,), (0, 3)), "a": entry("U8", (5,), (3, 8))}, ["odd", "a"]),
        ({"scalar": entry("F64", (), (0, 8))}, ["scalar"]),
    ],
)
def test_allowed(header: dict[str, Any], names: list[str] | None, tmp_path: Path):
    data = bytes(range(8))
    with SafetensorsFile(write(tmp_path, encode(header, data, after="   "))) as file:
        assert list(file.header.tensors) == (names if names is not None else list(header))
        joined = b"".join(file.read_rows(name).tobytes() for name in file.header.tensors)
    assert joined == data


def test_unknown_field_is_a_warning(tmp_path: Path):
    with SafetensorsFile(write(tmp_path, encode({"a": entry() | {"stride": 1}}))) as file:
        assert "stride" in file.header.warnings[0]


def test_header_length_that_looks_like_a_pickle(tmp_path: Path):
    """A header of 640 bytes begins with the two bytes of a pickle of protocol 2, and is fine."""
    text = json.dumps({"a": entry()})
    data = encode(text, after=" " * (640 - len(text)))
    assert data[:2] == b"\x80\x02"
    with SafetensorsFile(write(tmp_path, data)) as file:
        assert list(file.header.tensors) == ["a"]


def test_rows(tmp_path: Path):
    array = np.arange(60, dtype=np.uint16).reshape(5, 3, 4)
    write_file(tmp_path / "x.safetensors", {"a": ("U16", array)})
    with SafetensorsFile(tmp_path / "x.safetensors") as file:
        np.testing.assert_array_equal(file.read_rows("a"), array)
        np.testing.assert_array_equal(file.read_rows("a", 1, 4), array[1:4])
        np.testing.assert_array_equal(file.read_rows("a", 2, 2), array[2:2])


def test_writer_gives_the_bytes_of_the_reference_library(tmp_path: Path):
    """Same order (widest dtype first, then name), spacing, padding and metadata as safetensors itself."""
    rng = np.random.default_rng(0)
    arrays = {
        "z.weight": rng.standard_normal((3, 5), np.float32),
        "b": rng.integers(0, 9, (7,), np.int64),
        "a.10": rng.standard_normal((2, 2)).astype(np.float16),
        "a.9": rng.standard_normal((1,)).astype(np.float16),
        "flag": np.array([1, 2, 3], np.uint8),
        "한국": rng.standard_normal((2,), np.float32),
    }
    safetensors.numpy.save_file(arrays, tmp_path / "theirs", metadata={"format": "pt"})
    names = {"float32": "F32", "int64": "I64", "float16": "F16", "uint8": "U8"}
    write_file(tmp_path / "ours", {name: (names[array.dtype.name], array) for name, array in arrays.items()})
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()


def test_built_header_passes_our_own_rules():
    header = build_header([("b", "BF16", (3, 4)), ("a", "F32", (2,)), ("s", "BF16", ())])
    assert parse_header(header.raw, header.file_size, "x").tensors == header.tensors
    with pytest.raises(CheckpointError, match="twice"):
        build_header([("a", "F32", ()), ("a", "F32", ())])


def check_against_reference(data: bytes, tmp: Path) -> None:
    """Whatever we accept covers the file exactly, and the reference library (which is laxer) accepts it too."""
    path = tmp / "fuzz.safetensors"
    path.write_bytes(data)
    try:
        with SafetensorsFile(path) as file:
            ours = {name: (info.shape, file.read_rows(name).tobytes()) for name, info in file.header.tensors.items()}
            assert file.header.file_size == len(data)
    except CheckpointError:
        return
    theirs = dict(safetensors.deserialize(data))
    assert {name: (tuple(t["shape"]), bytes(t["data"])) for name, t in theirs.items()} == ours


_sizes = st.integers(-2, 6) | st.sampled_from([2**31, 2**53, 2**63, 2**64])
_entries = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["F32", "BF16", "U8", "I64", "F8_E4M3", "X", ""]),
        "shape": st.lists(_sizes, max_size=3),
        "data_offsets": st.lists(st.integers(-4, 40), min_size=1, max_size=3),
    }
)
_headers = st.dictionaries(st.text(max_size=3), _entries, max_size=3)


@given(header=_headers, data=st.binary(max_size=40), spaces=st.integers(0, 9))
def test_fuzz_structured(header: dict[str, Any], data: bytes, spaces: int, tmp_path_factory: pytest.TempPathFactory):
    check_against_reference(encode(header, data, after=" " * spaces), tmp_path_factory.getbasetemp())


@given(raw=st.binary(max_size=120))
def test_fuzz_bytes(raw: bytes, tmp_path_factory: pytest.TempPathFactory):
    check_against_reference(raw, tmp_path_factory.getbasetemp())
    check_against_reference(struct.pack("<Q", len(raw) + 1) + b"{" + raw, tmp_path_factory.getbasetemp())


@given(position=st.integers(0, 300), value=st.integers(0, 255), cut=st.integers(0, 12))
def test_fuzz_mutations(position: int, value: int, cut: int, tmp_path_factory: pytest.TempPathFactory):
    """A valid file with one byte changed and the end cut off."""
    header = build_header([("model.norm.weight", "BF16", (3,)), ("b", "F32", (2, 2)), ("c", "U8", (5,))])
    data = bytearray(header.raw + bytes(range(header.file_size - len(header.raw))))
    data[position % len(data)] = value
    check_against_reference(bytes(data[: len(data) - cut]), tmp_path_factory.getbasetemp())
