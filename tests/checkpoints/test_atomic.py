"""A file that is replaced: synced before it takes its name, and the old one whole until then."""

from pathlib import Path

import pytest

from exaone_jax.checkpoints import atomic
from exaone_jax.errors import StorageError


def test_a_file_is_replaced_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, seen = tmp_path / "config.yaml", []
    path.write_bytes(b"old")
    sync = atomic.sync

    def noted(synced: Path) -> None:
        seen.append((synced.name, path.read_bytes()))
        sync(synced)

    monkeypatch.setattr(atomic, "sync", noted)
    atomic.replace_file(path, b"new")
    assert seen == [("config.yaml.partial", b"old"), (tmp_path.name, b"new")]
    assert [entry.name for entry in tmp_path.iterdir()] == ["config.yaml"]


def test_a_folder_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="nowhere/config.yaml: No such file"):
        atomic.replace_file(tmp_path / "nowhere" / "config.yaml", b"new")
