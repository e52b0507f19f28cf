"""One step: gradients into parameters, loads into router biases, and the same bits each time."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from exaone_jax.config.model import ModelConfig
from exaone_jax.data import PackedRows
from exaone_jax.errors import InputError
from exaone_jax.model import Transformer
from exaone_jax.model.linear import RouterBias
from exaone_jax.training import LossConfig, Optimizer, adamw, evaluate, init_state, train_step, wsd
from exaone_jax.training.loss import total_loss
from exaone_jax.training.step import StepMetrics, TrainState

ADAMW = adamw(wsd(0.01, 60, warmup=5, decay=10))


def take(config: ModelConfig, batch: PackedRows, steps: int) -> tuple[TrainState, list[StepMetrics]]:
    graphdef, state = init_state(Transformer(config, rngs=nnx.Rngs(0)), ADAMW)
    metrics = []
    for _ in range(steps):
        state, report = train_step(graphdef, state, batch, optimizer=ADAMW, loss=LossConfig())
        metrics.append(report)
    return state, metrics


def test_a_step_of_plain_descent_subtracts_the_gradient(model: Transformer, batch: PackedRows) -> None:
    graphdef, params, biases = nnx.split(model, nnx.Param, RouterBias)
    grads = jax.jit(jax.grad(lambda p: total_loss(nnx.merge(graphdef, p, biases), batch, LossConfig())[0]))(params)
    expected = jax.tree.map(lambda p, g: np.asarray(p - 0.5 * g), params, grads)
    descent = Optimizer(optax.sgd(0.5), lambda step: 0.5)
    graphdef, state = init_state(model, descent)
    state, metrics = train_step(graphdef, state, batch, optimizer=descent, loss=LossConfig())
    for want, got in zip(jax.tree.leaves(expected), jax.tree.leaves(state.params), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)  # one program fused otherwise than two
    norm = np.sqrt(sum(float(jnp.sum(jnp.square(g))) for g in jax.tree.leaves(grads)))
    np.testing.assert_allclose(metrics.grad_norm, norm, rtol=1e-5)
    assert metrics.learning_rate == 0.5
    assert state.step == 1


def test_router_biases_move_by_the_sign_of_the_missing_load(model: Transformer, batch: PackedRows) -> None:
    graphdef, state = init_state(model, ADAMW)
    before = [np.asarray(x) for x in jax.tree.leaves(state.router_biases)]
    state, metrics = train_step(graphdef, state, batch, optimizer=ADAMW, loss=LossConfig(), router_bias_rate=0.25)
    moved = {}
    for (_, segment, place, *_), bias in nnx.to_flat_state(state.router_biases):
        assert bias[...].dtype == jnp.float32
        for repeat, row in enumerate(np.asarray(bias[...])):
            moved[segment, repeat, place] = row
    load = np.asarray(metrics.loss.expert_load)
    in_layer_order = np.stack([moved[key] for key in sorted(moved)])
    np.testing.assert_array_equal(in_layer_order, 0.25 * np.sign(load.mean(axis=1, keepdims=True) - load))
    assert all((x == 0).all() for x in before)
    assert len(np.unique(in_layer_order)) > 1


def test_an_overloaded_expert_is_chosen_less(model: Transformer, batch: PackedRows) -> None:
    still = Optimizer(optax.sgd(0.0), lambda step: 0.0)
    graphdef, state = init_state(model, still)
    spread = []
    for _ in range(30):
        state, metrics = train_step(graphdef, state, batch, optimizer=still, loss=LossConfig(), router_bias_rate=0.02)
        spread.append(float(jnp.std(metrics.loss.expert_load)))
    assert np.mean(spread[-5:]) < 0.5 * spread[0]


def test_three_steps_repeat_bit_for_bit(config: ModelConfig, batch: PackedRows) -> None:
    (first, first_metrics), (second, second_metrics) = take(config, batch, 3), take(config, batch, 3)
    for one, other in zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True):
        assert np.asarray(one).tobytes() == np.asarray(other).tobytes()
    assert [float(m.loss.objective) for m in first_metrics] == [float(m.loss.objective) for m in second_metrics]


def test_a_small_batch_is_learnt_by_heart(config: ModelConfig, batch: PackedRows) -> None:
    _, metrics = take(config, batch, 60)
    assert metrics[-1].loss.loss < 0.2 * metrics[0].loss.loss
    assert metrics[-1].loss.mtp_loss < 0.5 * metrics[0].loss.mtp_loss


def test_bfloat16_compute_keeps_float32_parameters(config: ModelConfig, batch: PackedRows) -> None:
    model = Transformer(config, dtype=jnp.bfloat16, param_dtype=jnp.float32, rngs=nnx.Rngs(0))
    graphdef, state = init_state(model, ADAMW)
    for _ in range(30):
        state, metrics = train_step(graphdef, state, batch, optimizer=ADAMW, loss=LossConfig())
    assert {x.dtype for x in jax.tree.leaves(state.params)} == {jnp.dtype("float32")}
    assert metrics.loss.loss < 2.0  # from 5; float32 gets there too


def test_evaluation_weighs_tokens_and_not_batches(model: Transformer, batch: PackedRows) -> None:
    graphdef, state = init_state(model, ADAMW)
    halves = [PackedRows(batch.tokens[i : i + 2], batch.segment_ids[i : i + 2]) for i in (0, 2)]
    whole, parts = evaluate(graphdef, state, [batch]), evaluate(graphdef, state, halves)
    _, metrics = train_step(graphdef, state, batch, optimizer=ADAMW, loss=LossConfig())
    assert whole.tokens == parts.tokens == int(metrics.loss.tokens)
    # float32 sums in other orders
    np.testing.assert_allclose([whole.loss, parts.loss], float(metrics.loss.loss), rtol=1e-5)
    np.testing.assert_allclose([whole.mtp_loss, parts.mtp_loss], float(metrics.loss.mtp_loss), rtol=1e-5)


def test_evaluating_nothing_is_an_error(model: Transformer, batch: PackedRows) -> None:
    graphdef, state = init_state(model, ADAMW)
    with pytest.raises(InputError, match="batch"):
        evaluate(graphdef, state, [])
    with pytest.raises(InputError, match="two tokens"):
        evaluate(graphdef, state, [PackedRows(batch.tokens, np.zeros_like(batch.segment_ids))])
