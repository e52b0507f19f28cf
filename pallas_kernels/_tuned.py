"""Tables of block sizes: JSON beside each kernel, chip -> shape -> sizes, written by `benchmarks/tpu_tune.py` and read here."""

import json
from pathlib import Path
from typing import Any, TypeVar

ANY = "any"  # the shape that serves those that have no row of their own
# The start of jax's `device_kind`; the longer name stands before the shorter one that it begins with.
CHIPS = {"TPU v5 lite": "v5e", "TPU v5e": "v5e", "TPU v5": "v5p", "TPU v6": "v6e", "TPU7": "tpu7x"}
_UNKNOWN = "v6e"

Sizes = TypeVar("Sizes")


def chip(device_kind: str) -> str:
    """The table's name of a device kind as jax names it; v6e where it is none of the known ones."""
    return next((name for start, name in CHIPS.items() if device_kind.startswith(start)), _UNKNOWN)


def shape(group: int, head_dim: int) -> str:
    """The key of a shape: query heads on a kv head x head dimension."""
    return f"{group}x{head_dim}"


def read_table(path: Path, sizes: type[Sizes]) -> dict[str, dict[str, Sizes]]:
    """Raises ValueError naming the file and the row whose fields are not those of `sizes`."""
    table = json.loads(path.read_text())
    fields = set(sizes._fields)  # type: ignore[attr-defined]
    for chip_name, rows in table.items():
        for key, row in rows.items():
            if set(row) != fields:
                raise ValueError(
                    f"{path}: {chip_name} {key} must have the fields {sorted(fields)}, found {sorted(row)}"
                )
        if ANY not in rows:
            raise ValueError(f"{path}: {chip_name} must have a row {ANY!r}, found {sorted(rows)}")
    return {name: {key: sizes(**row) for key, row in rows.items()} for name, rows in table.items()}


def write_table(path: Path, table: dict[str, dict[str, Any]]) -> None:
    """One line a row, in order, so that a search shows as a small diff."""
    chips = []
    for name in sorted(table):
        rows = [f"    {json.dumps(key)}: {json.dumps(row._asdict())}" for key, row in sorted(table[name].items())]
        chips.append(f"  {json.dumps(name)}: {{\n" + ",\n".join(rows) + "\n  }")
    partial = path.with_suffix(".partial")
    partial.write_text("{\n" + ",\n".join(chips) + "\n}\n")
    partial.rename(path)


def find(table: dict[str, dict[str, Sizes]], device_kind: str, group: int, head_dim: int) -> Sizes:
    rows = table[chip(device_kind)]
    return rows.get(shape(group, head_dim), rows[ANY])
