"""One step of training, and evaluation, as pure functions of a TrainState."""

import dataclasses
from collections.abc import Iterable
from functools import partial
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from exaone_jax.data.packing import PackedRows
from exaone_jax.errors import InputError
from exaone_jax.model import Transformer
from exaone_jax.model.linear import RouterBias
from exaone_jax.model.stack import SegmentStats
from exaone_jax.training.loss import (
    LossConfig,
    LossMetrics,
    TokenLoss,
    has_mtp_loss,
    mtp_loss,
    targets,
    token_loss,
    total_loss,
)
from exaone_jax.training.optimizer import Optimizer

Graph = nnx.GraphDef[Transformer]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """All that a step changes. params and router_biases are states of the model; step int32, steps taken so far."""

    params: nnx.State
    router_biases: nnx.State
    opt_state: optax.OptState
    step: jax.Array


class StepMetrics(NamedTuple):
    """loss: LossMetrics. grad_norm: of the gradients before clipping. learning_rate: of this step. float32 scalars."""

    loss: LossMetrics
    grad_norm: jax.Array
    learning_rate: jax.Array


class Evaluation(NamedTuple):
    """Mean loss, nats a token, over `tokens` predicted tokens; mtp_loss is None where that layer is not trained."""

    loss: float
    tokens: int
    mtp_loss: float | None


def init_state(model: Transformer, optimizer: Optimizer) -> tuple[Graph, TrainState]:
    """The graph of `model`, static from here on, and the state of a run at step 0.

    The state holds the model's own arrays, which the first `train_step` takes over: do not use `model` after it.
    """
    graphdef, params, router_biases = nnx.split(model, nnx.Param, RouterBias)
    return graphdef, TrainState(params, router_biases, optimizer.transform.init(params), jnp.zeros((), jnp.int32))


def trained_model(graphdef: Graph, state: TrainState) -> Transformer:
    """The model with the state's arrays; they are shared, and a later `train_step` of this state takes them over."""
    return nnx.merge(graphdef, state.params, state.router_biases)


@partial(jax.jit, static_argnames=("graphdef", "optimizer", "loss", "router_bias_rate"), donate_argnames="state")
def train_step(
    graphdef: Graph,
    state: TrainState,
    batch: PackedRows,
    *,
    optimizer: Optimizer,
    loss: LossConfig,
    router_bias_rate: float = 1e-4,
) -> tuple[TrainState, StepMetrics]:
    """One optimizer step on a batch `[B, T]`. The state's buffers are donated.

    Gradients are of the Params only. Each router bias moves by `router_bias_rate` towards an even load, after the step.
    """

    def objective(params: nnx.State) -> tuple[jax.Array, tuple[LossMetrics, tuple[SegmentStats, ...]]]:
        return total_loss(nnx.merge(graphdef, params, state.router_biases), batch, loss)

    (_, (metrics, stats)), grads = jax.value_and_grad(objective, has_aux=True)(state.params)
    updates, opt_state = optimizer.transform.update(grads, state.opt_state, state.params)
    params = cast(nnx.State, optax.apply_updates(state.params, updates))
    router_biases = balanced(state.router_biases, stats, router_bias_rate)
    learning_rate = jnp.asarray(optimizer.schedule(state.step), jnp.float32)
    report = StepMetrics(metrics, optax.tree.norm(grads), learning_rate)
    return TrainState(params, router_biases, opt_state, state.step + 1), report


def balanced(router_biases: nnx.State, stats: tuple[SegmentStats, ...], rate: float) -> nnx.State:
    """Router biases `[R, E]` after a step: b_e + rate * sign(mean load - load_e), DeepSeek-V3's rule (arXiv 2412.19437)."""

    def moved(path: tuple[Any, ...], bias: nnx.Variable[jax.Array]) -> nnx.Variable[jax.Array]:
        router = stats[path[1]][path[2]] if path[0] == "segments" else None
        if router is None:  # of a multi-token-prediction layer with experts, which is not trained
            return bias
        error = jnp.mean(router.load, axis=-1, keepdims=True) - router.load
        return bias.replace(bias[...] + rate * jnp.sign(error))

    return nnx.from_flat_state([(path, moved(path, bias)) for path, bias in nnx.to_flat_state(router_biases)])


@partial(jax.jit, static_argnums=0)
def _evaluate_batch(
    graphdef: Graph, params: nnx.State, router_biases: nnx.State, batch: PackedRows
) -> tuple[TokenLoss, TokenLoss | None]:
    model = nnx.merge(graphdef, params, router_biases)
    config = LossConfig()
    hidden, _ = model.forward(jnp.asarray(batch.tokens), segment_ids=jnp.asarray(batch.segment_ids))
    ahead = mtp_loss(model, hidden, batch, config) if has_mtp_loss(model, config) else None
    return token_loss(model, hidden, targets(batch, 1)), ahead


def evaluate(graphdef: Graph, state: TrainState, batches: Iterable[PackedRows]) -> Evaluation:
    """Losses over batches `[B, T]`, each token counting the same. Raises InputError where there is nothing to predict."""
    sums = [_evaluate_batch(graphdef, state.params, state.router_biases, batch) for batch in batches]
    if not sums:
        raise InputError("evaluation needs at least one batch")
    main, ahead = jax.tree.map(lambda *xs: sum(float(x) for x in xs), *sums)
    if main.tokens == 0:
        raise InputError("evaluation needs at least one document of two tokens or more")
    return Evaluation(
        main.total / main.tokens, int(main.tokens), None if ahead is None else ahead.total / max(ahead.tokens, 1)
    )
