"""Where documents come from."""

from pathlib import Path

# Neither the library's own code nor of a kind with it: tests are mostly data, and lib2to3's are other languages' worth of it.
_SKIPPED = frozenset({"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__", "pydoc_data"})


def python_files(root: Path) -> list[Path]:
    """Python sources under `root` in the order of their names, without installed packages and tests."""
    files = (path for path in root.rglob("*.py") if _SKIPPED.isdisjoint(path.relative_to(root).parts))
    return sorted(files, key=lambda path: path.relative_to(root).as_posix())
