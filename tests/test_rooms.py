"""The house has floors: a room imports only from those below it, and the kernels from none of them."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FLOORS = (
    *(
        "errors",
        "config",
        "model",
        "parallel",
        "costs",
        "checkpoints",
        "text",
        "data",
        "inference",
        "training",
        "server",
    ),
    *("planning", "api", "cli"),
)


def imported(file: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


def test_every_room_has_a_floor():
    rooms = {
        path.stem for path in (ROOT / "exaone_jax").iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()
    }
    assert rooms - {"__init__", "__main__"} == set(FLOORS)


@pytest.mark.parametrize("room", FLOORS)
def test_a_room_imports_only_from_below(room: str):
    place, above = ROOT / "exaone_jax" / room, FLOORS[FLOORS.index(room) + 1 :]
    files = list(place.rglob("*.py")) if place.is_dir() else [place.with_suffix(".py")]
    names = [(file.relative_to(ROOT), name.split(".")) for file in files for name in imported(file)]
    assert names or room == "errors"
    assert not [(str(file), name) for file, name in names if name[0] == "exaone_jax" and name[1:2] and name[1] in above]


def test_kernels_know_nothing_of_exaone():
    files = list((ROOT / "pallas_kernels").rglob("*.py"))
    assert files
    assert not [file for file in files if any(name.split(".")[0] == "exaone_jax" for name in imported(file))]
