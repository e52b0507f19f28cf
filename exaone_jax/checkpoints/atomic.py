"""Directories that appear whole or not at all: written under a partial name, synced, then renamed."""

import ctypes
import errno
import fcntl
import hashlib
import os
import re
import shutil
import uuid
from collections.abc import Callable, Generator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from exaone_jax.errors import StorageError

_COPY_BLOCK = 4 << 20
_SYNC_THREADS = 16
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2


@contextmanager
def storage_errors(what: str) -> Generator[None]:
    """Turn what the operating system refuses (space, permission, file size) into a StorageError that says where."""
    try:
        yield
    except StorageError:
        raise
    except OSError as error:
        raise StorageError(f"{what}: {error.strerror or error}") from error


def check_free_space(directory: Path, needed: int) -> None:
    """Raises StorageError when the file system of `directory` (or its nearest parent) has less than `needed` bytes free."""
    place = directory.absolute()
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    if free < needed:
        raise StorageError(f"{place}: {needed:,} bytes are needed and {free:,} are free")


def check_output(dst: Path, overwrite: bool) -> None:
    """Raises StorageError unless `dst` is absent, an empty directory, or a directory that may be overwritten."""
    if not os.path.lexists(dst):
        return
    if dst.is_symlink() or not dst.is_dir():
        raise StorageError(f"{dst}: exists and is not a directory")
    if any(dst.iterdir()) and not overwrite:
        raise StorageError(f"{dst}: exists and is not empty; expected a new directory, or overwrite")


def lock(directory: Path) -> int | None:
    """Lock a directory for this process: a descriptor, or None where another process holds it."""
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(fd)
        return None
    except OSError:
        os.close(fd)
        raise
    return fd


def sweep(dst: Path) -> list[str]:
    """Remove what killed runs left beside `dst`; put back an old `dst` that a kill left renamed. Returns the names removed.

    Raises:
        StorageError: a live process is writing to `dst`.
    """
    removed = []
    for stale in _leftovers(dst, "replaced"):
        if os.path.lexists(dst):
            shutil.rmtree(stale)
            removed.append(stale.name)
        else:
            stale.rename(dst)
    for stale in _leftovers(dst, "partial"):
        fd = lock(stale)
        if fd is None:
            raise StorageError(f"{dst}: another process is writing it ({stale.name})")
        try:
            shutil.rmtree(stale)
        finally:
            os.close(fd)
        removed.append(stale.name)
    return removed


def _beside(dst: Path, kind: str) -> Path:
    return dst.parent / f"{dst.name}.{kind}-{uuid.uuid4().hex[:8]}"


def _leftovers(dst: Path, kind: str) -> list[Path]:
    """The directories beside `dst` that have a name of `_beside`; whatever is named otherwise is not ours."""
    name = re.compile(re.escape(f"{dst.name}.{kind}-") + "[0-9a-f]{8}")
    found = (path for path in dst.parent.iterdir() if name.fullmatch(path.name))
    return sorted(path for path in found if path.is_dir() and not path.is_symlink())


@contextmanager
def new_directory(dst: Path, *, overwrite: bool, may_go: Callable[[Path, Path], bool]) -> Generator[Path]:
    """Write a directory: yields its partial form, which becomes `dst` when the block ends without an exception.

    Overwriting swaps the two in one step where the system can, and then removes the old one. It refuses to while
    `may_go(entry, partial)` is false for any entry of the old one.
    """
    dst = dst.absolute()
    with storage_errors(str(dst)):
        dst.parent.mkdir(parents=True, exist_ok=True)
        sweep(dst)
        check_output(dst, overwrite)
        partial = _beside(dst, "partial")
        partial.mkdir()
    fd = None
    try:
        with storage_errors(str(dst)):
            fd = lock(partial)
        if fd is None:  # another process took it for a leftover before it was locked, and removes it
            raise StorageError(f"{dst}: another process is writing it, and sweeps {partial.name}")
        yield partial
        with storage_errors(str(dst)):
            _refuse_foreign(dst, partial, may_go)
            sync_tree(partial)
            _replace(partial, dst)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)  # the error that led here says more than one of cleaning up
        raise
    finally:
        if fd is not None:
            os.close(fd)


def _refuse_foreign(dst: Path, partial: Path, may_go: Callable[[Path, Path], bool]) -> None:
    if not dst.is_dir():
        return
    for entry in sorted(dst.iterdir()):
        if not may_go(entry, partial):
            raise StorageError(f"{entry}: is not part of a checkpoint and would be lost; move it away first")


def _replace(partial: Path, dst: Path) -> None:
    if not dst.is_dir() or not any(dst.iterdir()):
        partial.rename(dst)
        sync(dst.parent)
        return
    old = partial
    if not _exchange(partial, dst):
        old = _beside(dst, "replaced")
        dst.rename(old)
        partial.rename(dst)
    sync(dst.parent)
    shutil.rmtree(old)


def _exchange(a: Path, b: Path) -> bool:
    """Swap two directory entries in one step (renameat2); False where the system or file system cannot."""
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if renameat2 is None:
        return False
    if renameat2(_AT_FDCWD, os.fsencode(a), _AT_FDCWD, os.fsencode(b), _RENAME_EXCHANGE) == 0:
        return True
    code = ctypes.get_errno()
    if code in (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP):
        return False
    raise OSError(code, os.strerror(code), str(b))


def sync(path: Path) -> None:
    """fsync a file or a directory."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def sync_tree(root: Path) -> None:
    """fsync every file and directory below and including `root`.

    All of them at the end and from many threads: the file system then commits many at a time, which for small files is
    some 15 times faster than a sync after each. Their order does not matter before the directory is renamed.
    """
    walk = list(os.walk(root))
    paths = [Path(folder) / name for folder, _, names in walk for name in ("", *names)]
    with ThreadPoolExecutor(_SYNC_THREADS, thread_name_prefix="sync") as pool:
        list(pool.map(sync, paths))


def write_new(path: Path, data: bytes) -> None:
    """Write a file that does not exist yet."""
    with storage_errors(str(path)):
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("xb") as file:
            file.write(data)


def replace_file(path: Path, data: bytes) -> None:
    """Write a file, over one that may be there: at any moment it is the old one or the new one, whole."""
    with storage_errors(str(path)):
        partial = path.with_name(f"{path.name}.partial")
        partial.write_bytes(data)
        sync(partial)
        partial.replace(path)
        sync(path.parent)


def copy_file(source: Path, target: Path) -> str:
    """Copy a file's bytes to a new file; returns their sha256."""
    digest = hashlib.sha256()
    with storage_errors(str(target)):
        target.parent.mkdir(parents=True, exist_ok=True)
        with source.open("rb") as reader, target.open("xb") as writer:
            while block := reader.read(_COPY_BLOCK):
                digest.update(block)
                writer.write(block)
    return digest.hexdigest()
