"""`data prepare` on a Ray cluster: the bytes that processes make.

Ray is heavy and not among the test extra: `pip install '.[ray]'`, then `pytest -m slow tests/data/test_ray.py`.
"""

import os
from pathlib import Path

import pytest

from exaone_jax.data.prepare import prepare
from exaone_jax.errors import InputError
from tests.data.conftest import source, write_jsonl
from tests.data.test_prepare import TEXTS, digests

pytestmark = pytest.mark.slow
pytest.importorskip("ray", reason="needs the extra: ray")


@pytest.fixture
def address(monkeypatch: pytest.MonkeyPatch):
    """A cluster of two machines, as far as Ray can tell, each with one processor."""
    from ray.cluster_utils import Cluster

    monkeypatch.setenv("PYTHONPATH", str(Path.cwd()) + os.pathsep + os.environ.get("PYTHONPATH", ""))
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    cluster.add_node(num_cpus=1)
    cluster.wait_for_nodes()
    yield cluster.address
    cluster.shutdown()


def test_a_cluster_makes_the_same_bytes(address: str, tokenizer_dir: Path, tmp_path: Path) -> None:
    import ray

    file = write_jsonl(tmp_path / "texts.jsonl", TEXTS)
    prepare([source(file)], tmp_path / "here", tokenizer_dir, workers=1, part_bytes=2000)
    ray.init(address=address, log_to_driver=False)
    try:
        assert len([node for node in ray.nodes() if node["Alive"]]) == 2
        prepare([source(file)], tmp_path / "ray", tokenizer_dir, ray=address, part_bytes=2000)
        assert digests(tmp_path / "ray") == digests(tmp_path / "here")
        bad = write_jsonl(tmp_path / "bad.jsonl", [{"title": "no text"}])
        with pytest.raises(InputError, match=r"bad\.jsonl, row 1: columns are title"):
            prepare([source(bad)], tmp_path / "bad", tokenizer_dir, ray=address)
    finally:
        ray.shutdown()
