"""The ragged step: many sequences on one token axis, in any pieces, say what each says alone over the whole sequence."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from exaone_jax.model import Rows, Transformer
from exaone_jax.model.paged import groups, quantized
from exaone_jax.model.placement import OneDevice
from exaone_jax.model.relayout import with_layers
from exaone_jax.parallel import MeshShape, make_mesh
from exaone_jax.parallel.placement import place
from tests.inference.small_models import EXAONE_4_5, K_EXAONE, K_EXAONE_2, WITH_MTP, make, padded_logits, prompts

PAGE, PAGES, ROWS = 4, 40, 16
LENGTHS = (37, 11, 22)
PROMPTS = prompts(LENGTHS)
# float32 through a few small layers, logits of about 10; sums in another order.
CLOSE = {"rtol": 1e-4, "atol": 1e-4}


def tables_of(model: Transformer, count: int, *, narrow: bool) -> tuple[jax.Array, ...]:
    """For each window: `count` sequences with shuffled pages of their own; `narrow` tables of windows wrap like rings."""
    order, tables = np.random.default_rng(0).permutation(PAGES), []
    for window in groups(model.config, mtp=True):
        width = -(-(window - 1 + ROWS) // PAGE) if window is not None and narrow else PAGES // count
        tables.append(jnp.asarray(order[: count * width].reshape(count, width), jnp.int32))
    return tuple(tables)


def run(
    model: Transformer, pieces: list[list[int]], *, narrow: bool = False, mtp: bool = False, dtype: str | None = None
) -> list[np.ndarray]:
    """Logits `[T, V]` of every prompt, whose tokens go in by pieces[step][sequence]; those of the MTP layer with `mtp`."""
    windows = tuple(groups(model.config, mtp=True))
    tables = tables_of(model, len(PROMPTS), narrow=narrow)
    graphdef, weights = nnx.split(model)
    cache = model.init_paged_cache(dict.fromkeys(windows, PAGES), PAGE, mtp=True, dtype=dtype)
    # What nobody wrote is never looked at.
    cache = jax.tree.map(lambda x: jnp.full_like(x, 127 if x.dtype == jnp.int8 else jnp.nan), cache)

    @jax.jit
    def step(weights, tokens, following, cache, starts, first):
        merged = nnx.merge(graphdef, weights)
        rows = Rows.of(tables, windows, starts, first, ROWS)
        hidden, cache = merged.ragged_step(tokens, cache, rows)
        if mtp:
            hidden, cache = merged.mtp_ragged_step(hidden, following, cache, rows)
        return merged.logits(hidden), cache

    done, out = np.zeros(len(PROMPTS), np.int32), [[] for _ in PROMPTS]
    for counts in pieces:
        starts = np.cumsum([0, *counts]).astype(np.int32)
        tokens, following = np.zeros((2, ROWS), np.int32)
        for prompt, at, start, count in zip(PROMPTS, done, starts, counts, strict=False):
            tokens[start : start + count] = prompt[at : at + count]
            following[start : start + count] = [*prompt, 0][at + 1 : at + count + 1]
        logits, cache = step(weights, tokens, following, cache, starts, done.copy())
        for row, start, count in zip(out, starts, counts, strict=False):
            row.append(np.asarray(logits[start : start + count]))
        done += np.array(counts, np.int32)
    assert done.tolist() == list(LENGTHS)
    return [np.concatenate(row) for row in out]


# Chunks, single tokens and nothing at all, side by side; rows are left over in most steps.
MIXED = [[7, 1, 8], [5, 0, 11], [1, 1, 1], [9, 4, 1], [15, 1, 0], [0, 4, 1]]


def expected(model: Transformer) -> list[np.ndarray]:
    logits = padded_logits(model, PROMPTS, max(LENGTHS))
    return [row[:length] for row, length in zip(logits, LENGTHS, strict=True)]


@pytest.mark.parametrize("narrow", [False, True], ids=["wide", "narrow"])
@pytest.mark.parametrize("name", WITH_MTP)
def test_pieces_are_the_whole(name: str, narrow: bool):
    model = make(WITH_MTP[name])
    for found, row in zip(run(model, MIXED, narrow=narrow), expected(model), strict=True):
        np.testing.assert_allclose(found, row, **CLOSE)


def test_scanned_and_unrolled_layers_are_the_same():
    layers = (K_EXAONE.layers[0], K_EXAONE.layers[2].model_copy(update={"moe": False})) * 3
    model = make(K_EXAONE.model_copy(update={"layers": layers}))
    assert [segment.repeats for segment in model.plan] == [3]
    for found, row, flat in zip(
        run(model, MIXED), expected(model), run(with_layers(model, scan=False), MIXED), strict=True
    ):
        np.testing.assert_allclose(found, row, **CLOSE)
        np.testing.assert_allclose(found, flat, **CLOSE)


@pytest.mark.parametrize("config", [K_EXAONE, K_EXAONE_2], ids=["global", "window"])
def test_the_mtp_layer_reads_pieces_too(config):
    model = make(config)
    graphdef, weights = nnx.split(model)
    tokens = np.zeros((len(PROMPTS), max(LENGTHS) + 1), np.int32)
    for row, prompt in enumerate(PROMPTS):
        tokens[row, : len(prompt)] = prompt

    def whole(weights, tokens):
        merged = nnx.merge(graphdef, weights)
        return merged.logits(merged.mtp_forward(merged.forward(tokens[:, :-1]).hidden, tokens[:, 1:]))

    logits = np.asarray(jax.jit(whole)(weights, tokens))
    for found, row, length in zip(run(model, MIXED, mtp=True), logits, LENGTHS, strict=True):
        np.testing.assert_allclose(found, row[:length], **CLOSE)


def test_a_mesh_has_its_heads_of_every_page():
    mesh = make_mesh(MeshShape.parse("expert=2,tensor=2"), devices=jax.devices()[:4])
    alone = make(K_EXAONE)
    placement = place(K_EXAONE, mesh)
    model = Transformer(K_EXAONE, dtype=jnp.float32, rngs=nnx.Rngs(0), placement=placement)
    nnx.update(model, nnx.state(alone))
    for found, row in zip(run(model, MIXED), expected(alone), strict=True):
        np.testing.assert_allclose(found, row, **CLOSE)
    narrow = (np.concatenate(run(each, MIXED, dtype="int8")) for each in (model, alone))
    assert np.isclose(*narrow, **CLOSE).all(axis=1).mean() > 0.8


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rounding(OneDevice):
    """Attention over whole rows whose keys and values are rounded to 8 bits first."""

    dtype: str

    def attend(self, q, k, v, segment_ids, window):
        (k, k_scale), (v, v_scale) = (quantized(x, self.dtype) for x in (k, v))
        k, v = k.astype(jnp.float32) * k_scale[..., None], v.astype(jnp.float32) * v_scale[..., None]
        return super().attend(q, k, v, segment_ids, window)


@pytest.mark.parametrize("dtype", ["int8", "float8_e4m3fn"])
@pytest.mark.parametrize("name", ["k-exaone", "4.5"])
def test_pages_in_8_bits_round_keys_and_values_and_nothing_else(name: str, dtype: str):
    model = make(WITH_MTP[name])
    rounding = Transformer(model.config, dtype=jnp.float32, rngs=nnx.Rngs(0), placement=Rounding(dtype=dtype))
    nnx.update(rounding, nnx.state(model))
    found, rounded, exact = (
        np.concatenate(rows)
        for rows in (run(model, MIXED, narrow=True, dtype=dtype), expected(rounding), expected(model))
    )
    assert 1e-3 < np.median(np.abs(found - exact)) < 0.1
    # What lies on the edge of two steps falls to either side, and later rows look at it.
    same = np.isclose(found, rounded, **CLOSE).all(axis=1)
    assert same.mean() > 0.8, same


@pytest.mark.parametrize(("dtype", "most", "half_step"), [("int8", 127, 1 / 254), ("float8_e4m3fn", 448, 1 / 16)])
def test_rounding_to_8_bits(dtype: str, most: int, half_step: float):
    """Half a step of the greatest magnitude; of every magnitude in floating point; zeros and what is not finite stay."""
    x = np.random.default_rng(0).standard_normal((50, 64)).astype(np.float32) * 10.0 ** np.arange(-25, 25)[:, None]
    small, scale = (np.asarray(a, np.float32) for a in quantized(jnp.asarray(x), dtype))
    error = np.abs(small * scale[:, None] - x)
    step = np.abs(x).max(axis=1, keepdims=True) if dtype == "int8" else np.maximum(np.abs(x), 2.0**-6 * scale[:, None])
    assert (error <= 1.001 * half_step * step).all()
    assert (np.abs(small).max(axis=1) == most).all()
    odd = jnp.asarray([[0.0, 0.0], [1.0, jnp.nan], [jnp.inf, 1.0]])
    small, scale = quantized(odd, dtype)
    back = np.asarray(small.astype(jnp.float32) * scale[:, None])
    assert (back[0] == 0).all()
    assert not np.isfinite(back[1:]).all(axis=1).any()


def test_groups():
    assert groups(K_EXAONE, mtp=True) == {None: 2, 4: 2}
    assert groups(K_EXAONE, mtp=False) == {None: 1, 4: 2}
    assert groups(K_EXAONE_2, mtp=True) == {None: 1, 3: 2, 6: 1}
    assert groups(EXAONE_4_5, mtp=True) == {None: 2, 5: 3}


def test_an_mtp_layer_without_pages_is_refused():
    model = make(K_EXAONE)
    cache = model.init_paged_cache({None: 2, 4: 2}, PAGE, mtp=False)
    rows = Rows.of(tables_of(model, 1, narrow=False), (None, 4), jnp.array([0, 1]), jnp.array([0]), 1)
    with pytest.raises(ValueError, match="without pages of the MTP layer"):
        model.mtp_ragged_step(jnp.zeros((1, 32)), jnp.zeros(1, jnp.int32), cache, rows)
