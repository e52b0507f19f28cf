"""Scanned and unrolled layers are one model: the same logits, and the same weights there and back."""

import jax
import numpy as np
import pytest
from flax import nnx

from exaone_jax.config.model import ModelConfig
from exaone_jax.model import Transformer
from exaone_jax.model.relayout import with_layers
from tests.inference.small_models import EXAONE_4_5, K_EXAONE, VOCAB, make

_LOCAL, _SPARSE_LOCAL, _SPARSE_GLOBAL = K_EXAONE.layers
# As K-EXAONE: a dense layer that breaks the first pattern, then LLLG; as 4.5: one pattern throughout.
CONFIGS = {
    "k-exaone": K_EXAONE.model_copy(
        update={"layers": (_LOCAL, _SPARSE_LOCAL, _SPARSE_GLOBAL, *(_SPARSE_LOCAL, _SPARSE_GLOBAL) * 2)}
    ),
    "4.5": EXAONE_4_5,
}
TOKENS = np.random.default_rng(0).integers(0, VOCAB, (2, 24))


@pytest.fixture(scope="module", params=CONFIGS)
def scanned(request: pytest.FixtureRequest) -> Transformer:
    return make(CONFIGS[request.param])


@pytest.fixture(scope="module")
def unrolled(scanned: Transformer) -> Transformer:
    return with_layers(scanned, scan=False)


def weights(model: Transformer) -> dict[str, np.ndarray]:
    return {".".join(map(str, path)): np.asarray(leaf[...]) for path, leaf in nnx.to_flat_state(nnx.state(model))}


def layer_weights(model: Transformer) -> list[dict[str, np.ndarray]]:
    """Of every layer in order, by name inside the layer."""
    layers = []
    for s, segment in enumerate(model.plan):
        for repeat in range(segment.repeats):
            for p in range(len(segment.pattern)):
                prefix = f"segments.{s}.{p}."
                named = weights(model).items()
                layers.append({k.removeprefix(prefix): v[repeat] for k, v in named if k.startswith(prefix)})
    return layers


def test_the_plans_differ_and_the_logits_do_not(scanned: Transformer, unrolled: Transformer):
    layers = scanned.config.num_layers
    assert sum(segment.repeats * len(segment.pattern) for segment in scanned.plan) == layers
    assert max(segment.repeats for segment in scanned.plan) > 1
    assert [(len(segment.pattern), segment.repeats) for segment in unrolled.plan] == [(1, 1)] * layers
    # The same sums; XLA may fuse them otherwise, which costs roundings of 6e-8 on logits of size 1 to 10.
    np.testing.assert_allclose(unrolled(TOKENS), scanned(TOKENS), atol=1e-4)


def test_every_layer_has_its_weights(scanned: Transformer, unrolled: Transformer):
    for one, other in zip(layer_weights(scanned), layer_weights(unrolled), strict=True):
        assert one.keys() == other.keys()
        assert all(np.array_equal(one[name], other[name]) for name in one)
    outside = {name: value for name, value in weights(scanned).items() if not name.startswith("segments.")}
    assert any(name.startswith("mtp.") for name in outside)
    assert all(np.array_equal(weights(unrolled)[name], value) for name, value in outside.items())


def test_there_and_back_is_exact(scanned: Transformer, unrolled: Transformer):
    back = with_layers(unrolled, scan=True)
    assert back.plan == scanned.plan
    before, after = weights(scanned), weights(back)
    assert before.keys() == after.keys()
    assert all(np.array_equal(before[name], after[name]) for name in before)
    kinds, kinds_after = (jax.tree.map(lambda v: v.dtype, nnx.state(m)) for m in (scanned, back))
    assert jax.tree.leaves(kinds) == jax.tree.leaves(kinds_after)


def test_a_model_that_already_is_so_is_returned(scanned: Transformer, unrolled: Transformer):
    assert with_layers(scanned, scan=True) is scanned
    assert with_layers(unrolled, scan=False) is unrolled


def test_caches_serve_both(scanned: Transformer, unrolled: Transformer):
    logits = []
    for model in (scanned, unrolled):
        cache = model.init_cache(2, TOKENS.shape[1], TOKENS.shape[1])
        hidden, _ = nnx.jit(lambda m, t, c: m.step(t, c))(model, TOKENS, cache)
        logits.append(np.asarray(model.logits(hidden)))
    np.testing.assert_allclose(logits[0], logits[1], atol=1e-4)


@pytest.mark.parametrize("param_dtype", ["float32", "bfloat16"])
def test_dtypes_survive(param_dtype: str):
    """float32 weights under bfloat16 activations stay float32; the router bias always is."""
    config: ModelConfig = CONFIGS["k-exaone"]
    relaid = with_layers(make(config, dtype="bfloat16", param_dtype=param_dtype), scan=False)
    assert (relaid.dtype, relaid.config) == (np.dtype("bfloat16"), config)
    for name, value in weights(relaid).items():
        assert value.dtype == (np.float32 if name.endswith("router.bias") else np.dtype(param_dtype)), name
