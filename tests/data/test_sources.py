"""Which files are documents."""

from pathlib import Path

from exaone_jax.data import python_files


def test_sources_come_in_order_of_their_names_without_tests_and_packages(tmp_path: Path) -> None:
    kept = ["a.py", "a/b.py", "a/z.py", "b.py"]
    left = [
        "test/x.py",
        "a/tests/x.py",
        "site-packages/x.py",
        "a/__pycache__/x.py",
        "a/notes.txt",
        "idlelib/idle_test/x.py",
    ]
    for name in reversed(kept + left):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("")
    assert [path.relative_to(tmp_path).as_posix() for path in python_files(tmp_path)] == kept


def test_the_place_of_the_tree_does_not_matter(tmp_path: Path) -> None:
    root = tmp_path / "test" / "lib"
    root.mkdir(parents=True)
    (root / "x.py").write_text("")
    assert python_files(root) == [root / "x.py"]
