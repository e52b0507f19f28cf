"""Steps that are not taken: decided on the device, with nothing changed but the counts."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from exaone_jax.config import ModelConfig
from exaone_jax.data import PackedRows
from exaone_jax.model import Transformer
from exaone_jax.training import LossConfig, adamw, init_state, setup, step, train_step, wsd
from exaone_jax.training.faults import TrainingError, check_replicas
from exaone_jax.training.loop import train
from exaone_jax.training.saves import named_arrays, saved_steps, with_arrays
from exaone_jax.training.step import Guard, _is_spike
from tests.training.runs import SPARSE, small_run

BAD = 61 - 1  # a token whose presence makes a step bad
ADAMW = adamw(wsd(0.01, 60, warmup=5, decay=10))


@pytest.mark.parametrize(("sigmas", "spike"), [(5.0, False), (10.0, True)])
def test_a_spike_is_six_standard_deviations(sigmas: float, spike: bool) -> None:
    losses = np.random.default_rng(0).normal(3.0, 0.1, 128).astype(np.float32)
    value = losses.mean() + sigmas * losses.std(ddof=1)
    assert bool(_is_spike(jnp.asarray(losses), jnp.int32(1000), jnp.float32(value), 6.0)) is spike


def test_nothing_is_a_spike_before_half_the_window_is_known() -> None:
    ring = jnp.zeros(128).at[:80].set(jnp.linspace(0.9, 1.1, 80))
    assert not _is_spike(ring, jnp.int32(63), jnp.float32(100.0), 6.0)
    assert _is_spike(ring, jnp.int32(64), jnp.float32(100.0), 6.0)
    assert not _is_spike(ring, jnp.int32(64), jnp.float32(-100.0), 6.0)


def bits(tree: object) -> list[bytes]:
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(tree)]


@pytest.fixture
def poison(monkeypatch: pytest.MonkeyPatch):
    """Makes the loss of a batch that opens with BAD not finite, or larger."""
    plain = step.total_loss

    def install(factor: float) -> None:
        def poisoned(model, batch, config, of=None):
            objective, (metrics, stats) = plain(model, batch, config, of)
            times = jnp.where(batch.tokens[0, 0] == BAD, factor, 1.0)
            return objective * times, (metrics._replace(objective=objective * times), stats)

        monkeypatch.setattr(step, "total_loss", poisoned)
        jax.clear_caches()

    yield install
    jax.clear_caches()


@pytest.fixture
def small_model() -> Transformer:
    return Transformer(ModelConfig.model_validate(SPARSE), rngs=nnx.Rngs(0))


@pytest.mark.parametrize(("factor", "stop"), [(jnp.nan, False), (jnp.inf, True)])
def test_a_step_that_is_not_finite_changes_nothing(
    poison, small_model: Transformer, batch: PackedRows, factor: float, stop: bool
) -> None:
    poison(factor)
    bad = batch._replace(tokens=np.where(np.arange(16) == 0, BAD, batch.tokens).astype(np.int32))
    good = batch._replace(tokens=np.where(np.arange(16) == 0, 1, batch.tokens).astype(np.int32))
    guard = Guard(stop=stop)
    graphdef, state = init_state(small_model, ADAMW, ema=True, window=4)
    histories = []
    for rows in (good, bad, good):
        before = bits((state.params, state.router_biases, state.opt_state, state.ema))
        state, metrics = train_step(
            graphdef, state, rows, optimizer=ADAMW, loss=LossConfig(), ema=0.5, guard=guard, router_bias_rate=0.1
        )
        same = before == bits((state.params, state.router_biases, state.opt_state, state.ema))
        histories.append(
            (same, int(state.step), bool(metrics.skipped), bool(metrics.halted), int(state.history.skipped))
        )
    if stop:  # halted at the state of the last good step, and the steps that were on their way do nothing
        assert histories == [(False, 1, False, False, 0), (True, 1, False, True, 0), (True, 1, False, True, 0)]
    else:
        assert histories == [(False, 1, False, False, 0), (True, 2, True, False, 1), (False, 3, False, False, 1)]
        # the optimizer has seen one step before; compiled in the step, the schedule may round its last bit otherwise
        assert float(metrics.learning_rate) == pytest.approx(float(ADAMW.schedule(1)), rel=2**-22)
        assert float(ADAMW.schedule(2)) != pytest.approx(float(ADAMW.schedule(1)), rel=2**-20)


def test_a_spike_is_skipped_where_asked(poison, small_model: Transformer, batch: PackedRows) -> None:
    poison(100.0)
    good = batch._replace(tokens=np.where(np.arange(16) == 0, 1, batch.tokens).astype(np.int32))
    bad = batch._replace(tokens=np.where(np.arange(16) == 0, BAD, batch.tokens).astype(np.int32))
    graphdef, state = init_state(small_model, ADAMW, window=4)
    skipped = []
    for rows in (good, good, good, bad, good):
        state, metrics = train_step(
            graphdef, state, rows, optimizer=ADAMW, loss=LossConfig(), guard=Guard(stop=True, sigma=6.0)
        )
        skipped.append(bool(metrics.skipped))
    assert skipped == [False, False, False, True, False]


@pytest.mark.parametrize("policy", ["stop", "skip"])
def test_a_run_meets_a_loss_that_is_not_finite(
    policy: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """At step 4 of 6. Stop: the state after step 3 is what is saved. Skip: the run goes on without it."""
    run = small_run(tmp_path, save={"every": 5}, guard={"window": 8, "nonfinite": policy})
    plain, put, calls = step.total_loss, setup.on_devices, []

    def marked(rows: PackedRows, *args) -> PackedRows:
        calls.append(1)
        tokens = np.where(np.arange(16) == 0, BAD if len(calls) == 4 else 1, rows.tokens).astype(np.int32)
        return put(rows._replace(tokens=tokens), *args)

    def poisoned(model, batch, config, of=None):
        objective, aux = plain(model, batch, config, of)
        return objective * jnp.where(batch.tokens[0, 0] == BAD, jnp.nan, 1.0), aux

    monkeypatch.setattr(setup, "on_devices", marked)
    monkeypatch.setattr(step, "total_loss", poisoned)
    jax.clear_caches()
    if policy == "stop":
        with pytest.raises(TrainingError, match=r"step 4 is not finite: .*gradient norm nan; step 3 is saved"):
            train(run)
        assert saved_steps(tmp_path / "run" / "checkpoints") == [3]
        assert train(run).steps == 6  # with another batch in that place
    else:
        assert train(run).steps == 6
        assert "warning: step 4 was skipped" in capsys.readouterr().out
    jax.clear_caches()


def test_a_copy_that_differs_is_named(tmp_path: Path) -> None:
    """One bit of one device's copy of one parameter."""
    run = setup.set_up(small_run(tmp_path))
    state = setup.initial_state(run)
    check_replicas(state, run.mesh)
    name, wrong = "params/segments.0.0.mlp.up_proj.weight", 5
    arrays = named_arrays(state)
    copies = [np.array(shard.data) for shard in arrays[name].addressable_shards]
    copies[wrong].view(np.uint32).flat[7] ^= 1 << 20
    devices = [shard.device for shard in arrays[name].addressable_shards]
    arrays[name] = jax.make_array_from_single_device_arrays(
        arrays[name].shape,
        arrays[name].sharding,
        [jax.device_put(copy, device) for copy, device in zip(copies, devices, strict=True)],
    )
    with pytest.raises(
        TrainingError, match=rf"mlp.up_proj.weight: copies .* host 0 \({devices[wrong]}\) differ from the other"
    ):
        check_replicas(with_arrays(state, arrays), run.mesh)
