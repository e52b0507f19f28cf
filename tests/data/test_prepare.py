"""Prepared data: the same documents as the sources', whatever the workers, the kills and the restarts."""

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from exaone_jax.cli import main
from exaone_jax.config.data import DataConfig
from exaone_jax.data import Rows, open_rows
from exaone_jax.data import prepare as prepare_module
from exaone_jax.data.documents import Document
from exaone_jax.data.prepare import prepare
from exaone_jax.data.store import pack_document, unpack_document
from exaone_jax.errors import ConfigError, InputError, StorageError
from exaone_jax.text import ChatTemplate, Tokenizer, train_bpe
from tests.data.conftest import source, write_jsonl
from tests.data.test_documents import ANSWER, THOUGHT, USER

TEXTS = [{"text": f"document {i} " * (1 + i % 7)} for i in range(200)]
CHATS = [{"messages": [USER, ANSWER if i % 2 else THOUGHT]} for i in range(10)]


@pytest.fixture(scope="module")
def checkpoint(tokenizer_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer with the config.json that tells its generation."""
    directory = tmp_path_factory.mktemp("checkpoint")
    for file in tokenizer_dir.iterdir():
        (directory / file.name).write_bytes(file.read_bytes())
    (directory / "config.json").write_text('{"model_type": "exaone_moe"}')
    return directory


def digests(directory: Path) -> dict[str, str]:
    return {
        file.name: hashlib.sha256(file.read_bytes()).hexdigest()
        for file in directory.iterdir()
        if file.name != "job.json"
    }


def same_rows(a: Rows, b: Rows) -> bool:
    same = all(np.array_equal(x, y) for i in range(2 * a.rows_per_epoch) for x, y in zip(a[i], b[i], strict=True))
    return same and a.rows_per_epoch == b.rows_per_epoch


def config(*paths: Path) -> DataConfig:
    return DataConfig(sources=tuple(map(source, paths)))


def test_prepared_data_gives_the_rows_of_its_sources(checkpoint: Path, tokenizer: Tokenizer, tmp_path: Path) -> None:
    files = [write_jsonl(tmp_path / "texts.jsonl", TEXTS), write_jsonl(tmp_path / "chats.jsonl", CHATS)]
    template = ChatTemplate.for_generation("k")
    for file in files:
        out, seen = tmp_path / f"{file.stem}.prepared", []
        report = prepare(
            [source(file)], out, checkpoint, workers=1, part_bytes=500, on_progress=lambda *done: seen.append(done)
        )
        assert report.shards > 2 and report.skipped == 0
        assert seen[-1][0] == seen[-1][1] and len(seen) == report.shards
        raw, prepared = (open_rows(config(path), tokenizer, template, 64) for path in (file, out))
        assert same_rows(raw, prepared)
        assert raw.report[0].counts == prepared.report[0].counts == report.counts


def test_the_workers_do_not_change_a_byte(checkpoint: Path, tmp_path: Path) -> None:
    file = write_jsonl(tmp_path / "texts.jsonl", TEXTS)
    for workers in (1, 2):
        prepare([source(file)], tmp_path / str(workers), checkpoint, workers=workers, part_bytes=2000)
    assert digests(tmp_path / "1") == digests(tmp_path / "2")


def test_a_finished_directory_is_left_as_it_is_and_another_job_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    file, out = write_jsonl(tmp_path / "texts.jsonl", TEXTS), tmp_path / "out"
    first = prepare([source(file)], out, checkpoint, workers=1)
    before = {path: path.stat().st_mtime_ns for path in out.iterdir()}
    again = prepare([source(file)], out, checkpoint, workers=1)
    assert (again.counts, again.skipped) == (first.counts, first.shards)
    assert {path: path.stat().st_mtime_ns for path in out.iterdir()} == before
    write_jsonl(file, [*TEXTS, {"text": "more"}])
    with pytest.raises(StorageError, match="was begun with other parts"):
        prepare([source(file)], out, checkpoint)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "theirs").write_text("x")
    with pytest.raises(StorageError, match="not empty"):
        prepare([source(file)], tmp_path / "full", checkpoint)


def test_an_error_names_its_row_and_the_rest_is_kept_for_the_next_run(checkpoint: Path, tmp_path: Path) -> None:
    files = [write_jsonl(tmp_path / f"{i}.jsonl", TEXTS[:5]) for i in range(3)]
    write_jsonl(files[2], [*TEXTS[:4], {"title": "no text"}])
    out = tmp_path / "out"
    with pytest.raises(InputError, match=r"2\.jsonl, row 5: columns are title"):
        prepare([source(file) for file in files], out, checkpoint, workers=1)
    assert (out / "shard-00000.json").is_file() and not (out / "manifest.json").exists()
    assert not list(out.glob("*.partial-*"))
    with pytest.raises(ConfigError, match="has not finished it"):  # unfinished data is no data
        open_rows(config(out), Tokenizer.from_directory(checkpoint), None, 64)


def test_a_killed_run_goes_on_and_comes_to_the_same(checkpoint: Path, tmp_path: Path) -> None:
    file, out, straight = write_jsonl(tmp_path / "t.jsonl", TEXTS * 50), tmp_path / "out", tmp_path / "straight"
    patched = {"part_bytes": file.stat().st_size // 12}
    program = (
        "import sys; from pathlib import Path; from exaone_jax.config.data import SourceConfig\n"
        "from exaone_jax.data.prepare import prepare\n"
        "if __name__ == '__main__':\n"
        f"    prepare([SourceConfig(path={str(file)!r})], Path(sys.argv[1]), Path({str(checkpoint)!r}), workers=1, **{patched})\n"
    )
    script = tmp_path / "program.py"
    script.write_text(program)
    environment = {**os.environ, "PYTHONPATH": str(Path.cwd())}
    kills = 0
    for _ in range(2):
        process = subprocess.Popen([sys.executable, script, out], env=environment)
        done = len(list(out.glob("shard-*.json")))
        while process.poll() is None and len(list(out.glob("shard-*.json"))) < done + 2:
            time.sleep(0.002)
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
            kills += 1
        process.wait()
    assert kills == 2 and not (out / "manifest.json").exists()
    for directory in (out, straight):
        prepare([source(file)], directory, checkpoint, workers=1, **patched)
    assert digests(out) == digests(straight)


def test_workers_end_with_a_parent_that_is_killed(checkpoint: Path, tmp_path: Path) -> None:
    files, out = [write_jsonl(tmp_path / f"{i}.jsonl", TEXTS * 400) for i in range(2)], tmp_path / "out"
    arguments = ["data", "prepare", *files, "--out", out, "--tokenizer", checkpoint, "--workers", "2"]
    process = subprocess.Popen([sys.executable, "-m", "exaone_jax", *arguments])
    while not list(out.glob("*.array_record.partial-*")):
        assert process.poll() is None
        time.sleep(0.02)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    assert len(children) >= 2
    process.kill()
    process.wait()
    deadline = time.monotonic() + 30
    while any(Path(f"/proc/{child}").exists() for child in children):
        assert time.monotonic() < deadline, "a worker outlived its parent"
        time.sleep(0.05)


def test_two_runs_at_once_are_refused(checkpoint: Path, tmp_path: Path) -> None:
    file, out = write_jsonl(tmp_path / "texts.jsonl", TEXTS), tmp_path / "out"
    with prepare_module._locked(out), pytest.raises(StorageError, match="another process is preparing it"):
        prepare([source(file)], out, checkpoint)


def test_what_changed_since_is_found_out(checkpoint: Path, tokenizer: Tokenizer, tmp_path: Path) -> None:
    file, out = write_jsonl(tmp_path / "texts.jsonl", TEXTS), tmp_path / "out"
    prepare([source(file)], out, checkpoint, workers=1)
    other = train_bpe(["other words"], 620)
    with pytest.raises(ConfigError, match="prepared with another tokenizer"):
        open_rows(config(out), other, None, 64)
    shard = out / "shard-00000.array_record"
    whole = shard.read_bytes()
    flipped = bytearray(whole)
    flipped[70_000 if len(whole) > 140_000 else len(whole) // 2] ^= 1
    shard.write_bytes(flipped)
    rows = open_rows(config(out), tokenizer, None, 64)
    with pytest.raises(InputError, match=r"shard-00000.array_record, record \d+: not readable"):
        [rows[i] for i in range(rows.rows_per_epoch)]
    shard.write_bytes(whole[:-1])
    with pytest.raises(ConfigError, match="the manifest says"):
        open_rows(config(out), tokenizer, None, 64)
    shard.unlink()
    with pytest.raises(ConfigError, match="missing"):
        open_rows(config(out), tokenizer, None, 64)
    (out / "manifest.json").write_text("{}")
    with pytest.raises(ConfigError, match="not a manifest"):
        open_rows(config(out), tokenizer, None, 64)


@pytest.mark.parametrize("mask", [None, [True, False] * 5 + [True]])
def test_a_document_comes_back_from_its_record(mask: list[bool] | None) -> None:
    document = Document(np.arange(11, dtype=np.int32) * 15_000, None if mask is None else np.array(mask))
    back = unpack_document(pack_document(document), 11)
    assert back.tokens.dtype == np.int32 and back.tokens.tolist() == document.tokens.tolist()
    assert (back.loss_mask is None) if mask is None else (back.loss_mask.tolist() == mask)
    with pytest.raises(InputError, match="does not hold a document of 12"):
        unpack_document(pack_document(document), 12)


def test_the_command_line(checkpoint: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    file, out = write_jsonl(tmp_path / "chats.jsonl", CHATS), tmp_path / "out"
    arguments = ["data", "prepare", str(file), "--out", str(out), "--tokenizer", str(checkpoint), "--workers", "1"]
    assert main([*arguments, "--template-kwarg", "skip_think=true"]) == 0
    printed = capfd.readouterr()
    assert "10 documents" in printed.out and "out of 5 turns" in printed.err
    assert main([*arguments, "--template-kwarg", "skip_think=true", "--json"]) == 0
    assert json.loads(capfd.readouterr().out)["counts"]["documents"] == 10
    assert main(arguments) == 3
    assert "was begun with other chat_template_kwargs" in capfd.readouterr().err
    assert main(["data", "prepare", str(tmp_path / "absent"), *arguments[3:]]) == 2
    assert main([*arguments, "--template-kwarg", "skip_think=yes"]) == 2
