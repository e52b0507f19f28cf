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
    whole,
)
from exaone_jax.training.optimizer import Optimizer

Graph = nnx.GraphDef[Transformer]


@dataclasses.dataclass(frozen=True)
class Guard:
    """What a step does about itself, on the device, where the state keeps a History.

    stop: a loss or gradient that is not finite undoes its step and halts all that follow; else it is skipped.
    sigma: skip a step whose loss or gradient norm is so many standard deviations above those remembered; None: no step.
    """

    stop: bool = True
    sigma: float | None = None


class History(NamedTuple):
    """What a guarded run remembers: loss and grad_norm float32 `[W]` of the last W finite steps, in a ring; of int32 counts,
    the finite steps seen, the steps skipped, and halted, 1 from a step that was not finite on."""

    loss: jax.Array
    grad_norm: jax.Array
    seen: jax.Array
    skipped: jax.Array
    halted: jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """All that a step changes. params and router_biases are states of the model; step int32, steps taken so far.

    ema: an average of the parameters, None where none is kept. history: None where steps are not guarded.
    frozen: the rest of the model, where adapters alone are trained: no step changes it.
    """

    params: nnx.State
    router_biases: nnx.State
    opt_state: optax.OptState
    step: jax.Array
    ema: nnx.State | None = None
    history: History | None = None
    frozen: nnx.State = dataclasses.field(default_factory=lambda: nnx.State({}))

    @property
    def model(self) -> tuple[nnx.State, nnx.State, nnx.State]:
        """What a graph is merged with."""
        return self.params, self.router_biases, self.frozen


class StepMetrics(NamedTuple):
    """loss: LossMetrics. grad_norm: of the gradients before clipping. learning_rate: of this step. float32 scalars.

    skipped: whether the step changed nothing but the counts. halted: whether this or an earlier step was not finite and
    the guard stops. asked: bool `[K]`, which of the K questions any device was told to answer with yes; None: none were put.
    """

    loss: LossMetrics
    grad_norm: jax.Array
    learning_rate: jax.Array
    skipped: jax.Array
    halted: jax.Array
    asked: jax.Array | None = None


class Evaluation(NamedTuple):
    """Mean loss, nats a token, over `tokens` predicted tokens; mtp_loss is None where that layer is not trained."""

    loss: float
    tokens: int
    mtp_loss: float | None


def init_state(
    model: Transformer, optimizer: Optimizer, *, ema: bool = False, window: int | None = None
) -> tuple[Graph, TrainState]:
    """The graph of `model`, static from here on, and the state of a run at step 0.

    The state holds the model's own arrays, which the first `train_step` takes over: do not use `model` after it.
    ema: keep an average of the parameters. window: steps that a guard remembers; None: no guard.
    """
    graphdef, params, router_biases = nnx.split(model, nnx.Param, RouterBias)
    return graphdef, fresh_state(params, router_biases, optimizer=optimizer, ema=ema, window=window)


def fresh_state(
    params: nnx.State,
    router_biases: nnx.State,
    frozen: nnx.State | None = None,
    *,
    optimizer: Optimizer,
    ema: bool = False,
    window: int | None = None,
) -> TrainState:
    """The state of a run at step 0, as `init_state`."""
    average = jax.tree.map(jnp.copy, params) if ema else None

    def zeros(
        *shape: int, dtype: jax.typing.DTypeLike = jnp.int32
    ) -> jax.Array:  # an array of its own: all are donated
        return jnp.zeros(shape, dtype)

    history = None
    if window is not None:
        rings = (zeros(window, dtype=jnp.float32) for _ in range(2))
        history = History(*rings, seen=zeros(), skipped=zeros(), halted=zeros())
    frozen = nnx.State({}) if frozen is None else frozen
    return TrainState(params, router_biases, optimizer.transform.init(params), zeros(), average, history, frozen)


def trained_model(graphdef: Graph, state: TrainState) -> Transformer:
    """The model with the state's arrays; they are shared, and a later `train_step` of this state takes them over."""
    return nnx.merge(graphdef, *state.model)


@partial(
    jax.jit,
    static_argnames=("graphdef", "optimizer", "loss", "router_bias_rate", "ema", "guard"),
    donate_argnames="state",
)
def train_step(
    graphdef: Graph,
    state: TrainState,
    batch: PackedRows,
    asked: jax.Array | None = None,
    *,
    optimizer: Optimizer,
    loss: LossConfig,
    router_bias_rate: float = 1e-4,
    ema: float = 0.0,
    guard: Guard = Guard(),
) -> tuple[TrainState, StepMetrics]:
    """One optimizer step on a batch `[B, T]`, or `[A, B, T]` in A parts, one after the other. The state's buffers are donated.

    Gradients are of the Params only. Each router bias moves by `router_bias_rate` towards an even load, after the step.
    asked: bool `[devices, K]`, each device's answers to K questions, so that all processes learn them at the same step.
    ema: the decay of `state.ema`. guard: applies where the state has a history.
    """
    grads, metrics, stats = _gradients(graphdef, state, batch, loss)
    updates, opt_state = optimizer.transform.update(grads, state.opt_state, state.params)
    params = cast(nnx.State, optax.apply_updates(state.params, updates))
    router_biases = balanced(state.router_biases, stats, router_bias_rate)
    average = None
    if state.ema is not None:
        average = jax.tree.map(lambda old, new: ema * old + (1 - ema) * new, state.ema, params)
    grad_norm = optax.tree.norm(grads)
    taken = TrainState(params, router_biases, opt_state, state.step + 1, average, state.history, state.frozen)
    skip, halted, count = jnp.zeros((), bool), jnp.zeros((), bool), state.step
    if state.history is not None:
        count = state.step - state.history.skipped  # the optimizer's own: a skipped step is none of its
        taken, skip, halted = _guarded(state, taken, metrics.objective, grad_norm, guard)
    learning_rate = jnp.asarray(optimizer.schedule(count), jnp.float32)
    answers = None if asked is None else jnp.any(asked, axis=0)
    return taken, StepMetrics(metrics, grad_norm, learning_rate, skip, halted, answers)


def _gradients(
    graphdef: Graph, state: TrainState, batch: PackedRows, loss: LossConfig
) -> tuple[nnx.State, LossMetrics, tuple[SegmentStats, ...]]:
    """Gradients of the Params, metrics and routers' statistics of a batch, whole or in parts."""
    of = whole(batch)

    def objective(
        params: nnx.State, part: PackedRows
    ) -> tuple[jax.Array, tuple[LossMetrics, tuple[SegmentStats, ...]]]:
        return total_loss(nnx.merge(graphdef, params, *state.model[1:]), part, loss, of)

    differentiate = jax.value_and_grad(objective, has_aux=True)
    if batch.tokens.ndim == 2:
        (_, (metrics, stats)), grads = differentiate(state.params, batch)
        return grads, metrics, stats

    def add(total: Any, part: PackedRows) -> tuple[Any, None]:
        (_, aux), grads = differentiate(state.params, part)
        return jax.tree.map(jnp.add, total, (grads, *aux)), None

    first = jax.tree.map(lambda x: x[0], batch)
    (_, aux), grads = jax.eval_shape(differentiate, state.params, first)
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), (grads, *aux))
    return jax.lax.scan(add, zeros, batch)[0]


def _guarded(
    state: TrainState, taken: TrainState, loss: jax.Array, grad_norm: jax.Array, guard: Guard
) -> tuple[TrainState, jax.Array, jax.Array]:
    """The state after a step, which may be as before it; whether it was skipped, and whether the run is to halt."""
    history = cast(History, state.history)
    finite = jnp.isfinite(loss) & jnp.isfinite(grad_norm)
    spike = jnp.zeros((), bool)
    if guard.sigma is not None:
        spike = _is_spike(history.loss, history.seen, loss, guard.sigma)
        spike |= _is_spike(history.grad_norm, history.seen, grad_norm, guard.sigma)
    halted = (history.halted > 0) | (~finite if guard.stop else jnp.zeros((), bool))
    good = finite & ~spike & ~halted
    kept = jax.tree.map(lambda new, old: jnp.where(good, new, old), taken, state)
    skipped = ~good & ~halted
    remembered = finite & ~halted  # spikes too: where losses have risen for good, the run goes on
    place = history.seen % len(history.loss)

    def with_latest(ring: jax.Array, value: jax.Array) -> jax.Array:
        return jnp.where(remembered, ring.at[place].set(value), ring)

    after = History(
        loss=with_latest(history.loss, loss),
        grad_norm=with_latest(history.grad_norm, grad_norm),
        seen=history.seen + remembered,
        skipped=history.skipped + skipped,
        halted=halted.astype(jnp.int32),
    )
    step = jnp.where(halted, state.step, state.step + 1)
    return dataclasses.replace(kept, step=step, history=after), skipped, halted


def _is_spike(ring: jax.Array, seen: jax.Array, value: jax.Array, sigma: float) -> jax.Array:
    """Whether a value is more than `sigma` standard deviations above those in the ring, once that is half full."""
    size = ring.shape[0]
    count = jnp.minimum(seen, size)
    there = jnp.arange(size) < count
    mean = jnp.sum(ring, where=there) / jnp.maximum(count, 1)
    deviation = jnp.sqrt(jnp.sum(jnp.square(ring - mean), where=there) / jnp.maximum(count - 1, 1))
    return (count >= max(2, size // 2)) & (value > mean + sigma * deviation)


@partial(jax.jit, donate_argnums=0)
def awake(state: TrainState) -> TrainState:
    """A state that halted, ready to go on from the last good step."""
    history = cast(History, state.history)
    return dataclasses.replace(state, history=history._replace(halted=jnp.zeros_like(history.halted)))


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
    graphdef: Graph, parts: tuple[nnx.State, ...], batch: PackedRows
) -> tuple[TokenLoss, TokenLoss | None]:
    model = nnx.merge(graphdef, *parts)
    config = LossConfig()
    hidden, _ = model.forward(jnp.asarray(batch.tokens), segment_ids=jnp.asarray(batch.segment_ids))
    ahead = mtp_loss(model, hidden, batch, config) if has_mtp_loss(model, config) else None
    return token_loss(model, hidden, targets(batch, 1)), ahead


def evaluate(graphdef: Graph, state: TrainState, batches: Iterable[PackedRows]) -> Evaluation:
    """Losses over batches `[B, T]`, each token counting the same. Raises InputError where there is nothing to predict."""
    sums = [_evaluate_batch(graphdef, state.model, batch) for batch in batches]
    if not sums:
        raise InputError("evaluation needs at least one batch")
    main, ahead = jax.tree.map(lambda *xs: sum(float(x) for x in xs), *sums)
    if main.tokens == 0:
        raise InputError("evaluation needs at least one document of two tokens or more")
    return Evaluation(
        main.total / main.tokens, int(main.tokens), None if ahead is None else ahead.total / max(ahead.tokens, 1)
    )
