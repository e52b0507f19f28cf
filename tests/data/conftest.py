"""One small tokenizer for all tests of the room, and files of every format with the same records."""

import gzip
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from exaone_jax.config.data import SourceConfig
from exaone_jax.text import Tokenizer, train_bpe

STDLIB = Path(json.__file__).parent.parent
Record = dict[str, Any]


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return train_bpe([(STDLIB / "json" / "decoder.py").read_text(encoding="utf-8")], 700)


@pytest.fixture(scope="session")
def tokenizer_dir(tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("tokenizer")
    tokenizer.save(directory)
    return directory


def write_jsonl(path: Path, records: Sequence[Record]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


def write_gzip(path: Path, records: Sequence[Record]) -> Path:
    path.write_bytes(gzip.compress("".join(json.dumps(record) + "\n" for record in records).encode()))
    return path


def write_parquet(path: Path, records: Sequence[Record]) -> Path:
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(list(records)), path, row_group_size=3)
    return path


def write_array_record(path: Path, records: Sequence[Record]) -> Path:
    from array_record.python.array_record_module import ArrayRecordWriter

    writer = ArrayRecordWriter(str(path), "group_size:1")
    for record in records:
        writer.write(json.dumps(record).encode())
    writer.close()
    return path


def write_dataset(path: Path, records: Sequence[Record]) -> Path:
    """As `datasets.Dataset.save_to_disk`: Arrow streams that state.json names, in its order and not the names'."""
    import pyarrow

    path.mkdir()
    table = pyarrow.Table.from_pylist(list(records))
    half = len(records) // 2
    names = ["data-00001-of-00002.arrow", "data-00000-of-00002.arrow"]
    for name, part in zip(names, (table[:half], table[half:]), strict=True):
        with pyarrow.OSFile(str(path / name), "wb") as file, pyarrow.ipc.new_stream(file, table.schema) as writer:
            writer.write_table(part, max_chunksize=2)
    (path / "cache-0123.arrow").write_bytes(b"not one of the dataset's")
    (path / "state.json").write_text(json.dumps({"_data_files": [{"filename": name} for name in names]}))
    (path / "dataset_info.json").write_text("{}")
    return path


def write_text(path: Path, records: Sequence[Record]) -> Path:
    path.mkdir()
    for number, record in enumerate(records):
        (path / f"{number:03}.txt").write_text(record["text"], encoding="utf-8")
    return path


WRITERS: dict[str, Callable[[Path, Sequence[Record]], Path]] = {
    "a.jsonl": write_jsonl,
    "a.jsonl.gz": write_gzip,
    "a.parquet": write_parquet,
    "a.array_record": write_array_record,
    "dataset": write_dataset,
    "texts": write_text,
}


def source(path: Path, **options: Any) -> SourceConfig:
    return SourceConfig(path=str(path), **options)
