"""The expert exchange: both ways, every shape of load, forward and gradients."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P

from exaone_jax.model.moe import ExpertWeights, Routing, expert_mlp, weighted_sum
from exaone_jax.parallel import MeshShape, exchange, make_mesh
from exaone_jax.parallel.gather import Parts
from tests.parallel.small_model import CONFIG, on_mesh

DEVICES, EXPERTS, SIZE, WIDTH, K = 4, 8, 16, 12, 3


def weights() -> ExpertWeights:
    keys = jax.random.split(jax.random.key(1), 3)
    shapes = (EXPERTS, WIDTH, SIZE), (EXPERTS, WIDTH, SIZE), (EXPERTS, SIZE, WIDTH)
    return ExpertWeights(*(jax.random.normal(key, shape) for key, shape in zip(keys, shapes, strict=True)))


def routing(load: str, count: int) -> Routing:
    """even: any experts. one: every token chooses the same three, of two devices. own: those of a single device."""
    random = np.random.default_rng(2)
    if load == "even":
        experts = np.stack([random.choice(EXPERTS, K, replace=False) for _ in range(count)])
    else:
        experts = np.tile({"one": [5, 6, 4], "own": [3, 2, 7]}[load], (count, 1))
    return Routing(
        jnp.asarray(experts, jnp.int32),
        jnp.asarray(random.random((count, K)), jnp.float32),
        jnp.zeros((count, EXPERTS)),
    )


def expected(tokens, choice: Routing, w: ExpertWeights, limit):
    """Every expert answers every token."""
    sizes = jnp.full((1,), len(tokens), jnp.int32)
    answers = jnp.stack(
        [expert_mlp(ExpertWeights(*(a[e : e + 1] for a in w)), tokens, sizes, limit) for e in range(EXPERTS)]
    )
    chosen = answers[choice.experts, jnp.arange(len(tokens))[:, None]]
    return weighted_sum(chosen, choice.weights)


def exchanged(tokens, choice, w, limit, split: bool):
    mesh = make_mesh(MeshShape(expert=DEVICES), jax.devices()[:DEVICES])
    rows = P("expert") if split else P()
    layout = exchange.Layout("expert", limit, (Parts((), 2), Parts((), 2), Parts((), 1)))
    run = partial(exchange.exchange, layout=layout, tokens_are_split=split)
    return jax.shard_map(run, mesh=mesh, in_specs=(rows, rows, P("expert")), out_specs=rows, check_vma=False)(
        tokens, choice, w
    )


@pytest.mark.parametrize("limit", [None, 0.5])
@pytest.mark.parametrize("load", ["even", "one", "own"])
@pytest.mark.parametrize("way", ["gather", "all_to_all", "rounds", "uneven rounds", "whole"])
def test_answers_and_gradients(monkeypatch, way: str, load: str, limit: float | None):
    monkeypatch.setattr(exchange, "GATHER_UP_TO", 1 << 30 if way in ("gather", "whole") else 0)
    count = 44 if way == "uneven rounds" else 40
    if "rounds" in way:
        monkeypatch.setattr(exchange, "ROUND_BYTES", 2000)  # 10 tokens in five rounds of 2; 11 in three: 4, 4, 3
    tokens, choice = jax.random.normal(jax.random.key(0), (count, SIZE)), routing(load, count)
    target = jax.random.normal(jax.random.key(3), (count, SIZE))

    def objective(run, tokens, mix, w):
        return jnp.sum(run(tokens, choice._replace(weights=mix), w, limit) * target)

    arguments = (tokens, choice.weights, weights())
    ours = jax.jit(jax.value_and_grad(partial(objective, partial(exchanged, split=way != "whole")), argnums=(0, 1, 2)))
    theirs = jax.jit(jax.value_and_grad(partial(objective, expected), argnums=(0, 1, 2)))
    for mine, other in zip(jax.tree.leaves(ours(*arguments)), jax.tree.leaves(theirs(*arguments)), strict=True):
        np.testing.assert_allclose(mine, other, rtol=2e-5, atol=2e-5 * np.abs(other).max())  # sums of 16 in float32


def test_both_ways_agree_bit_for_bit(monkeypatch):
    """So a step of many tokens (verifying drafts) says what steps of few (decoding) say.

    Whole numbers, and a down projection that picks one hidden unit for each output, leave the products nothing to round;
    the sum over a token's experts, whose weights are not whole, does round."""
    random = np.random.default_rng(0)
    tokens = jnp.asarray(random.integers(-3, 4, (40, SIZE)), jnp.float32)
    up, gate = (jnp.asarray(random.integers(-2, 3, (EXPERTS, WIDTH, SIZE)), jnp.float32) for _ in range(2))
    down = jax.nn.one_hot(random.integers(0, WIDTH, (EXPERTS, SIZE)), WIDTH)
    choice, results = routing("even", 40), []
    for limit in (0, 1 << 30):
        monkeypatch.setattr(exchange, "GATHER_UP_TO", limit)
        results.append(np.asarray(exchanged(tokens, choice, ExpertWeights(gate, up, down), None, True)))
    np.testing.assert_array_equal(*results)


def test_nothing_is_dropped_and_nothing_leaks(monkeypatch):
    """A NaN token reaches its own answer and no other, whichever device it visits."""
    for limit in (0, 1 << 30):
        monkeypatch.setattr(exchange, "GATHER_UP_TO", limit)
        tokens = jnp.ones((40, SIZE)).at[7].set(jnp.nan)
        out = np.asarray(exchanged(tokens, routing("one", 40), weights(), None, True))
        assert np.isnan(out[7]).all()
        assert np.isfinite(np.delete(out, 7, axis=0)).all()


@pytest.mark.parametrize(("kind", "ragged"), [("TPU v5 lite", False), ("TPU v6 lite", True)])
def test_a_chip_without_the_ragged_exchange_gathers(monkeypatch: pytest.MonkeyPatch, kind: str, ragged: bool):
    monkeypatch.setattr(exchange, "device_kind", lambda: kind)
    tokens = jnp.ones((4 * 80, SIZE))
    step = jax.jit(partial(exchanged, split=True), static_argnums=3)
    text = (
        step.trace(tokens, routing("even", len(tokens)), weights(), None).lower(lowering_platforms=("tpu",)).as_text()
    )
    assert ("ragged_all_to_all" in text) is ragged


def test_the_shared_expert_does_not_wait_for_the_exchange():
    """Nor the exchange for it: neither is among what the other is made of, so a scheduler may run both at once."""
    model = on_mesh("data=2,expert=4")
    graphdef, params = nnx.split(model.segments[0][1].moe)
    x, real = jnp.zeros((8, 128, CONFIG.hidden_size)), jnp.ones((8, 128), bool)

    def answer(params, x, real):
        layer = jax.tree.map(lambda leaf: leaf[0], params)
        return nnx.merge(graphdef, layer)(x, real, model.placement)[0]

    jaxpr = jax.make_jaxpr(answer)(params, x, real).jaxpr
    makers = {out: eqn for eqn in jaxpr.eqns for out in eqn.outvars}

    def behind(var) -> list:
        eqn = makers.get(var) if isinstance(var, jax.extend.core.Var) else None
        return [] if eqn is None else [eqn, *(each for source in eqn.invars for each in behind(source))]

    both = makers[jaxpr.outvars[0]]
    assert both.primitive.name == "add"
    routed, shared = map(behind, both.invars)
    assert any("ragged_all_to_all" in str(eqn) for eqn in routed)
    assert not any("shard_map" in eqn.primitive.name for eqn in shared)
    assert not {id(eqn) for eqn in routed if eqn.invars} & {id(eqn) for eqn in shared if "dot" in str(eqn)}
    assert sum("dot_general" in str(eqn) for eqn in shared) == 3  # gate, up, down
