"""Properties of the model that hold for every configuration: one reading, however the tokens are handed over."""

import itertools
from collections.abc import Iterator
from functools import partial

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from exaone_jax.config.model import LayerSpec, Llama3RopeScaling, ModelConfig, MoEConfig
from exaone_jax.errors import InputError
from exaone_jax.model import Transformer
from pallas_kernels.attention import attention
from tests.inference.small_models import EXAONE_4_5, K_EXAONE, make

LENGTH, VOCAB, CHUNK = 40, 23, 20
# float32 rounds to 6e-8; sums of up to 128 terms in another order, through four layers whose activations reach 10, give
# differences of 1e-5 in logits of size 1 to 5. What these tests look for (a key too many, a position off) gives 0.01 up.
TOLERANCE = 2e-4


SPECS = st.builds(
    LayerSpec,
    window=st.sampled_from([None, 1, 2, 5, 7, LENGTH - 1, LENGTH + 9]),
    rope=st.booleans(),
    norm=st.sampled_from(["pre", "post"]),
    qk_norm=st.booleans(),
    moe=st.booleans(),
    swiglu_limit=st.sampled_from([None, 0.4]),
)
EXPERTS = st.builds(
    lambda sizes, **fields: MoEConfig(**sizes, **fields),
    st.sampled_from(
        [
            {"num_experts": 4, "num_experts_per_tok": 2},
            {"num_experts": 8, "num_experts_per_tok": 3, "n_group": 4, "topk_group": 2},
            {"num_experts": 3, "num_experts_per_tok": 1},
        ]
    ),
    num_shared_experts=st.integers(0, 2),
    intermediate_size=st.just(8),
    norm_topk_prob=st.booleans(),
    routed_scaling_factor=st.sampled_from([1.0, 2.5]),
)


@st.composite
def configs(draw: st.DrawFn) -> ModelConfig:
    heads, kv_heads = draw(st.sampled_from([(1, 1), (2, 1), (4, 2), (3, 3)]))
    pattern = draw(st.lists(SPECS, min_size=1, max_size=2))
    scaling = Llama3RopeScaling(factor=8, low_freq_factor=1, high_freq_factor=4, original_max_position_embeddings=16)
    return ModelConfig(
        model_type="exaone_moe",
        vocab_size=VOCAB,
        hidden_size=24,
        intermediate_size=16,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=draw(st.sampled_from([64, 80, 128])),
        layers=tuple(pattern) * draw(st.integers(1, 2)),  # twice: scanned
        moe=draw(EXPERTS),
        rope_scaling=draw(st.sampled_from([None, scaling])),
        rope_theta=draw(st.sampled_from([1e4, 1e6])),
        tie_word_embeddings=draw(st.booleans()),
        max_position_embeddings=128,
        initializer_range=0.15,
    )


class Compiled:
    """One model, read whole or by steps; few shapes, so that little is compiled."""

    def __init__(self, model: Transformer):
        self.model = model
        self.graphdef, self.weights = nnx.split(model)
        self._whole = jax.jit(partial(_whole, self.graphdef))
        self._step = jax.jit(partial(_step, self.graphdef))

    def whole(self, tokens: np.ndarray, segment_ids: np.ndarray | None = None) -> np.ndarray:
        """Logits `[B, T, V]`; positions count from 0 in each segment."""
        segment_ids = np.ones_like(tokens) if segment_ids is None else segment_ids
        return np.asarray(self._whole(self.weights, tokens, segment_ids))

    def stepwise(self, tokens: np.ndarray, plan: list[tuple[int, tuple[int, ...]]]) -> np.ndarray:
        """Logits `[B, T, V]` through the cache. plan: for each step its width and how many tokens each row takes."""
        cache = self.model.init_cache(len(tokens), tokens.shape[1], CHUNK)
        done, out = np.zeros(len(tokens), np.int64), np.zeros((*tokens.shape, VOCAB), np.float32)
        for width, takes in plan:
            block = np.stack([np.resize(row[at : at + width], width) for row, at in zip(tokens, done, strict=True)])
            logits, cache = self._step(self.weights, block, cache, np.array(takes, np.int32))
            for row, (at, count) in enumerate(zip(done, takes, strict=True)):
                out[row, at : at + count] = logits[row, :count]
            done += takes
        assert (done == tokens.shape[1]).all()
        return out


def _whole(graphdef: nnx.GraphDef, weights: nnx.State, tokens: jax.Array, segment_ids: jax.Array) -> jax.Array:
    model = nnx.merge(graphdef, weights)
    return model.logits(model.forward(tokens, segment_ids=segment_ids).hidden)


def _step(graphdef: nnx.GraphDef, weights: nnx.State, tokens: jax.Array, cache, valid: jax.Array):
    model = nnx.merge(graphdef, weights)
    hidden, cache = model.step(tokens, cache, valid)
    return model.logits(hidden), cache


def random_plan(rng: np.random.Generator, width: int) -> list[tuple[int, tuple[int, ...]]]:
    """Two rows go through LENGTH tokens at their own pace: chunks of up to CHUNK, then steps of up to `width`."""
    left, plan = np.full(2, LENGTH), []
    chunks = rng.integers(1, 4)
    while left.any():
        size = CHUNK if len(plan) < chunks else width
        takes = np.minimum(rng.integers(0 if size > 1 else 1, size + 1, 2), left)
        plan.append((size, tuple(takes.tolist())))
        left = left - takes
    return plan


def close(found: np.ndarray, expected: np.ndarray) -> None:
    np.testing.assert_allclose(found, expected, atol=TOLERANCE, rtol=TOLERANCE)


# No shrinking: it would compile hundreds of models, and the first example found is small already.
@settings(max_examples=8, phases=[Phase.explicit, Phase.generate])
@given(config=configs(), seed=st.integers(0, 99), width=st.sampled_from([1, 3]))
def test_there_is_one_reading(config: ModelConfig, seed: int, width: int):
    rng = np.random.default_rng(seed)
    model = Compiled(make(config, seed))
    tokens = rng.integers(0, VOCAB, (2, LENGTH)).astype(np.int32)
    alone = model.whole(tokens)
    assert np.isfinite(alone).all()

    # Prefill in any split, rows at their own pace, then decoding: the same as one shot.
    close(model.stepwise(tokens, random_plan(rng, width)), alone)

    # Two documents packed in one row, and a row that is padded on the left, read as they do alone.
    cut, padding = rng.integers(1, LENGTH, 2)
    packed = np.concatenate([tokens[0, :cut], tokens[1, : LENGTH - cut]])
    padded = np.concatenate([np.zeros(padding, np.int32), tokens[1, : LENGTH - padding]])
    segment_ids = np.stack([np.where(np.arange(LENGTH) < cut, 1, 2), np.arange(LENGTH) >= padding]).astype(np.int32)
    together = model.whole(np.stack([packed, padded]), segment_ids)
    close(together[0, :cut], alone[0, :cut])
    close(together[0, cut:], alone[1, : LENGTH - cut])
    close(together[1, padding:], alone[1, : LENGTH - padding])

    # A later token changes nothing before it, and something from there on.
    place = rng.integers(1, LENGTH)
    changed = tokens.copy()
    changed[:, place] = (changed[:, place] + 1) % VOCAB
    after = model.whole(changed)
    close(after[:, :place], alone[:, :place])
    assert (np.abs(after[:, place] - alone[:, place]).max(axis=-1) > 10 * TOLERANCE).all()


@pytest.mark.parametrize("config", [K_EXAONE, EXAONE_4_5], ids=["k-exaone", "4.5"])
def test_bfloat16_is_near_float32(config: ModelConfig):
    """bfloat16 keeps 8 bits: a rounding is up to 0.4 %, and some twenty of them stand one after another.

    Rounding may also send a token to another expert, so the bound is on the typical difference, not the largest.
    """
    tokens = np.random.default_rng(0).integers(0, config.vocab_size, (2, LENGTH))
    exact = np.asarray(make(config)(tokens))
    model = make(config, dtype=jnp.bfloat16)
    rounded = np.asarray(model(tokens))
    assert rounded.dtype == np.float32
    assert np.isfinite(rounded).all()
    assert np.median(np.abs(rounded - exact)) < 0.03 * exact.std()
    assert np.abs(rounded - exact).max() > 0, "it did compute in bfloat16"


def test_a_batch_of_segments_has_the_positions_it_is_given():
    """Positions that are passed replace those that are counted: shifting a NoPE-free row by a constant changes nothing
    (rotation is relative), spreading it does."""
    model = make(EXAONE_4_5.model_copy(update={"rope_scaling": None, "layers": (LayerSpec(), LayerSpec(window=5))}))
    tokens = np.random.default_rng(0).integers(0, EXAONE_4_5.vocab_size, (2, LENGTH))
    counted = jnp.broadcast_to(jnp.arange(LENGTH), tokens.shape)
    exact = np.asarray(model(tokens))
    close(np.asarray(model(tokens, positions=counted)), exact)
    close(np.asarray(model(tokens, positions=counted + 5)), exact)
    assert np.abs(np.asarray(model(tokens, positions=counted * 2)) - exact).max() > 0.01


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        ([1, 2], r"\[B, T\]"),
        (np.zeros((0, 3), int), r"\[B, T\]"),
        (np.zeros((1, 0), int), r"\[B, T\]"),
        ([[0.5]], "integers"),
        ([[0, 40]], r"\[0, 40\)"),
        ([[-1]], "found -1"),
    ],
)
def test_tokens_are_checked(tokens, message: str):
    with pytest.raises(InputError, match=message):
        make(K_EXAONE)(tokens)


# What a window costs. XLA's own cost analysis counts the body of a loop once, however often it runs, and would call full
# attention linear too; so the products are counted in the traced program, times the lengths of the loops around them.


class Unbounded(Exception):
    """A loop whose length is known only as it runs."""


def product_flops(jaxpr: jax.extend.core.Jaxpr) -> int:
    """Multiply-adds, times two, of every matrix product; of the branches of a condition the dearest."""
    total = 0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            lhs, out = equation.invars[0].aval.shape, equation.outvars[0].aval.shape
            total += 2 * int(np.prod(out)) * int(np.prod([lhs[axis] for axis in contracted]))
            continue
        inner = [product_flops(sub) for sub in _inner(equation)]
        if equation.primitive.name == "while" and any(inner):
            raise Unbounded
        repeats = equation.params["length"] if equation.primitive.name == "scan" else 1
        total += repeats * (max(inner, default=0) if equation.primitive.name == "cond" else sum(inner))
    return total


def _inner(equation: jax.extend.core.JaxprEqn) -> Iterator[jax.extend.core.Jaxpr]:
    for value in jax.tree.leaves(list(equation.params.values()), is_leaf=_is_jaxpr):
        if _is_jaxpr(value):
            yield getattr(value, "jaxpr", value)


def _is_jaxpr(value: object) -> bool:
    return isinstance(value, jax.extend.core.Jaxpr | jax.extend.core.ClosedJaxpr)


def flops_of(function, *args) -> int:
    return product_flops(jax.make_jaxpr(function)(*args).jaxpr)


WINDOWED = K_EXAONE.model_copy(update={"layers": (LayerSpec(window=16),) * 3, "mtp_layer": None, "head_dim": 64})


def test_window_layers_cost_the_same_for_every_token():
    """O(T W), not O(T^2), over whole sequences: counted, and as XLA compiles it."""
    graphdef, weights = nnx.split(make(WINDOWED))

    def forward(weights: nnx.State, tokens: jax.Array) -> jax.Array:
        return nnx.merge(graphdef, weights).forward(tokens).hidden

    lengths = (256, 512, 1024, 2048)
    costs = [flops_of(forward, weights, jnp.zeros((1, length), jnp.int32)) for length in lengths]
    assert costs[0] > 0
    for shorter, longer in itertools.pairwise(costs):
        assert longer == pytest.approx(2 * shorter, rel=0.02)  # but for the last block's rounding up
    compiled = [
        jax.jit(forward).lower(weights, jnp.zeros((1, length), jnp.int32)).compile().cost_analysis()["flops"]
        for length in lengths[1:3]
    ]
    assert compiled[1] < 2.05 * compiled[0]


def test_window_layers_cost_the_same_wherever_a_chunk_stands():
    """Prefill and decode through the cache: the ring bounds them, not the context."""
    model = make(WINDOWED)
    graphdef, weights = nnx.split(model)

    def step(weights: nnx.State, tokens: jax.Array, cache) -> jax.Array:
        return nnx.merge(graphdef, weights).step(tokens, cache)[0]

    for width in (1, 64):
        costs = {
            flops_of(step, weights, jnp.zeros((2, width), jnp.int32), model.init_cache(2, capacity, 64))
            for capacity in (128, 1024, 8192)
        }
        assert len(costs) == 1


def test_the_count_sees_quadratic_attention():
    def cost(length: int, implementation: str) -> int:
        q = jnp.zeros((1, length, 2, 64))
        return flops_of(lambda q: attention(q, q, q, window=16, implementation=implementation), q)

    assert cost(1024, "reference") == pytest.approx(4 * cost(512, "reference"), rel=0.01)
    assert cost(1024, "xla") == pytest.approx(2 * cost(512, "xla"), rel=0.02)
    graphdef, weights = nnx.split(make(WINDOWED.model_copy(update={"layers": (LayerSpec(),)})))
    with pytest.raises(Unbounded):
        flops_of(lambda w, t: nnx.merge(graphdef, w).forward(t).hidden, weights, jnp.zeros((1, 2048), jnp.int32))
