"""Every format gives the same records, in parts or whole, and what is not of its format is told with file and row."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from exaone_jax.data import python_files
from exaone_jax.data.sources import parts_of
from exaone_jax.errors import ConfigError, InputError
from tests.data.conftest import WRITERS, source, write_array_record, write_gzip, write_jsonl, write_parquet

RECORDS = [{"text": f"document {i}, 서울" + " x" * (i % 5)} for i in range(11)]


def texts(path: Path, part_bytes: int = 1 << 20, **options: str) -> list[str]:
    parts = parts_of(source(path, **options), part_bytes)
    return [record["text"] for part in parts for _, record in part.records()]


@pytest.mark.parametrize("name", WRITERS)
@pytest.mark.parametrize("part_bytes", [1, 50, 1 << 20])
def test_all_formats_give_all_records_in_order(name: str, part_bytes: int, tmp_path: Path) -> None:
    assert texts(WRITERS[name](tmp_path / name, RECORDS), part_bytes) == [record["text"] for record in RECORDS]


@given(st.lists(st.sampled_from(["", " ", '{"text": "a"}', '{"text": "bcdefgh"}'])), st.integers(1, 60), st.booleans())
def test_lines_land_in_exactly_one_part(tmp_path_factory, lines: list[str], part_bytes: int, ended: bool) -> None:
    path = tmp_path_factory.mktemp("lines") / "a.jsonl"
    path.write_text("\n".join(lines) + "\n" * ended)
    assert texts(path, part_bytes) == [json.loads(line)["text"] for line in lines if line.strip()]


@pytest.mark.parametrize("part_bytes", [20, 1 << 20])
@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"{oops", "row 8: not JSON"),
        (b"[1]", "row 8: expected a JSON object, found list"),
        (b'{"text": "\xff"}', "row 8: not UTF-8"),
        (b"[" * 100_000, "row 8: not JSON"),
    ],
)
def test_a_bad_line_is_named(line: bytes, message: str, part_bytes: int, tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "fine"}\n' * 6 + b"\n" + line + b"\n" + b'{"text": "fine"}\n')
    with pytest.raises(InputError, match=rf"a\.jsonl, {message}"):
        texts(path, part_bytes)


def test_a_bad_line_of_gzip_and_a_torn_file_are_named(tmp_path: Path) -> None:
    path = write_gzip(tmp_path / "a.jsonl.gz", RECORDS)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InputError, match=r"a\.jsonl\.gz: not readable as gzip"):
        texts(path)
    path.write_bytes(b"not gzip at all")
    with pytest.raises(InputError, match="not readable as gzip"):
        texts(path)


def test_a_byte_order_mark_is_no_part_of_the_text(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"text": "a"}\n{"text": "b"}\n')
    assert texts(path) == ["a", "b"]


def test_text_that_is_not_utf8_is_named_with_its_line(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"one\ntwo\n\xff\n")
    with pytest.raises(InputError, match=r"a\.txt, line 3: not UTF-8"):
        texts(tmp_path)


@pytest.mark.parametrize(
    ("name", "write"), [("a.parquet", write_parquet), ("a.array_record", write_array_record)], ids=["parquet", "array"]
)
def test_a_torn_binary_file_is_named(name: str, write, tmp_path: Path) -> None:
    path = write(tmp_path / name, RECORDS)
    path.write_bytes(path.read_bytes()[:40])
    with pytest.raises(InputError, match=rf"{name}.*not readable"):
        texts(path)


def test_a_torn_dataset_is_named(tmp_path: Path) -> None:
    path = WRITERS["dataset"](tmp_path / "dataset", RECORDS)
    (path / "data-00000-of-00002.arrow").write_bytes(b"torn")
    with pytest.raises(InputError, match=r"data-00000-of-00002\.arrow.*not readable as Arrow"):
        texts(path)


def test_patterns_directories_and_named_formats_choose_files(tmp_path: Path) -> None:
    for name in ("b.jsonl", "a.jsonl"):
        write_jsonl(tmp_path / name, [{"text": name}])
    (tmp_path / "notes.cfg").write_text("left")
    (tmp_path / ".hidden.jsonl").write_text("left")
    assert texts(tmp_path) == ["a.jsonl", "b.jsonl"]
    assert texts(tmp_path / "b*.jsonl") == ["b.jsonl"]
    assert texts(tmp_path / "notes.cfg", format="text") == ["left"]
    write_jsonl(tmp_path / "rows.log", [{"text": "log"}])
    assert texts(tmp_path / "rows.log", format="jsonl") == ["log"]


def test_what_is_not_there_or_unclear_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such file"):
        parts_of(source(tmp_path / "absent"))
    with pytest.raises(ConfigError, match="no file in it"):
        parts_of(source(tmp_path))
    (tmp_path / "a.cfg").write_text("x")
    with pytest.raises(ConfigError, match="its name tells no format"):
        parts_of(source(tmp_path / "a.cfg"))
    write_jsonl(tmp_path / "a.jsonl", RECORDS)
    (tmp_path / "a.txt").write_text("x")
    with pytest.raises(ConfigError, match="several formats"):
        parts_of(source(tmp_path))
    with pytest.raises(ConfigError, match=r"state\.json not found"):
        parts_of(source(tmp_path, format="dataset"))
    (tmp_path / "splits" / "train").mkdir(parents=True)
    (tmp_path / "splits" / "dataset_dict.json").write_text("{}")
    with pytest.raises(ConfigError, match="several splits.*train"):
        parts_of(source(tmp_path / "splits"))


def test_sources_come_in_order_of_their_names_without_tests_and_packages(tmp_path: Path) -> None:
    kept = ["a.py", "a/b.py", "a/z.py", "b.py"]
    left = [
        "test/x.py",
        "a/tests/x.py",
        "site-packages/x.py",
        "a/__pycache__/x.py",
        "a/notes.txt",
        "idlelib/idle_test/x.py",
    ]
    for name in reversed(kept + left):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("")
    assert [path.relative_to(tmp_path).as_posix() for path in python_files(tmp_path)] == kept


def test_the_place_of_the_tree_does_not_matter(tmp_path: Path) -> None:
    root = tmp_path / "test" / "lib"
    root.mkdir(parents=True)
    (root / "x.py").write_text("")
    assert python_files(root) == [root / "x.py"]
