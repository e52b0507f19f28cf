"""The linear cross entropy against its plain meaning: values, gradients, memory, and a reasoned answer to every call."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels.linear_cross_entropy import choose_implementation, linear_cross_entropy, xla

IGNORED = -100


def operands(num_rows: int, size: int, vocab: int, dtype: jax.typing.DTypeLike = jnp.float32, seed: int = 0):
    """x, weight, labels, and a gradient for each of loss and lse."""
    keys = jax.random.split(jax.random.key(seed), 5)
    x, weight = jax.random.normal(keys[0], (num_rows, size), dtype), jax.random.normal(keys[1], (vocab, size), dtype)
    grads = (jax.random.normal(keys[2], (num_rows,)), jax.random.normal(keys[3], (num_rows,)))
    return x, weight, jax.random.randint(keys[4], (num_rows,), 0, vocab), grads


def value_and_gradients(x, weight, labels, grads, **options) -> list[np.ndarray]:
    """loss, lse, x's gradient and the weight's, in float32."""
    return [np.asarray(a, np.float32) for a in _value_and_gradients(x, weight, labels, grads, **options)]


@functools.partial(jax.jit, static_argnames=("implementation", "z_loss", "ignore_index", "chunk_size", "interpret"))
def _value_and_gradients(x, weight, labels, grads, **options):
    out, pull = jax.vjp(lambda x, weight: linear_cross_entropy(x, weight, labels, **options), x, weight)
    return *out, *pull(grads)


def exact(x, weight, labels, grads, mask=None, z_loss=0.0) -> list[np.ndarray]:
    """The same in float64, gradients written out by hand."""
    x, weight, labels = np.asarray(x, np.float64), np.asarray(weight, np.float64), np.asarray(labels)
    counts = (labels != IGNORED) & (True if mask is None else np.asarray(mask, bool))
    x = np.where(counts[:, None], x, 0)
    logits = x @ weight.T
    lse = np.log(np.exp(logits - logits.max(1, keepdims=True)).sum(1)) + logits.max(1)
    onehot = np.arange(weight.shape[0]) == labels[:, None]
    loss = lse - (logits * onehot).sum(1) + z_loss * lse**2
    dloss, dlse = (np.where(counts, np.asarray(g, np.float64), 0)[:, None] for g in grads)
    softmax = np.exp(logits - lse[:, None])
    dlogits = dloss * (softmax * (1 + 2 * z_loss * lse[:, None]) - onehot) + dlse * softmax
    return [np.where(counts, loss, 0), np.where(counts, lse, 0), dlogits @ weight, dlogits.T @ x]


def assert_close(found: list[np.ndarray], expected: list[np.ndarray], tolerance: float) -> None:
    """Errors relative to the largest entry of each."""
    for name, a, b in zip(("loss", "lse", "dx", "dweight"), found, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=tolerance * max(float(np.abs(b).max()), 1e-30), err_msg=name)


@pytest.mark.parametrize("implementation", ["reference", "xla"])
@given(
    shape=st.sampled_from([(1, 4, 3), (7, 16, 50), (24, 8, 129)]),
    chunk_size=st.sampled_from([None, 1, 5, 100]),
    z_loss=st.sampled_from([0.0, 1e-2]),
    data=st.data(),
)
@settings(max_examples=25, deadline=None)
def test_matches_float64(implementation, shape, chunk_size, z_loss, data):
    x, weight, labels, grads = operands(*shape)
    rows = st.lists(st.booleans(), min_size=shape[0], max_size=shape[0])
    mask = jnp.asarray(data.draw(rows))
    labels = jnp.where(jnp.asarray(data.draw(rows)), labels, IGNORED)
    options = {"implementation": implementation, "z_loss": z_loss, "mask": mask}
    if implementation == "xla":
        options["chunk_size"] = chunk_size
    found = value_and_gradients(x, weight, labels, grads, **options)
    # The logits sum at most 16 float32 products and are below 30: off by 30 * 6e-8 * a few, which exp passes on as a relative
    # error; 2e-5 leaves a factor of two or more.
    assert_close(found, exact(x, weight, labels, grads, mask, z_loss), 2e-5)


@pytest.mark.parametrize("chunk_size", [None, 16])
def test_bfloat16_is_as_good_as_the_reference_in_bfloat16(chunk_size):
    x, weight, labels, grads = operands(100, 32, 300, jnp.bfloat16)
    truth = exact(x, weight, labels, grads, z_loss=1e-3)
    plain = value_and_gradients(x, weight, labels, grads, z_loss=1e-3, implementation="reference")
    found = value_and_gradients(x, weight, labels, grads, z_loss=1e-3, implementation="xla", chunk_size=chunk_size)
    for name, a, b, t in zip(("loss", "lse", "dx", "dweight"), found, plain, truth, strict=True):
        # Loss and lse are float32 in both; a floor of a few of its roundings keeps the comparison from being about luck.
        assert np.abs(a - t).max() <= 2 * np.abs(b - t).max() + 1e-6 * np.abs(t).max(), name


def test_wide_kernel_gets_a_float32_gradient():
    """The weight's gradient is summed in float32 over chunks; in bfloat16 the sum of 64 chunks would lose its tail."""
    x, weight, labels, grads = operands(256, 16, 40)
    x = x.astype(jnp.bfloat16)
    truth = exact(x, weight.astype(jnp.bfloat16), labels, grads)
    found = value_and_gradients(x, weight, labels, grads, implementation="xla", chunk_size=4)
    out = jax.eval_shape(jax.grad(lambda w: linear_cross_entropy(x, w, labels)[0].sum()), weight)
    assert out.dtype == jnp.float32
    # d logits is rounded to bfloat16, 2**-9 of each term, and the roundings of 256 rows are independent.
    np.testing.assert_allclose(found[3], truth[3], rtol=0, atol=2**-9 * np.abs(truth[3]).max())


@pytest.mark.parametrize("implementation", ["reference", "xla"])
def test_rows_that_do_not_count_may_hold_anything(implementation: str):
    x, weight, labels, grads = operands(12, 8, 30)
    mask = jnp.arange(12) % 3 != 0
    truth = exact(x, weight, labels, grads, mask, 1e-3)
    x, labels = jnp.where(mask[:, None], x, jnp.nan), jnp.where(mask, labels, 10**6)
    grads = tuple(jnp.where(mask, g, jnp.nan) for g in grads)
    options = {"mask": mask.astype(jnp.int32), "z_loss": 1e-3, "implementation": implementation}
    assert_close(value_and_gradients(x, weight, labels, grads, **options), truth, 2e-5)


@pytest.mark.parametrize("implementation", ["reference", "xla"])
def test_labels_outside_the_vocabulary_are_loud(implementation: str):
    x, weight, _, _ = operands(4, 8, 30)
    loss, lse = linear_cross_entropy(x, weight, jnp.asarray([0, 30, -1, IGNORED]), implementation=implementation)
    np.testing.assert_array_equal(np.isnan(loss), [False, True, True, False])
    assert np.isfinite(lse).all()


@pytest.mark.parametrize("implementation", ["reference", "xla"])
def test_ignore_index_and_large_logits(implementation: str):
    x, weight, labels, grads = operands(6, 8, 30)
    labels = labels.at[2].set(7).at[4].set(7)
    found = value_and_gradients(300 * x, weight, labels, grads, ignore_index=7, implementation=implementation)
    assert all(np.isfinite(a).all() for a in found)
    assert not found[0][[2, 4]].any()
    assert not found[2][[2, 4]].any()
    assert_close(found, exact(300 * x, weight, jnp.where(labels == 7, IGNORED, labels), grads), 5e-4)


def test_logits_are_never_whole():
    """512 rows of 20,000 logits are 41 MB; chunks of 32 rows need a few times 2.6 MB, and the weight's gradient 1.3 MB."""
    num_rows, size, vocab, chunk = 512, 16, 20_000, 32
    x, weight, labels, _ = jax.eval_shape(lambda: operands(num_rows, size, vocab))

    def loss(x, weight, labels, **options):
        return linear_cross_entropy(x, weight, labels, **options)[0].sum()

    def temporaries(**options) -> int:
        step = jax.jit(jax.value_and_grad(lambda *args: loss(*args, **options), argnums=(0, 1)))
        return step.lower(x, weight, labels).compile().memory_analysis().temp_size_in_bytes

    bound = 4 * (4 * chunk * vocab) + 2 * (4 * size * vocab)
    assert temporaries(implementation="xla", chunk_size=chunk) <= bound
    assert temporaries(implementation="reference") >= 4 * num_rows * vocab


def test_default_chunks():
    assert xla.default_chunk_size(153_600) == 384
    assert xla.default_chunk_size(2_048) == 32_768
    assert xla.default_chunk_size(10**7) == 6
    assert xla.default_chunk_size(10**9) == 1


def test_the_published_vocabulary_in_default_chunks():
    x, weight, labels, grads = operands(384 + 5, 4, 153_600)
    rows = jnp.asarray([0, 1, 7, 200, 384, 388])
    mask = jnp.zeros(389, bool).at[rows].set(True)
    found = value_and_gradients(x, weight, labels, grads, mask=mask, implementation="xla")
    truth = exact(x[rows], weight, labels[rows], [g[rows] for g in grads])
    # 153,600 terms in each sum: float32 sums of that length, blocked as XLA's are, are off by a few 1e-6.
    assert_close([*(a[rows] for a in found[:3]), found[3]], truth, 2e-5)
    assert [int((a != 0).any(axis=-1).sum()) for a in (found[0][:, None], found[2])] == [6, 6]


@pytest.mark.parametrize("implementation", ["reference", "xla", "tpu"])
@pytest.mark.parametrize("z_loss", [0.0, 1e-2])
def test_a_split_vocabulary_is_that_of_one_device(implementation: str, z_loss: float):
    """Rows over two devices, words over four: loss, lse and both gradients, with labels of every device, of none and ignored."""
    mesh = jax.make_mesh((2, 4), ("data", "tensor"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    x, weight, labels, grads = operands(32, 128, 512)
    weight, labels = weight / 8, labels.at[3].set(IGNORED)
    options = {"implementation": implementation, "z_loss": z_loss, "interpret": implementation == "tpu"}
    rows, words = jax.sharding.PartitionSpec("data"), jax.sharding.PartitionSpec("tensor")

    def run(x, weight):
        local = functools.partial(linear_cross_entropy, axis_name="tensor", **options)
        split = jax.shard_map(local, mesh=mesh, in_specs=(rows, words, rows), out_specs=rows, check_vma=False)
        return split(x, weight, labels)

    out, pull = jax.jit(lambda x, weight, grads: (lambda out, pull: (out, pull(grads)))(*jax.vjp(run, x, weight)))(
        x, weight, grads
    )
    truth = exact(x, weight, labels, grads, z_loss=z_loss)
    assert_close([np.asarray(a) for a in (*out, *pull)], truth, 2e-5)
    outside = jax.jit(lambda: run(x, weight))
    labels = labels.at[0].set(512).at[17].set(-1)
    assert np.flatnonzero(np.isnan(outside()[0])).tolist() == [0, 17]


def test_no_rows():
    x, weight, labels, grads = operands(0, 8, 30)
    loss, _, dx, dweight = value_and_gradients(x, weight, labels, grads)
    assert (loss.shape, dx.shape) == ((0,), (0, 8))
    assert not dweight.any()


CALLS = {
    "plain": {},
    "mask": {"mask": jnp.arange(6) % 2},
    "ignored": {"ignore_index": 3, "labels": [3, 1, 3, 100, 0, 3]},
    "z-loss": {"z_loss": 1e-2},
    "chunks": {"chunk_size": 4},
    "bfloat16": {"dtype": jnp.bfloat16},
    "odd": {"shape": (6, 8, 30)},
    "no rows": {"shape": (0, 128, 256)},
}


@pytest.mark.parametrize("name", CALLS)
def test_every_call_gives_a_result_or_a_reason(name):
    """Every implementation, in the interpreter and out of it: what it returns is right, or it says why it cannot."""
    call = {"shape": (6, 128, 256), "dtype": jnp.float32, "labels": None} | CALLS[name]
    x, weight, labels, _ = operands(*call.pop("shape"), call.pop("dtype"))
    given = call.pop("labels")
    arrays = (x, weight, labels if given is None else jnp.asarray(given))
    plain = {key: value for key, value in call.items() if key != "chunk_size"}
    wanted = linear_cross_entropy(*arrays, implementation="reference", **plain)
    served = set()
    for implementation in ("reference", "xla", "tpu", "gpu", None):
        for interpret in (False, True):
            options = {"implementation": implementation, "interpret": interpret, **call}
            try:
                found = linear_cross_entropy(*arrays, **options)
            except NotImplementedError as reason:
                words = "is for Pallas kernels|no TPU here|no GPU kernel|takes no chunk_size|multiples of 128"
                assert re.search(f"^linear_cross_entropy: .* ({words})", str(reason))  # noqa: PT017
                with pytest.raises(NotImplementedError, match=re.escape(str(reason))):
                    choose_implementation(*arrays, **options)
                continue
            served.add((implementation, interpret))
            assert choose_implementation(*arrays, **options) == (implementation or "xla")
            for a, b in zip(found, wanted, strict=True):  # both sum float32, in two orders
                assert (a.shape, a.dtype) == ((x.shape[0],), jnp.float32)
                np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-5)
    takes_chunks = {("xla", False), (None, False)}
    on_tpu = set() if name == "odd" else {("tpu", True)}
    assert served == (takes_chunks if name == "chunks" else takes_chunks | on_tpu | {("reference", False)})


def test_wrong_calls_are_named():
    x, weight, labels, _ = operands(6, 8, 30)
    with pytest.raises(ValueError, match=r"expected x \[M, D\]"):
        linear_cross_entropy(x[:, :7], weight, labels)
    with pytest.raises(ValueError, match=r"expected labels \(6,\), found \(5,\)"):
        linear_cross_entropy(x, weight, labels[:5])
    with pytest.raises(ValueError, match=r"expected mask \(6,\)"):
        linear_cross_entropy(x, weight, labels, mask=jnp.ones((6, 1), bool))
    with pytest.raises(TypeError, match="mask must be bool or integer, found float32"):
        linear_cross_entropy(x, weight, labels, mask=jnp.ones(6))
    with pytest.raises(TypeError, match="labels must be integers"):
        linear_cross_entropy(x, weight, labels.astype(jnp.float32))
    with pytest.raises(TypeError, match="x must be float32 or bfloat16, found int32"):
        linear_cross_entropy(x.astype(jnp.int32), weight, labels)
    with pytest.raises(ValueError, match="z_loss must be >= 0"):
        linear_cross_entropy(x, weight, labels, z_loss=-1.0)
    with pytest.raises(ValueError, match="chunk_size must be >= 1"):
        linear_cross_entropy(x, weight, labels, chunk_size=0)
    with pytest.raises(ValueError, match="unknown implementation"):
        linear_cross_entropy(x, weight, labels, implementation="torch")
