"""How three models are split over three meshes, as files: a change of the rules shows in the diff of a review.

python -m tests.planning.test_sharding_snapshots    # writes them anew
"""

import json
from pathlib import Path

import pytest

from exaone_jax.config import published, read_config
from exaone_jax.parallel import MeshShape
from exaone_jax.planning.sharding import shard_model

SNAPSHOTS = Path(__file__).parent / "snapshots"
CASES = {
    "EXAONE-4.0-32B": "fsdp=8,tensor=4",
    "K-EXAONE-236B-A23B": "fsdp=16,expert=8,tensor=4",
    "K-EXAONE-2.0-750B-A37B": "data=2,fsdp=8,expert=16,tensor=2,context=4",
}


def found(name: str) -> dict[str, str]:
    """`name: dtype [shape] [split]` of every parameter."""
    sharded = shard_model(read_config(published(name)), MeshShape.parse(CASES[name]))
    splits = {}
    for parameter in sharded.parameters:
        split = ", ".join("-" if axes is None else " x ".join(axes) for axes in parameter.spec)
        splits[parameter.name] = f"{parameter.dtype} {list(parameter.shape)} [{split}]"
    return {"mesh": CASES[name], **splits}


@pytest.mark.parametrize("name", CASES)
def test_splits_are_those_that_were_reviewed(name: str):
    assert found(name) == json.loads((SNAPSHOTS / f"{name}.json").read_text())


if __name__ == "__main__":
    SNAPSHOTS.mkdir(exist_ok=True)
    for name in CASES:
        (SNAPSHOTS / f"{name}.json").write_text(json.dumps(found(name), indent=2) + "\n")
