"""What can go wrong with a run, noticed: signals, a second run in its directory, a step that hangs, copies that differ."""

import faulthandler
import fcntl
import os
import signal
import socket
import sys
import threading
import time
from collections import Counter
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, cast

import jax
import jax.numpy as jnp

from exaone_jax.checkpoints.atomic import storage_errors
from exaone_jax.errors import ExaoneError, StorageError
from exaone_jax.training.saves import named_arrays
from exaone_jax.training.step import TrainState

EXIT_HUNG = 76
LOCK = "LOCK"


class TrainingError(ExaoneError):
    """The run found that it cannot go on: a loss that is not finite, copies of the parameters that differ."""

    exit_code = 1


class Stop:
    """Asked for by SIGTERM or SIGINT while installed. A second signal ends the process at once, with 128 + its number."""

    def __init__(self) -> None:
        self.signal: int | None = None

    @contextmanager
    def installed(self) -> Generator["Stop"]:
        before = {number: signal.signal(number, self._on_signal) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield self
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        del frame
        if self.signal is not None:
            os._exit(128 + number)  # what is being written stays partial, and the last saved step as it is
        self.signal = number
        os.write(2, f"{signal.Signals(number).name}: the run ends with this step saved\n".encode())


@contextmanager
def locked(run_dir: Path) -> Generator[None]:
    """Hold a run's directory; raises StorageError that names the holder where another process does. Freed by any death."""
    with storage_errors(str(run_dir)):
        run_dir.mkdir(parents=True, exist_ok=True)
        file = (run_dir / LOCK).open("a+")
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            file.seek(0)
            raise StorageError(f"{run_dir}: another run is using it: {file.read().strip() or 'unknown'}") from error
        file.seek(0)
        file.truncate()
        file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        file.flush()
        yield


class Watchdog:
    """Ends the process with EXIT_HUNG and the stacks of all its threads when `beat` was not called for `seconds`.

    The stacks go to stderr and to `report`. Not armed before the first beat, as compiling takes its own time.
    """

    def __init__(self, seconds: float | None, report: Path):
        self._seconds, self._report = seconds, report
        self._last: float | None = None
        self._done = threading.Event()

    @contextmanager
    def watching(self) -> Generator["Watchdog"]:
        thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        if self._seconds is not None:
            thread.start()
        try:
            yield self
        finally:
            self._done.set()

    def beat(self) -> None:
        self._last = time.monotonic()

    def rest(self) -> None:
        """Not to be armed until the next beat: something long and lawful begins."""
        self._last = None

    def _watch(self) -> None:
        seconds = self._seconds or 0.0
        while not self._done.wait(min(seconds / 10, 10.0)):
            last = self._last
            if last is not None and time.monotonic() - last > seconds:
                self._end(f"no step finished within {seconds:g} s: the run hangs; stacks in {self._report}\n")

    def _end(self, message: str) -> None:
        try:
            with self._report.open("w") as file:
                file.write(message)
                faulthandler.dump_traceback(file, all_threads=True)
        except OSError as error:
            message += f"{self._report}: {error}\n"
        sys.stderr.write(message)
        sys.stderr.flush()
        faulthandler.dump_traceback(sys.__stderr__ or 2, all_threads=True)
        os._exit(EXIT_HUNG)


def _checksums(arrays: dict[str, jax.Array]) -> jax.Array:
    """uint32 `[1, arrays]`: of the bits of this device's own part of each array."""

    def of(x: jax.Array) -> jax.Array:
        bits = jax.lax.bitcast_convert_type(x, {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}[x.dtype.itemsize])
        flat = bits.reshape(-1).astype(jnp.uint32)
        # Weighed by place, so that two elements that change places are noticed.
        return jnp.sum(flat * (2 * jnp.arange(flat.size, dtype=jnp.uint32) + 1), dtype=jnp.uint32)

    return jnp.stack([of(x) for x in arrays.values()])[None]


def replica_checksums(state: TrainState, mesh: jax.sharding.Mesh) -> jax.Array:
    """uint32 `[devices, arrays]`, whole on every device; of the parameters and router biases in order of name."""
    arrays = _model_arrays(state)
    specs = {name: cast(jax.NamedSharding, array.sharding).spec for name, array in arrays.items()}
    everywhere = jax.P(mesh.axis_names)
    run = jax.shard_map(_checksums, mesh=mesh, in_specs=(specs,), out_specs=everywhere, check_vma=False)
    return jax.jit(run, out_shardings=jax.NamedSharding(mesh, jax.P()))(arrays)


def check_replicas(state: TrainState, mesh: jax.sharding.Mesh) -> None:
    """Raises TrainingError that names the hosts and devices whose copy of a parameter is not that of most others."""
    if mesh.size == 1:
        return
    sums = jax.device_get(replica_checksums(state, mesh).addressable_data(0))
    place = {device: number for number, device in enumerate(mesh.devices.flat)}
    for column, (name, array) in enumerate(_model_arrays(state).items()):
        groups: dict[str, list[jax.Device]] = {}
        for device, index in array.sharding.devices_indices_map(array.shape).items():
            groups.setdefault(str(index), []).append(device)
        for devices in groups.values():
            found = {device: int(sums[place[device], column]) for device in devices}
            if len(set(found.values())) > 1:
                raise TrainingError(_differing(name, found))


def _differing(name: str, found: dict[Any, int]) -> str:
    (most, count), *others = Counter(found.values()).most_common()
    clear = not others or count > others[0][1]
    wrong = [device for device, value in found.items() if value != most or not clear]
    hosts = ", ".join(f"host {device.process_index} ({device})" for device in wrong)
    verdict = f"{hosts} differ from the other copies" if clear else f"{hosts} do not agree, and no side has more"
    return f"{name}: copies of the parameters differ: {verdict}; the memory or arithmetic of a device is at fault"


def _model_arrays(state: TrainState) -> dict[str, jax.Array]:
    return {name: array for name, array in sorted(named_arrays(state).items()) if name.startswith("params/")}
