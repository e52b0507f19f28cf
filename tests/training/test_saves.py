"""Saved steps: whole or not there, checked when read, and never a silent start from scratch."""

import json
import os
import resource
import shutil
import threading
import time
from contextlib import nullcontext
from pathlib import Path

import pytest

from exaone_jax.checkpoints.load import open_checkpoint
from exaone_jax.errors import CheckpointError, ConfigError, StorageError
from exaone_jax.training import saves
from exaone_jax.training.faults import locked
from exaone_jax.training.loop import Outcome, train
from tests.training.runs import SPARSE, small_run, text_file


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Outcome]:
    """A run of 6 steps, with steps 2, 4 and 6 saved."""
    folder = tmp_path_factory.mktemp("finished")
    return folder, train(small_run(folder))


@pytest.fixture
def folder(finished: tuple[Path, Outcome], tmp_path: Path) -> Path:
    """A copy of that run's directory, 6 steps in."""
    shutil.copytree(finished[0] / "run", tmp_path / "run")
    return tmp_path


def steps(folder: Path) -> list[int]:
    return saves.saved_steps(folder / "run" / "checkpoints")


def step(folder: Path, number: int) -> Path:
    return saves.step_folder(folder / "run" / "checkpoints", number)


def a_chunk(folder: Path) -> Path:
    """The largest file of an array."""
    return max(
        (path for path in (folder / "params").rglob("c*") if path.is_file()), key=lambda path: path.stat().st_size
    )


def flip(path: Path, place: int = 100) -> None:
    data = bytearray(path.read_bytes())
    data[place % len(data)] ^= 1
    path.write_bytes(data)


def test_straight_steps_equal_steps_in_parts(tmp_path: Path) -> None:
    """40 = 13 + 27, bit for bit: optimizer, schedule, router biases, average, accumulation, position in the data."""
    recipe = {
        "steps": 40,
        "batch_size": 16,
        "accumulate": 2,
        "ema": 0.9,
        "model": SPARSE,
        "optimizer": {"name": "muon", "learning_rate": 1e-2, "warmup": 5, "decay": 0.5},
        "router_bias_rate": 1e-2,
        "guard": {"window": 8, "spikes": "skip", "checksum_every": 10},
        "stages": [{"start": 20, "context": 32}],
        "save": {"every": 100},
    }
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    whole.mkdir(), parts.mkdir()
    straight = train(small_run(whole, **recipe))
    first = train(small_run(parts, **recipe, stop_after=13))
    assert (first.steps, first.sha256 == straight.sha256) == (13, False)
    second = train(small_run(parts, **recipe))
    assert second == straight
    last = [json.loads(line) for line in (whole / "run" / "metrics.jsonl").read_text().splitlines()][-1]
    again = [json.loads(line) for line in (parts / "run" / "metrics.jsonl").read_text().splitlines()][-1]
    same = ("step", "loss", "mtp_loss", "balance_loss", "grad_norm", "learning_rate", "tokens", "expert_load")
    assert {name: last[name] for name in same} == {name: again[name] for name in same}
    a, b = (saves.step_folder(path / "run" / "checkpoints", 40) for path in (whole, parts))
    files = sorted(
        path.relative_to(a) for part in ("params", "state") for path in (a / part).rglob("c*") if path.is_file()
    )
    assert len(files) > 100
    assert all((a / name).read_bytes() == (b / name).read_bytes() for name in files)


def test_a_finished_run_is_told_again(folder: Path, finished: tuple[Path, Outcome]) -> None:
    assert train(small_run(folder)) == finished[1]


def test_a_saved_step_is_a_checkpoint(folder: Path) -> None:
    config, checkpoint = open_checkpoint(step(folder, 6))
    with checkpoint:
        assert config.hidden_size == 16
    assert (step(folder, 6) / "tokenizer.json").is_file()


def delete_chunk(folder: Path) -> None:
    a_chunk(folder).unlink()


def truncate_chunk(folder: Path) -> None:
    os.truncate(a_chunk(folder), a_chunk(folder).stat().st_size // 2)


def zero_chunk(folder: Path) -> None:
    a_chunk(folder).write_bytes(bytes(a_chunk(folder).stat().st_size))


def flip_chunk(folder: Path) -> None:
    flip(a_chunk(folder))


def flip_optimizer(folder: Path) -> None:
    flip(max((folder / "state").rglob("c*"), key=lambda path: path.stat().st_size if path.is_file() else 0))


def flip_metadata(folder: Path) -> None:
    path = next((folder / "params").rglob("zarr.json"))
    path.write_text(path.read_text().replace("crc32c", "bytes"))


def flip_manifest(folder: Path) -> None:
    flip(folder / "train.json", 500)


def flip_config(folder: Path) -> None:
    flip(folder / "config.json", 40)


def empty_it(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.mkdir()


DAMAGE = [
    delete_chunk, truncate_chunk, zero_chunk, flip_chunk, flip_optimizer, flip_metadata, flip_manifest, flip_config, empty_it,
]  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_step_is_set_aside(
    damage, folder: Path, finished: tuple[Path, Outcome], capsys: pytest.CaptureFixture[str]
) -> None:
    damage(step(folder, 6))
    with pytest.raises(CheckpointError, match="without --strict-resume"):
        train(small_run(folder), strict_resume=True)
    assert steps(folder) == [6, 4, 2]
    assert train(small_run(folder)) == finished[1]
    said = capsys.readouterr().out
    assert "step 6 is damaged and now at" in said and "going on from" in said and "step_00000004" in said
    assert "2 steps after it are taken again" in said
    assert (folder / "run" / "checkpoints" / "step_00000006.corrupt-1").is_dir()
    assert steps(folder) == [6, 4, 2]


def test_a_stray_directory_is_no_step(folder: Path, finished: tuple[Path, Outcome]) -> None:
    step(folder, 99).mkdir()
    (folder / "run" / "checkpoints" / "notes").mkdir()
    assert train(small_run(folder)) == finished[1]
    assert 99 not in steps(folder)


def test_clocks_do_not_decide_the_latest(folder: Path, finished: tuple[Path, Outcome]) -> None:
    for path in step(folder, 2).rglob("*"):
        os.utime(path, (4e9, 4e9))
    assert train(small_run(folder)).steps == 6
    assert "going on" not in (folder / "run" / "metrics.jsonl").read_text()
    events = [json.loads(line) for line in (folder / "run" / "goodput.jsonl").read_text().splitlines()]
    assert [event["step"] for event in events if event["event"] == "resumed"] == [6]


@pytest.mark.parametrize("gone", ["damaged", "removed"])
def test_a_run_never_starts_over_by_itself(folder: Path, gone: str) -> None:
    for number in (2, 4, 6):
        if gone == "damaged":
            delete_chunk(step(folder, number))
        else:
            shutil.rmtree(step(folder, number))
    for _ in range(2):  # nor when it is asked again
        with pytest.raises(CheckpointError, match="none of them can be read"):
            train(small_run(folder))


def test_what_a_kill_left_is_swept(folder: Path, finished: tuple[Path, Outcome]) -> None:
    partial = folder / "run" / "checkpoints" / "step_00000008.partial"
    shutil.copytree(step(folder, 6), partial)
    assert train(small_run(folder)) == finished[1]
    assert not partial.exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seed": 1}, "was saved with another data, seed, batch_size, context or stages"),
        ({"batch_size": 16}, "was saved with another data"),
        ({"data": {"sources": [{"path": str(text_file())}], "seed": 3}}, "was saved with another data"),
        ({"model": SPARSE}, "is of another model"),
        ({"optimizer": {"learning_rate": 1e-2, "name": "muon"}}, "was the optimizer, ema or guard.window changed"),
        ({"ema": 0.5}, "was the optimizer, ema or guard.window changed"),
    ],
)
def test_a_step_of_another_run_is_refused(folder: Path, changes: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        train(small_run(folder, **changes))
    assert steps(folder) == [6, 4, 2]  # it is whole, and stays where it is


def test_only_the_newest_good_steps_stay(tmp_path: Path) -> None:
    train(small_run(tmp_path, save={"every": 1, "keep": 2}))
    assert steps(tmp_path) == [6, 5]


def test_a_second_run_in_the_directory_is_refused(folder: Path) -> None:
    with (
        locked(folder / "run"),
        pytest.raises(StorageError, match=rf"another run is using it: process {os.getpid()} on "),
    ):
        train(small_run(folder))


class SmallFilesOnly:
    """While it is entered, the system refuses to write more than so many bytes to a file, as on a full disk."""

    def __init__(self, size: int):
        self.size = size

    def __enter__(self) -> None:
        self.before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (self.size, self.before[1]))

    def __exit__(self, *error: object) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, self.before)


def fill_the_disk(monkeypatch: pytest.MonkeyPatch, at_step: int) -> None:
    write = saves._write_parts

    def on_a_full_disk(partial: Path, *args, **kwargs) -> None:
        with SmallFilesOnly(4096) if saves.step_folder(Path(), at_step).name in partial.name else nullcontext():
            write(partial, *args, **kwargs)

    monkeypatch.setattr(saves, "_write_parts", on_a_full_disk)


def test_a_full_disk_harms_no_saved_step(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The save of step 8 fails half way; the run goes on, and step 10 is saved."""
    fill_the_disk(monkeypatch, at_step=8)
    changed = {"optimizer": {"learning_rate": 1e-2, "warmup": 2, "schedule": "constant"}}
    assert train(small_run(folder, steps=10, **changed)).steps == 10
    assert steps(folder) == [10, 6, 4]
    assert "warning: step 8 was not saved" in capsys.readouterr().out
    assert not list((folder / "run" / "checkpoints").glob("*.partial"))


def test_a_last_step_that_cannot_be_saved_is_an_error(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fill_the_disk(monkeypatch, at_step=7)
    with pytest.raises(StorageError, match="File too large"):
        train(small_run(folder, steps=7))
    assert steps(folder) == [6, 4, 2]


def test_no_space_is_known_before_it_is_written(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 10, 0))
    with pytest.raises(StorageError, match="bytes are needed and 0 are free"):
        train(small_run(folder, steps=7))
    assert steps(folder) == [6, 4, 2]


def test_slow_storage_blocks_and_does_not_pile_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    running, most = [], []
    write = saves._write_parts

    def slowly(*args, **kwargs) -> None:
        running.append(1)
        most.append((len(running), sum(thread.name == "save" for thread in threading.enumerate())))
        time.sleep(0.2)
        write(*args, **kwargs)
        running.pop()

    monkeypatch.setattr(saves, "_write_parts", slowly)
    train(small_run(tmp_path, save={"every": 1}))
    assert most == [(1, 1)] * 6


def test_chunks_divide_and_stay_small() -> None:
    for shard in [(3, 5), (1,), (), (4096, 4096), (7, 1 << 23), (48, 4096, 2048), (6, 7, 1 << 21)]:
        chunk = saves.chunk_shape(shard, 4)
        assert all(size % part == 0 for size, part in zip(shard, chunk, strict=True))
        size = 4
        for part in chunk:
            size *= part
        assert size <= max(saves.CHUNK_BYTES, 4 * (shard[-1] if shard else 1))
