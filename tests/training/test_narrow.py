"""Forward products in int8 and float8: their values, gradients that go straight through, a mesh, a run that goes on."""

from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx

from exaone_jax.errors import ConfigError
from exaone_jax.model import Transformer
from exaone_jax.model.linear import RouterBias, dot
from exaone_jax.model.narrow import check_device, narrow_dot, narrow_grouped
from exaone_jax.model.placement import OneDevice
from exaone_jax.parallel import MeshShape, exchange, make_mesh, place
from exaone_jax.training import LossConfig
from exaone_jax.training.loop import train
from exaone_jax.training.loss import total_loss
from pallas_kernels.grouped_matmul import grouped_matmul
from tests.parallel.small_model import CONFIG, on_mesh, one_device, rows
from tests.training.runs import SPARSE, small_run

KINDS = ["int8", "float8"]
SIZES = np.array([3, 0, 4], np.int32)  # of 9 rows: one group has none, and two rows are of no group


def normal(*shape: int) -> np.ndarray:
    return np.random.default_rng(sum(shape)).normal(size=shape).astype(np.float32)


def rounded(x: np.ndarray, kind: str) -> np.ndarray:
    """What is left of x `[..., n]`, in float64."""
    limit = {"int8": 127, "float8": 448}[kind]
    scale = np.abs(x).max(axis=-1, keepdims=True) / np.float32(limit)
    codes = np.rint(x / scale) if kind == "int8" else (x / scale).clip(-448, 448).astype(ml_dtypes.float8_e4m3fn)
    return codes.astype(np.float64) * scale


@pytest.mark.parametrize("kind", KINDS)
def test_a_product_is_that_of_the_rounded_sides(kind) -> None:
    x, weight = normal(2, 5, 24), normal(7, 24)
    expected = rounded(x, kind) @ rounded(weight, kind).T
    found = narrow_dot(jnp.asarray(x), jnp.asarray(weight), kind)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)  # float32 after the sums
    assert np.abs(found - x @ weight.T).max() > 1e-3  # and not the wide one


@pytest.mark.parametrize("kind", KINDS)
def test_a_grouped_product_is_that_of_the_rounded_sides(kind) -> None:
    x, weight = normal(9, 24), normal(3, 7, 24)
    expected = np.zeros((9, 7))
    for group, (start, stop) in enumerate([(0, 3), (3, 3), (3, 7)]):
        expected[start:stop] = rounded(x[start:stop], kind) @ rounded(weight[group], kind).T
    x[7:] = np.nan  # of no group: nobody sees it
    found = narrow_grouped(jnp.asarray(x), jnp.asarray(weight), jnp.asarray(SIZES), kind)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_those_of_the_wide_product_bit_for_bit(kind) -> None:
    x, weight, grad = jnp.asarray(normal(9, 24), jnp.bfloat16), jnp.asarray(normal(3, 7, 24)), jnp.asarray(normal(9, 7))
    grad, sizes = grad.astype(jnp.bfloat16), jnp.asarray(SIZES)
    dense = (lambda x, w: narrow_dot(x, w, kind), dot)
    grouped = (
        lambda x, w: narrow_grouped(x, w, sizes, kind),
        lambda x, w: grouped_matmul(x, w, sizes, transpose_rhs=True),
    )
    for (narrow, wide), matrix in ((dense, weight[0]), (grouped, weight)):
        found, expected = (jax.vjp(each, x, matrix)[1](grad) for each in (narrow, wide))
        for one, other in zip(found, expected, strict=True):
            assert one.dtype == other.dtype
            assert np.asarray(one).tobytes() == np.asarray(other).tobytes()
        assert found[1].dtype == jnp.float32


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_is_not_finite_is_not_lost(kind, bad: float) -> None:
    x, weight = normal(3, 8), normal(4, 8)
    x[1, 2] = bad
    found = np.isfinite(narrow_dot(jnp.asarray(x), jnp.asarray(weight), kind))
    np.testing.assert_array_equal(found, [[True] * 4, [False] * 4, [True] * 4])


def test_a_row_of_zeros_gives_zeros() -> None:
    assert not np.any(narrow_dot(jnp.zeros((2, 8)), jnp.asarray(normal(4, 8)), "int8"))


def loss_and_gradients(model: Transformer) -> tuple[float, dict]:
    graphdef, params, biases = nnx.split(model, nnx.Param, RouterBias)
    batch = rows(8, 48)

    @jax.jit
    def run(params, biases):
        def objective(params):
            return total_loss(nnx.merge(graphdef, params, biases), batch, LossConfig())[0]

        return jax.value_and_grad(objective)(params)

    loss, grads = run(params, biases)
    return float(loss), {path: np.asarray(leaf[...]) for path, leaf in nnx.to_flat_state(grads)}


@pytest.mark.parametrize("shape", ["fsdp=8", "fsdp=2,expert=4"])
def test_eight_devices_are_one(shape: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sums of int8 are exact in any order. What is rounded is not quite: float32 sums before it in another order may push a
    value over to the next code, one of 254, so a gradient is compared as a whole."""
    monkeypatch.setattr(exchange, "GATHER_UP_TO", 8)  # tokens travel, and their gradients are made by hand
    loss, grads = loss_and_gradients(Transformer(CONFIG, rngs=nnx.Rngs(0), placement=OneDevice("int8")))
    found, placed = loss_and_gradients(on_mesh(shape, narrow="int8"))
    np.testing.assert_allclose(found, loss, rtol=1e-4)
    for path, expected in grads.items():
        error = np.linalg.norm(placed[path] - expected)
        assert error <= 0.01 * np.linalg.norm(expected) + 1e-7, path
    assert loss != loss_and_gradients(one_device())[0]


def test_experts_split_by_width_are_refused() -> None:
    with pytest.raises(ConfigError, match="tensor splits the experts' matrices into 2 parts"):
        place(CONFIG, make_mesh(MeshShape.parse("fsdp=4,tensor=2")), narrow="int8")


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_learns_as_the_wide_one_and_goes_on_bit_for_bit(kind, tmp_path: Path) -> None:
    """int8 errs by 1/254 of a row's largest value, float8 by 1/16 of each: noise of that size in the layers' products, none of
    it in embedding, head and router, moves a loss near 5 nats by less than a hundredth part in six steps."""
    folders = [tmp_path / name for name in ("wide", "whole", "parts")]
    for folder in folders:
        folder.mkdir()
    wide = train(small_run(folders[0], model=SPARSE))
    whole = train(small_run(folders[1], model=SPARSE, quantize_forward=kind))
    train(small_run(folders[2], model=SPARSE, quantize_forward=kind, stop_after=3))
    assert train(small_run(folders[2], model=SPARSE, quantize_forward=kind)) == whole
    assert whole.sha256 != wide.sha256
    np.testing.assert_allclose(whole.loss, wide.loss, rtol=0.01)


@pytest.mark.parametrize(
    ("kind", "device", "experts"),
    [
        ("int8", {"platform": "tpu", "device_kind": "TPU v4"}, False),
        ("int8", {"platform": "tpu", "device_kind": "TPU7x"}, False),
        ("float8", {"platform": "tpu", "device_kind": "TPU v6 lite"}, False),
        ("float8", {"platform": "gpu", "device_kind": "NVIDIA A100", "compute_capability": "8.0"}, False),
        ("float8", {"platform": "gpu", "device_kind": "NVIDIA H100", "compute_capability": "9.0"}, True),
        ("int8", {"platform": "gpu", "device_kind": "NVIDIA H100", "compute_capability": "9.0"}, False),
    ],
)
def test_a_device_without_such_products_is_refused(kind, device: dict, experts: bool) -> None:
    with pytest.raises(ConfigError, match=f"found {kind} on {device['device_kind']}"):
        check_device(kind, SimpleNamespace(**device), experts)


@pytest.mark.parametrize(
    ("kind", "device"),
    [
        ("int8", {"platform": "tpu", "device_kind": "TPU v5 lite"}),
        ("int8", {"platform": "tpu", "device_kind": "TPU v6 lite"}),
        ("float8", {"platform": "tpu", "device_kind": "TPU7x"}),
        ("float8", {"platform": "gpu", "device_kind": "NVIDIA H100", "compute_capability": "9.0"}),
        ("float8", {"platform": "cpu", "device_kind": "cpu"}),
    ],
)
def test_a_device_with_such_products_serves(kind, device: dict) -> None:
    check_device(kind, SimpleNamespace(**device), False)


def test_another_type_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match='quantize_forward: found "int4".*int8'):
        small_run(tmp_path, quantize_forward="int4")
