"""Moving tensors from a source to a sink, a bounded number of rows at a time, on several threads."""

import os
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from typing import Protocol

from exaone_jax.checkpoints.native import rows_per_chunk
from exaone_jax.checkpoints.safetensors import DTYPE_BITS, Bits, TensorInfo

OnProgress = Callable[[int, int], None]  # bytes done, bytes in all


class TensorSource(Protocol):
    """Where tensors come from: names, dtypes and layout of Hugging Face, data as raw bits."""

    @property
    def tensors(self) -> Mapping[str, TensorInfo]: ...

    def read_rows(self, name: str, begin: int = 0, end: int | None = None) -> Bits: ...


class TensorSink(Protocol):
    """Where tensors go."""

    def write_rows(self, name: str, begin: int, end: int, bits: Bits) -> None: ...


def default_workers() -> int:
    return min(8, os.cpu_count() or 1)


def pieces(name: str, info: TensorInfo) -> list[tuple[str, int, int]]:
    """(name, begin, end) of every range of rows that is moved at once: one chunk of the native form."""
    if not info.nbytes:
        return []
    if not info.shape:
        return [(name, 0, 1)]
    rows, step = info.shape[0], rows_per_chunk(info.shape, DTYPE_BITS[info.dtype] // 8)
    return [(name, begin, min(begin + step, rows)) for begin in range(0, rows, step)]


def copy_tensors(
    source: TensorSource,
    sink: TensorSink,
    order: Mapping[str, TensorInfo],
    *,
    workers: int,
    on_progress: OnProgress | None = None,
) -> None:
    """Copy the tensors of `order`, in that order. The first failure stops the others and is raised."""
    total, lock, done = sum(info.nbytes for info in order.values()), threading.Lock(), 0
    stop = threading.Event()

    def move(piece: tuple[str, int, int]) -> None:
        nonlocal done
        if stop.is_set():
            return
        name, begin, end = piece
        bits = source.read_rows(name, begin, end)
        sink.write_rows(name, begin, end, bits)
        with lock:
            done += bits.nbytes
            if on_progress is not None:
                on_progress(done, total)

    with ThreadPoolExecutor(workers, thread_name_prefix="convert") as pool:
        try:
            futures = [pool.submit(move, piece) for name, info in order.items() for piece in pieces(name, info)]
            finished, _ = wait(futures, return_when=FIRST_EXCEPTION)
            for future in finished:
                future.result()
        except BaseException:
            stop.set()
            pool.shutdown(wait=True, cancel_futures=True)
            raise
