"""The cache: rings of the window's size, forgetting that leaves no trace, and what it weighs."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from exaone_jax.config.hf import published, read_config
from exaone_jax.config.model import LayerSpec
from exaone_jax.model import KVCache, Transformer
from exaone_jax.model.cache import slots
from tests.inference.small_models import K_EXAONE, K_EXAONE_2, VOCAB, make

CHUNK, CAPACITY = 6, 80


@pytest.fixture(scope="module")
def model() -> Transformer:
    return make(K_EXAONE_2)


@pytest.fixture(scope="module")
def step(model: Transformer):
    """(tokens `[B, C]`, cache, valid) -> (logits `[B, C, V]`, cache)."""
    graphdef, weights = nnx.split(model)

    @jax.jit
    def step(weights: nnx.State, tokens: jax.Array, cache: KVCache, valid: jax.Array):
        merged = nnx.merge(graphdef, weights)
        hidden, cache = merged.step(tokens, cache, valid)
        return merged.logits(hidden), cache

    return partial(step, weights)


def test_slots():
    window = LayerSpec(window=128)
    assert slots(LayerSpec(), 4096, 512) == 4096
    assert slots(window, 4096, 512) == 127 + 512
    assert slots(window, 4096, 1) == 128
    assert slots(window, 300, 512) == 300, "never more than the context"


def test_window_layers_hold_a_ring_and_global_layers_the_context(model: Transformer):
    cache = model.init_cache(3, CAPACITY, CHUNK)
    shapes = [layer.k.shape for segment in cache.layers for layer in segment]
    sizes = [CAPACITY if spec.window is None else spec.window - 1 + CHUNK for spec in K_EXAONE_2.layers]
    assert shapes == [(1, 3, K_EXAONE_2.num_kv_heads, size, K_EXAONE_2.head_dim) for size in sizes]
    mtp = model.init_mtp_cache(3, CAPACITY, CHUNK)
    assert mtp.layers[0][0].v.shape[3] == K_EXAONE_2.mtp_layer.window - 1 + CHUNK


def test_kv_bytes_of_k_exaone():
    """48 layers of which 12 are global; 8 key/value heads of 128, keys and values, 2 bytes."""
    config = read_config(published("K-EXAONE-236B-A23B"))
    batch, capacity, chunk = 4, 262_144, 512
    model = nnx.eval_shape(lambda: Transformer(config, dtype=jnp.bfloat16, rngs=nnx.Rngs(0)))
    cache = jax.eval_shape(lambda: model.init_cache(batch, capacity, chunk))
    found = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(cache.layers))
    a_slot = 2 * 8 * 128 * 2
    assert found == batch * a_slot * (12 * capacity + 36 * (128 - 1 + chunk))
    assert found < 0.26 * batch * a_slot * 48 * capacity, "a quarter of what the whole context would take"


def test_the_cache_has_the_dtype_of_the_activations():
    cache = make(K_EXAONE, dtype=jnp.bfloat16).init_cache(1, 16, 4)
    assert {leaf.dtype for leaf in jax.tree.leaves(cache.layers)} == {jnp.dtype(jnp.bfloat16)}
    assert cache.lengths.dtype == jnp.int32


def test_forgotten_tokens_leave_no_trace(step, model: Transformer):
    """Along a text whose rings go round many times: guess, forget some or all of it, go on. As if never guessed.

    Rows forget different amounts. What is compared is computed from other slot contents, so equal bits show that no
    forgotten slot is read: a slot that is masked adds an exact zero.
    """
    rng = np.random.default_rng(0)
    truth = rng.integers(0, VOCAB, (2, CAPACITY)).astype(np.int32)
    clean, guessed = (model.init_cache(2, CAPACITY, CHUNK) for _ in range(2))
    at = np.zeros(2, np.int32)
    row = np.arange(2)[:, None]
    while at.max() + 2 * CHUNK < CAPACITY:
        count = rng.integers(1, CHUNK + 1, 2).astype(np.int32)
        kept = np.array([rng.integers(0, n + 1) for n in count], np.int32)
        block = truth[row, at[:, None] + np.arange(CHUNK)]
        guess = np.where(np.arange(CHUNK) < kept[:, None], block, (block + 7) % VOCAB)
        _, guessed = step(guess, guessed, count)
        guessed = guessed.rolled_back(jnp.asarray(at + kept))
        _, clean = step(block, clean, kept)
        at = at + kept
        expected, after_clean = step(block[:, -1:].repeat(CHUNK, 1), clean, np.ones(2, np.int32))
        found, after_guess = step(block[:, -1:].repeat(CHUNK, 1), guessed, np.ones(2, np.int32))
        np.testing.assert_array_equal(found[:, 0], expected[:, 0])
        np.testing.assert_array_equal(after_guess.lengths, after_clean.lengths)
    assert at.min() > 3 * (K_EXAONE_2.layers[1].window - 1 + CHUNK), "the rings went round"


def test_a_ring_smaller_by_one_would_lose_a_key(step, model: Transformer):
    """The size is needed: with one slot less a full chunk overwrites the oldest key of its first query's window."""
    tokens = np.random.default_rng(1).integers(0, VOCAB, (2, 6 * CHUNK)).astype(np.int32)
    exact = np.asarray(model(tokens))

    def read(cache: KVCache) -> np.ndarray:
        out = []
        for start in range(0, tokens.shape[1], CHUNK):
            logits, cache = step(tokens[:, start : start + CHUNK], cache, np.full(2, CHUNK, np.int32))
            out.append(logits)
        return np.concatenate(out, axis=1)

    assert np.abs(read(model.init_cache(2, CAPACITY, CHUNK)) - exact).max() < 1e-4  # rounding of float32 gives 1e-5
    assert np.abs(read(model.init_cache(2, CAPACITY, CHUNK - 1)) - exact).max() > 1e-2


def test_a_row_without_tokens_stays_as_it_is(step, model: Transformer):
    tokens = np.random.default_rng(2).integers(0, VOCAB, (2, CHUNK)).astype(np.int32)
    _, before = step(tokens, model.init_cache(2, CAPACITY, CHUNK), np.array([4, 0], np.int32))
    logits, after = step(tokens, before, np.array([0, 3], np.int32))
    np.testing.assert_array_equal(after.lengths, [4, 3])
    for old, new in zip(jax.tree.leaves(before.layers), jax.tree.leaves(after.layers), strict=True):
        np.testing.assert_array_equal(old[:, 0], new[:, 0])
    assert np.isfinite(logits).all()
