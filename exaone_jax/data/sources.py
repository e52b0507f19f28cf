"""Where documents come from: files of records on disk, cut into parts that can be read each by itself."""

import glob
import gzip
import json
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

from exaone_jax.config.data import SourceConfig
from exaone_jax.errors import ConfigError, InputError

FileFormat = Literal["jsonl", "parquet", "arrayrecord", "text", "arrow"]
PART_BYTES = 64 << 20
JOB, MANIFEST = (
    "job.json",
    "manifest.json",
)  # of a directory that `exaone-jax data prepare` writes: its first file and its last
_SUFFIXES: Mapping[str, FileFormat] = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".jsonl.gz": "jsonl",
    ".parquet": "parquet",
    ".array_record": "arrayrecord",
    ".arrayrecord": "arrayrecord",
    ".arrow": "arrow",
    ".txt": "text",
    ".md": "text",
    ".py": "text",
}
# Neither the library's own code nor of a kind with it: tests are mostly data, and lib2to3's are other languages' worth of it.
_SKIPPED = frozenset({"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__", "pydoc_data"})


def python_files(root: Path) -> list[Path]:
    """Python sources under `root` in the order of their names, without installed packages and tests."""
    files = (path for path in root.rglob("*.py") if _SKIPPED.isdisjoint(path.relative_to(root).parts))
    return sorted(files, key=lambda path: path.relative_to(root).as_posix())


class Place(NamedTuple):
    """Where a record stands, for errors. row: from 1. byte: of a line whose number is counted only when someone asks."""

    path: Path
    row: int | None = None
    byte: int | None = None

    def __str__(self) -> str:
        if self.byte is None:
            return str(self.path) if self.row is None else f"{self.path}, row {self.row}"
        with self.path.open("rb") as file:
            row, left = 1, self.byte
            while left and (block := file.read(min(left, 1 << 20))):
                row, left = row + block.count(b"\n"), left - len(block)
        return f"{self.path}, row {row}"


Record = tuple[Place, Mapping[str, Any]]


@dataclass(frozen=True)
class Part:
    """Some records of a file.

    start, stop: bytes of JSONL (the lines that begin there), row groups of Parquet, records of ArrayRecord; stop None is the
    end of the file. text_column: where text files put their text.
    """

    path: Path
    format: FileFormat
    text_column: str
    size: int  # bytes, about
    start: int = 0
    stop: int | None = None

    def records(self) -> Iterator[Record]:
        """Raises InputError, with file and row, for what is not of the format."""
        return _READERS[self.format](self)


def is_prepared(path: str) -> bool:
    """Whether `exaone-jax data prepare` wrote this directory. Raises ConfigError where it did not come to the end."""
    directory = Path(path)
    if (directory / JOB).is_file() and not (directory / MANIFEST).is_file():
        raise ConfigError(f"{path}: `exaone-jax data prepare` has not finished it; run the same command again")
    return (directory / MANIFEST).is_file()


def files_of(source: SourceConfig) -> list[tuple[Path, FileFormat]]:
    """The files of a source in the order of their names. Raises ConfigError where there are none, or of several formats."""
    path = Path(source.path)
    if path.is_dir():
        files = _files_in(path, source)
    elif path.is_file():
        files = [path]
    else:
        names = sorted(glob.glob(source.path, recursive=True))  # noqa: PTH207 (Path.glob takes no absolute pattern)
        files = [file for file in map(Path, names) if file.is_file()]
        if not files:
            raise ConfigError(f"{source.path}: no such file or directory, and no file has a name of this pattern")
    found = [(file, _format_of(file, source)) for file in files]
    formats = sorted({format for _, format in found})
    if len(formats) > 1:
        raise ConfigError(f"{source.path}: files of several formats ({', '.join(formats)}); name one as format")
    return found


def _files_in(path: Path, source: SourceConfig) -> list[Path]:
    if (path / "dataset_dict.json").is_file():
        splits = sorted(entry.name for entry in path.iterdir() if entry.is_dir())
        raise ConfigError(f"{path}: a dataset of several splits; name one as path: {', '.join(splits)}")
    state = path / "state.json"  # of `datasets`: it names the files and their order; others may be caches
    if source.format in ("auto", "dataset") and state.is_file():
        try:
            return [path / entry["filename"] for entry in json.loads(state.read_bytes())["_data_files"]]
        except (ValueError, KeyError, TypeError) as error:
            raise ConfigError(f"{state}: not as `datasets` writes it: {error!r}") from error
    if source.format == "dataset":
        raise ConfigError(f"{path}: state.json not found; expected what `Dataset.save_to_disk` writes")
    files = [file for file in path.rglob("*") if file.is_file() and not _hidden(file.relative_to(path))]
    if source.format == "auto":
        files = [file for file in files if _suffix_format(file) is not None]
    elif source.format != "text":
        files = [file for file in files if _suffix_format(file) == source.format]
    if not files:
        expected = ", ".join(_SUFFIXES) if source.format == "auto" else f"format {source.format}"
        raise ConfigError(f"{path}: no file in it is of {expected}")
    return sorted(files, key=lambda file: file.relative_to(path).as_posix())


def _hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


def _suffix_format(file: Path) -> FileFormat | None:
    return next((format for suffix, format in _SUFFIXES.items() if file.name.endswith(suffix)), None)


def _format_of(file: Path, source: SourceConfig) -> FileFormat:
    if source.format == "dataset":
        return "arrow"
    if source.format != "auto":
        return source.format
    found = _suffix_format(file)
    if found is None:
        raise ConfigError(
            f"{file}: its name tells no format; expected one of {', '.join(_SUFFIXES)}, or format set to one of "
            f"{', '.join(get_args(FileFormat)[:-1])}"
        )
    return found


def parts_of(source: SourceConfig, part_bytes: int = PART_BYTES) -> list[Part]:
    """The source cut into parts of about `part_bytes`, in order: the same files give the same parts."""
    parts: list[Part] = []
    for file, format in files_of(source):
        part = partial(Part, file, format, source.text_column)
        size = file.stat().st_size
        places = _places(file, format, size)
        pieces = max(1, min(places, -(-size // part_bytes)))
        cuts = [places * i // pieces for i in range(pieces + 1)] if pieces > 1 else [0, None]
        parts += [part(size // pieces, a or 0, b) for a, b in pairwise(cuts)]
    return parts


def _places(file: Path, format: FileFormat, size: int) -> int:
    """Into how many parts a file could be cut at most: its bytes, row groups or records."""
    if format == "jsonl" and not file.name.endswith(".gz"):
        return size
    if format == "parquet":
        return max(1, _parquet(file).num_row_groups)
    if format == "arrayrecord":
        return max(1, open_array_record(file).num_records())
    return 1


def _jsonl(part: Part) -> Iterator[Record]:
    if part.path.name.endswith(".gz"):
        with gzip.open(part.path) as file:
            try:
                for row, line in enumerate(file, start=1):
                    yield from _line(Place(part.path, row), line)
            except (OSError, EOFError, zlib.error) as error:
                raise InputError(f"{part.path}: not readable as gzip: {error}") from error
        return
    with part.path.open("rb") as file:
        if part.start:
            file.seek(part.start - 1)
            file.readline()  # the line that began before belongs to the part before
        byte = file.tell()
        while (part.stop is None or byte < part.stop) and (line := file.readline()):
            yield from _line(Place(part.path, byte=byte), line)
            byte += len(line)


def _line(place: Place, line: bytes) -> Iterator[Record]:
    """The record of a line, if it is not blank."""
    if not line.strip():
        return
    first = place.row == 1 or place.byte == 0
    try:
        record = json.loads(line.decode("utf-8-sig" if first else "utf-8"))
    except UnicodeDecodeError as error:
        raise InputError(f"{place}: not UTF-8: {error}") from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"{place}: not JSON: {error}") from error
    if not isinstance(record, dict):
        raise InputError(f"{place}: expected a JSON object, found {type(record).__name__}")
    yield place, record


def _parquet_records(part: Part) -> Iterator[Record]:
    file = _parquet(part.path)
    groups = range(part.start, file.num_row_groups if part.stop is None else part.stop)
    number = sum(file.metadata.row_group(i).num_rows for i in range(part.start))
    import pyarrow

    try:
        for batch in file.iter_batches(1024, row_groups=list(groups)):
            for record in batch.to_pylist():
                number += 1
                yield Place(part.path, number), record
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        raise InputError(f"{part.path}, after row {number}: not readable as Parquet: {error}") from error


def _parquet(path: Path) -> Any:
    import pyarrow
    import pyarrow.parquet

    try:
        return pyarrow.parquet.ParquetFile(path)
    except (pyarrow.ArrowException, OSError) as error:
        raise InputError(f"{path}: not readable as Parquet: {error}") from error


def _arrow_records(part: Part) -> Iterator[Record]:
    """`datasets` writes the stream format; the file format is read as well."""
    import pyarrow

    number = 0
    try:
        mapped = pyarrow.memory_map(str(part.path))
        stream = mapped.read(6) != b"ARROW1"
        mapped.seek(0)
        reader = (pyarrow.ipc.open_stream if stream else pyarrow.ipc.open_file)(mapped)
        batches = reader if stream else (reader.get_batch(i) for i in range(reader.num_record_batches))
        for batch in batches:
            for record in batch.to_pylist():
                number += 1
                yield Place(part.path, number), record
    except (pyarrow.ArrowException, OSError) as error:
        raise InputError(f"{part.path}, after row {number}: not readable as Arrow: {error}") from error


def open_array_record(path: Path) -> Any:
    """A reader of single records at random, which many threads may share. Raises InputError where the file is torn."""
    from array_record.python.array_record_module import ArrayRecordReader

    reader = ArrayRecordReader(str(path), options="readahead_buffer_size:0", file_reader_buffer_size=1 << 15)
    if not reader.ok():  # it does not raise, and says that it has no records
        raise InputError(f"{path}: not readable as ArrayRecord: torn, or of another format")
    return reader


def _array_records(part: Part) -> Iterator[Record]:
    """Records are JSON objects in UTF-8, as lines of JSONL."""
    reader = open_array_record(part.path)
    stop = reader.num_records() if part.stop is None else part.stop
    for number in range(part.start, stop):
        (data,) = reader.read([number])
        yield from _line(Place(part.path, number + 1), data)


def _text(part: Part) -> Iterator[Record]:
    """A file is a document."""
    try:
        yield Place(part.path), {part.text_column: part.path.read_bytes().decode("utf-8-sig")}
    except UnicodeDecodeError as error:
        line = part.path.read_bytes()[: error.start].count(b"\n") + 1
        raise InputError(f"{part.path}, line {line}: not UTF-8: {error}") from error


_READERS = {
    "jsonl": _jsonl,
    "parquet": _parquet_records,
    "arrow": _arrow_records,
    "arrayrecord": _array_records,
    "text": _text,
}
