"""`exaone-jax data prepare`: tokenises sources once, in many processes or on many machines, into ArrayRecord.

A directory of shards, each from one part of a source, so that the files alone decide what is in which:
  job.json                  what is made of what; a directory of another job is refused
  shard-00000.array_record  documents, one a record (store.pack_document)
  shard-00000.lengths.npy   their lengths, int32
  shard-00000.json          counts and digest, written last: the shard is finished
  manifest.json             all of the latter, written when every shard is finished
Each file is written under a partial name, synced and renamed. A killed run goes on with the shards that are not finished.
"""

import ctypes
import hashlib
import importlib
import json
import multiprocessing
import os
import signal
import uuid
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from exaone_jax.checkpoints.atomic import lock, storage_errors, sync
from exaone_jax.config.data import SourceConfig
from exaone_jax.data.documents import Counts, Encoder
from exaone_jax.data.sources import JOB, MANIFEST, PART_BYTES, Part, parts_of
from exaone_jax.data.store import LAYOUT, pack_document, read_manifest
from exaone_jax.errors import ConfigError, InputError, StorageError
from exaone_jax.text import ChatTemplate, Tokenizer

_PARTIAL = ".partial-"
_PR_SET_PDEATHSIG = 1


@dataclass(frozen=True)
class Job:
    """What every shard is made with. tokenizer: a checkpoint directory, whose chat template renders conversations."""

    tokenizer: Path
    out: Path
    chat_template_kwargs: Mapping[str, bool]


@dataclass(frozen=True)
class Shard:
    """One shard to make: the part of a source that goes into it."""

    name: str
    source: SourceConfig
    part: Part


@dataclass(frozen=True)
class PrepareReport:
    """What a directory of prepared data holds. skipped: shards that an earlier run had finished."""

    out: Path
    shards: int
    skipped: int
    counts: Counts

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "out": str(self.out)}


def prepare(
    sources: Sequence[SourceConfig],
    out: Path,
    tokenizer: Path,
    *,
    chat_template_kwargs: Mapping[str, bool] | None = None,
    workers: int | None = None,
    ray: str | None = None,
    part_bytes: int = PART_BYTES,
    on_progress: Callable[[int, int], None] | None = None,
) -> PrepareReport:
    """Tokenise sources into `out`, which is new, or of the same job begun before.

    Args:
      tokenizer: a checkpoint directory: tokenizer.json, and for conversations config.json, which tells the generation.
      workers: processes; one for each core if None.
      ray: the address of a Ray cluster to run on instead ("auto" for the one here, "local" to start one). Its machines
        must see the same files.
      on_progress: called with the bytes of the sources that are done, and of all.

    Raises ConfigError, InputError (with file and row) or StorageError; what is finished stays for the next run.
    """
    job = Job(tokenizer.absolute(), out.absolute(), dict(chat_template_kwargs or {}))
    sources = [source.model_copy(update={"path": str(Path(source.path).absolute())}) for source in sources]
    each = [(source, part) for source in sources for part in parts_of(source, part_bytes)]
    shards = [Shard(f"shard-{number:05}", *one) for number, one in enumerate(each)]
    identity, total = _identity(job, shards), sum(shard.part.size for shard in shards)
    with storage_errors(str(out)), _locked(out):
        _begin(out, identity)
        left = [shard for shard in shards if not (out / f"{shard.name}.json").is_file()]
        skipped, done = len(shards) - len(left), total - sum(shard.part.size for shard in left)
        if not (out / MANIFEST).is_file():
            for size in _run(job, left, workers, ray):
                done += size
                if on_progress is not None:
                    on_progress(done, total)
            _finish(out, [shard.name for shard in shards], identity)
        else:
            skipped = len(shards)
        return PrepareReport(out, len(shards), skipped, Counts(**read_manifest(out)["counts"]))


def write_shard(job: Job, shard: Shard) -> int:
    """Make one shard; returns the size of its part. The same function runs in a process here and as a task of Ray."""
    from array_record.python.array_record_module import ArrayRecordWriter

    tokenizer, template = _tokenizer(job.tokenizer)
    counts, lengths, has_masks = Counts(), [], False
    with _partial(job.out / f"{shard.name}.array_record") as file:
        with _write_errors(file):
            writer = ArrayRecordWriter(str(file), "group_size:1,zstd:1")  # as small as zstd:3 on token ids
        encoder = Encoder(tokenizer, template, shard.source, job.chat_template_kwargs)
        for document in encoder.documents(shard.part.records(), counts):
            with _write_errors(file):
                writer.write(pack_document(document))
            lengths.append(len(document.tokens))
            has_masks |= document.loss_mask is not None
        with _write_errors(file):
            writer.close()
        with file.open("rb") as stream:
            digest, size = hashlib.file_digest(stream, "sha256").hexdigest(), os.fstat(stream.fileno()).st_size
    with _partial(job.out / f"{shard.name}.lengths.npy") as file, file.open("wb") as stream:
        np.save(stream, np.array(lengths, np.int32))
    about = {
        "name": shard.name,
        "documents": counts.documents,
        "tokens": counts.tokens,
        "bytes": size,
        "sha256": digest,
    }
    _write_json(job.out / f"{shard.name}.json", {**about, "has_masks": has_masks, "counts": asdict(counts)})
    return shard.part.size


@contextmanager
def _write_errors(file: Path) -> Generator[None]:
    try:
        yield
    except RuntimeError as error:  # ArrayRecord's for all that the operating system refuses
        raise StorageError(f"{file}: {error}") from error


@lru_cache(maxsize=1)
def _tokenizer(directory: Path) -> tuple[Tokenizer, ChatTemplate | None]:
    tokenizer = Tokenizer.from_directory(directory)
    has_config = (directory / "config.json").is_file()
    return tokenizer, ChatTemplate.for_checkpoint(directory, tokenizer) if has_config else None


def _run(job: Job, shards: Sequence[Shard], workers: int | None, ray: str | None) -> Iterator[int]:
    """Makes the shards; gives the size of each as it is finished, in any order."""
    if not shards:
        return iter(())
    return _run_in_processes(job, shards, workers) if ray is None else _run_on_ray(job, shards, ray)


def _run_in_processes(job: Job, shards: Sequence[Shard], workers: int | None) -> Iterator[int]:
    count = min(len(shards), workers or len(os.sched_getaffinity(0)))
    if count == 1:
        yield from (write_shard(job, shard) for shard in shards)
        return
    # A forked child of a process with threads may hang, and tokenizers brings threads.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(count, context, _die_with, (os.getpid(),)) as pool:
        futures: list[Future[int]] = [pool.submit(write_shard, job, shard) for shard in shards]
        try:
            for future in as_completed(futures):
                yield future.result()
        except BrokenProcessPool as error:
            raise StorageError(f"{job.out}: a process that tokenises was killed, perhaps for want of memory") from error
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _die_with(parent: int) -> None:
    """Have the kernel end this process when its parent is killed: it would wait for work for ever."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os.kill(os.getpid(), signal.SIGKILL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent is interrupted as well, and ends the pool


def _run_on_ray(job: Job, shards: Sequence[Shard], address: str) -> Iterator[int]:
    try:
        ray: Any = importlib.import_module("ray")
    except ImportError as error:
        raise ConfigError("Ray is not installed: pip install 'exaone-jax[ray]'") from error
    started = not ray.is_initialized()
    if started:
        ray.init(address=None if address == "local" else address, log_to_driver=False)
    try:
        task = ray.remote(num_cpus=1)(write_shard)
        waiting = [task.remote(job, shard) for shard in shards]
        while waiting:
            ready, waiting = ray.wait(waiting)
            for reference in ready:
                yield ray.get(reference)
    except ray.exceptions.RayTaskError as error:
        raise error.cause from error
    finally:
        if started:
            ray.shutdown()


def _identity(job: Job, shards: Iterable[Shard]) -> dict[str, Any]:
    """What two runs must have in common for one to go on with the other's shards."""
    tokenizer, template = _tokenizer(job.tokenizer)
    parts = []
    for shard in shards:
        status = shard.part.path.stat()
        part = {**asdict(shard.part), "path": str(shard.part.path), "file": [status.st_size, status.st_mtime_ns]}
        parts.append({**part, "control_tokens": shard.source.control_tokens})
    source = None if template is None else hashlib.sha256(template.source.encode()).hexdigest()
    return {
        "layout": LAYOUT,
        "tokenizer": tokenizer.fingerprint,
        "chat_template": source,
        "chat_template_kwargs": dict(job.chat_template_kwargs),
        "parts": parts,
    }


@contextmanager
def _locked(out: Path) -> Generator[None]:
    out.mkdir(parents=True, exist_ok=True)
    if (fd := lock(out)) is None:
        raise StorageError(f"{out}: another process is preparing it")
    try:
        yield
    finally:
        os.close(fd)


def _begin(out: Path, identity: dict[str, Any]) -> None:
    """Say what is made here, or check that it is what was begun. Removes what a killed run left half written."""
    file = out / JOB
    if file.is_file():
        found = json.loads(file.read_bytes())
        changed = [key for key in identity if found.get(key) != identity[key]]
        if changed:
            raise StorageError(f"{out}: was begun with other {', '.join(changed)}; expected a new directory")
    elif any(not entry.name.startswith(JOB + _PARTIAL) for entry in out.iterdir()):
        raise StorageError(f"{out}: exists and is not empty; expected a new directory, or one that was begun here")
    for stale in out.glob(f"*{_PARTIAL}*"):
        stale.unlink()
    if not file.is_file():
        _write_json(file, identity)


def _finish(out: Path, names: Sequence[str], identity: dict[str, Any]) -> None:
    shards, counts = [], Counts()
    for name in names:
        shard = json.loads((out / f"{name}.json").read_bytes())
        counts.add(Counts(**shard.pop("counts")))
        shards.append(shard)
    if not counts.documents:
        raise InputError(f"{out}: the sources hold no document")
    manifest = {
        "layout": LAYOUT,
        "tokenizer": identity["tokenizer"],
        "chat_template": identity["chat_template"],
        "has_masks": any(shard.pop("has_masks") for shard in shards),
        "counts": asdict(counts),
        "shards": shards,
    }
    _write_json(out / MANIFEST, manifest)


@contextmanager
def _partial(file: Path) -> Generator[Path]:
    """A name to write to; it becomes `file` when the block ends without an exception."""
    partial = file.with_name(f"{file.name}{_PARTIAL}{uuid.uuid4().hex[:8]}")
    try:
        yield partial
        sync(partial)
        partial.rename(file)
        sync(file.parent)
    finally:
        partial.unlink(missing_ok=True)


def _write_json(file: Path, value: object) -> None:
    with _partial(file) as partial:
        partial.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
