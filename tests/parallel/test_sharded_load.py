"""A checkpoint read onto a mesh: each part where the rules say, and from one mesh to another bit for bit."""

from pathlib import Path

import numpy as np
from flax import nnx

import exaone_jax
from exaone_jax.checkpoints.convert import from_hf, save_hf
from exaone_jax.parallel import MeshShape, make_mesh
from tests.parallel.small_model import CONFIG, one_device


def load(path: Path, shape: str):
    return exaone_jax.load(path, mesh=make_mesh(MeshShape.parse(shape)))


def test_eight_devices_hold_parts_and_compute_the_same(tmp_path: Path):
    save_hf(nnx.state(one_device()), CONFIG, tmp_path / "hf")
    model = load(tmp_path / "hf", "fsdp=2,expert=2,tensor=2")
    parts = {
        ".".join(map(str, path)): variable[...].addressable_shards[0].data.shape
        for path, variable in nnx.to_flat_state(nnx.state(model))
    }
    assert parts["embed.embedding"] == (48, 16)
    assert parts["segments.0.1.moe.experts.gate_proj"] == (1, 4, 8, 16)
    assert parts["segments.0.0.attention.o_proj.weight"] == (1, 16, 32)
    assert parts["norm.scale"] == (32,)
    tokens = np.random.default_rng(0).integers(0, CONFIG.vocab_size, (2, 24))
    # float32 sums in another order over logits of order 1.
    np.testing.assert_allclose(model(tokens), one_device()(tokens), atol=2e-5)


def test_from_one_mesh_to_another_bit_for_bit(tmp_path: Path):
    """Written by a mesh, as Hugging Face and converted to native, and read by others."""
    save_hf(nnx.state(one_device()), CONFIG, tmp_path / "first")
    save_hf(nnx.state(load(tmp_path / "first", "fsdp=2,expert=2,tensor=2")), CONFIG, tmp_path / "hf")
    from_hf(tmp_path / "hf", tmp_path / "native")
    for source, shape in (("hf", "expert=4,tensor=2"), ("native", "fsdp=8")):
        model = load(tmp_path / source, shape)
        for (path, found), (_, wanted) in zip(
            nnx.to_flat_state(nnx.state(model)), nnx.to_flat_state(nnx.state(one_device())), strict=True
        ):
            np.testing.assert_array_equal(found[...], wanted[...], err_msg=f"{source} {path}")
