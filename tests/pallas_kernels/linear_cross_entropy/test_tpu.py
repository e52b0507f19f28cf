"""The TPU kernels of the loss: in the interpreter against float64, and compiled by the TPU compiler where libtpu is there."""

import functools
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from pallas_kernels.linear_cross_entropy import choose_implementation, linear_cross_entropy, tuned
from tests.pallas_kernels.linear_cross_entropy.test_linear_cross_entropy import exact, operands, value_and_gradients
from tests.pallas_kernels.tpu_compiler import TOPOLOGIES

# (D, V) of K-EXAONE, EXAONE 4.5 (4.0 has its size and 102,400 words), EXAONE 4.0 1.2B and EXAONE 3.5 2.4B.
PUBLISHED = [(6144, 153_600), (5120, 153_600), (5120, 102_400), (2048, 102_400), (2560, 102_400)]


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    """Tiles so small that short inputs have several of each; a compile for a TPU undoes it."""
    monkeypatch.setenv("TPU_SKIP_MDS_QUERY", "1")
    monkeypatch.setattr(tuned, "_SMALL", tuned.Chip(2**23, 128, 128, 256, 256))


# One tile; several of each; a vocabulary of five tiles, rows that leave the last one part empty.
@pytest.mark.parametrize(("num_rows", "size", "vocab"), [(5, 128, 128), (256, 640, 384), (300, 256, 1280)])
@pytest.mark.parametrize("z_loss", [0.0, 1e-3])
def test_matches_float64(num_rows, size, vocab, z_loss):
    x, weight, labels, grads = operands(num_rows, size, vocab)
    weight = weight / np.sqrt(size)
    mask = jnp.arange(num_rows) % 5 != 0
    truth = exact(x, weight, labels, grads, mask, z_loss)
    x, labels = jnp.where(mask[:, None], x, jnp.nan), jnp.where(mask, labels, -(10**6))
    found = value_and_gradients(
        x, weight, labels, grads, mask=mask, z_loss=z_loss, implementation="tpu", interpret=True
    )
    for name, a, t in zip(("loss", "lse", "dx", "dweight"), found, truth, strict=True):
        # Sums of at most 1,280 float32 products of O(1): off by 1e-6 of the largest; 2e-5 is the bound of every implementation.
        np.testing.assert_allclose(a, t, rtol=0, atol=2e-5 * np.abs(t).max(), err_msg=name)


def test_bfloat16_is_as_good_as_the_reference_in_bfloat16():
    x, weight, labels, grads = operands(300, 256, 640, jnp.bfloat16)
    truth = exact(x, weight, labels, grads)
    plain = value_and_gradients(x, weight, labels, grads, implementation="reference")
    found = value_and_gradients(x, weight, labels, grads, implementation="tpu", interpret=True)
    for name, a, b, t in zip(("loss", "lse", "dx", "dweight"), found, plain, truth, strict=True):
        assert np.abs(a - t).max() <= 2 * np.abs(b - t).max() + 1e-6 * np.abs(t).max(), name


def test_wide_weights_get_a_float32_gradient():
    x, weight, labels, _ = operands(8, 128, 256)
    loss = lambda w: linear_cross_entropy(  # noqa: E731
        x.astype(jnp.bfloat16), w, labels, implementation="tpu", interpret=True
    )[0].sum()
    assert jax.grad(loss)(weight).dtype == jnp.float32


def test_rows_of_one_tile_and_labels_outside():
    """A row tile is written and read again by turns: the least call has two of them, and -1 is nobody's label."""
    x, weight, _, _ = operands(3, 128, 256)
    labels = jnp.asarray([0, 256, -1])
    loss, lse = linear_cross_entropy(x, weight, labels, implementation="tpu", interpret=True)
    assert np.isnan(loss).tolist() == [False, True, True]
    np.testing.assert_allclose(lse, linear_cross_entropy(x, weight, labels, implementation="reference")[1], rtol=2e-5)


@pytest.mark.parametrize("kind", ["TPU v5 lite", "TPU v5", "TPU v6 lite", "TPU7x"])
@pytest.mark.parametrize("parts", [1, 4, 8])
@pytest.mark.parametrize(("size", "vocab"), PUBLISHED)
def test_published_shapes_have_wide_tiles(kind, parts, size, vocab):
    """Bytes of HBM are read once a tile of the other side: 128 words or rows would wait for them."""
    forward = tuned.forward_tiles(kind, 8192, size, vocab // parts, 2)
    backward = tuned.backward_tiles(kind, 8192, size, vocab // parts, 2, 2)
    assert forward is not None and backward is not None
    assert forward.rows == 1024
    assert backward.vocab >= 384
    for tiles in (forward, backward):
        assert vocab // parts % tiles.vocab == 0


def test_what_it_cannot_serve():
    x, weight, labels, _ = operands(8, 128, 256)
    cases = [
        ((x, weight, labels), {}, "there is no TPU here"),
        ((x, weight[:200], labels), {"interpret": True}, "multiples of 128"),
        ((x[:, :64], weight[:, :64], labels), {"interpret": True}, "multiples of 128"),
        ((x, weight, labels), {"interpret": True, "chunk_size": 4}, "takes no chunk_size"),
    ]
    for arrays, options, reason in cases:
        with pytest.raises(NotImplementedError, match=reason):
            choose_implementation(*arrays, implementation="tpu", **options)
    assert choose_implementation(x, weight, labels, implementation="tpu", interpret=True) == "tpu"


def compile_on_four_chips(topology: str, num_rows: int, size: int, vocab: int, weight_dtype: str):
    """value_and_grad of the loss with the vocabulary split over the chips of a topology: its memory on one chip."""
    from jax.experimental import topologies

    devices = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
    mesh = Mesh(np.array(devices[:4]), ("tensor",), axis_types=(AxisType.Auto,))
    whole, split = PartitionSpec(), PartitionSpec("tensor")
    array = lambda shape, dtype, spec: jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))  # noqa: E731

    def loss(x, weight, labels):
        local = functools.partial(linear_cross_entropy, axis_name="tensor", implementation="tpu")
        run = jax.shard_map(local, mesh=mesh, in_specs=(whole, split, whole), out_specs=whole, check_vma=False)
        return jnp.sum(run(x, weight, labels)[0])

    arrays = (
        array((num_rows, size), "bfloat16", whole),
        array((vocab, size), weight_dtype, split),
        array((num_rows,), "int32", whole),
    )
    gradients = tuple(NamedSharding(mesh, spec) for spec in (whole, split))
    with jax.set_mesh(mesh):
        step = jax.jit(jax.value_and_grad(loss, argnums=(0, 1)), out_shardings=(NamedSharding(mesh, whole), gradients))
        return step.trace(*arrays).lower(lowering_platforms=("tpu",)).compile().memory_analysis()


@pytest.mark.slow
@pytest.mark.skipif(
    os.environ.get("JAX_PLATFORMS") != "cpu", reason="needs JAX_PLATFORMS=cpu, or libtpu looks for a TPU"
)
@pytest.mark.parametrize("chip", TOPOLOGIES)
@pytest.mark.parametrize(("size", "vocab"), PUBLISHED)
@pytest.mark.parametrize("weight_dtype", ["bfloat16", "float32"])
def test_compiles_for(monkeypatch, chip, size, vocab, weight_dtype):
    pytest.importorskip("libtpu")
    monkeypatch.undo()
    monkeypatch.setenv("TPU_SKIP_MDS_QUERY", "1")
    monkeypatch.setenv("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    memory = compile_on_four_chips(TOPOLOGIES[chip], 8192, size, vocab, weight_dtype)
    # x's gradient in float32 and, of a wide weight, its own part in bfloat16; nothing of 8,192 x V / 4 logits.
    cast = vocab // 4 * size * 2 if weight_dtype == "float32" else 0
    assert memory.temp_size_in_bytes <= 8192 * size * 4 + cast + 2**22
