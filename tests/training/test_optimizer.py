"""Optimizers against plain numpy, and schedules at their corners."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from exaone_jax.errors import ConfigError
from exaone_jax.model import Transformer
from exaone_jax.training import Optimizer, adamw, cosine, muon, wsd
from exaone_jax.training.optimizer import decays

Flat = dict[str, np.ndarray]


def flat(state: nnx.State) -> Flat:
    return {".".join(map(str, path)): np.asarray(value[...]) for path, value in nnx.to_flat_state(state)}


def random_like(params: nnx.State, seed: int) -> nnx.State:
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape), x.dtype), params)


def run(optimizer: Optimizer, params: nnx.State, steps: int) -> list[Flat]:
    """Parameters after each step with gradients random_like(params, step)."""
    state, after = optimizer.transform.init(params), []
    update = jax.jit(optimizer.transform.update)
    for step in range(steps):
        updates, state = update(random_like(params, step), state, params)
        params = optax.apply_updates(params, updates)
        after.append(flat(params))
    return after


def test_what_decays(model: Transformer) -> None:
    params = nnx.state(model, nnx.Param)
    everything = flat(params)
    marked = {name for name, mark in zip(everything, jax.tree.leaves(decays(params)), strict=True) if mark}
    assert everything.keys() - marked == {
        name for name in everything if name.endswith("scale") or name == "embed.embedding"
    }


def test_adamw_equals_numpy(model: Transformer) -> None:
    params = nnx.state(model, nnx.Param)
    rate, decay, b1, b2, clip = 0.01, 0.3, 0.8, 0.9, 1.5
    found = run(adamw(lambda step: rate, weight_decay=decay, b1=b1, b2=b2, clip_norm=clip), params, 3)
    value = flat(params)
    mean, square = ({name: np.zeros_like(x) for name, x in value.items()} for _ in range(2))
    for step in range(3):
        grads = flat(random_like(params, step))
        norm = np.sqrt(sum(np.sum(g.astype(np.float64) ** 2) for g in grads.values()))
        assert norm > clip
        for name, grad in grads.items():
            grad = grad * (clip / norm)
            mean[name] = b1 * mean[name] + (1 - b1) * grad
            square[name] = b2 * square[name] + (1 - b2) * grad**2
            direction = mean[name] / (1 - b1 ** (step + 1)) / (np.sqrt(square[name] / (1 - b2 ** (step + 1))) + 1e-8)
            if not (name.endswith("scale") or name == "embed.embedding"):
                direction = direction + decay * value[name]
            value[name] = value[name] - rate * direction
            np.testing.assert_allclose(found[step][name], value[name], rtol=1e-5, atol=1e-6, err_msg=name)


def test_muon_orthogonalises_each_matrix_of_a_stack(model: Transformer) -> None:
    params = nnx.state(model, nnx.Param)
    after = run(muon(lambda step: 1.0, weight_decay=0.0, clip_norm=1e9), params, 1)[0]
    before, grads = flat(params), flat(random_like(params, 0))
    for name in ("segments.1.0.moe.experts.gate_proj", "segments.1.1.attention.q_proj.weight", "mtp.fc.weight"):
        update, grad = before[name] - after[name], grads[name]
        size = update.shape[-2:]
        scale = 0.2 * np.sqrt(max(size))
        for step, gradient in zip(update.reshape(-1, *size), grad.reshape(-1, *size), strict=True):
            left, _, right = np.linalg.svd(gradient, full_matrices=False)
            singular = left.T @ step @ right.T / scale
            # five Newton-Schulz steps with these coefficients leave singular values between about 0.7 and 1.2
            assert np.all((np.diag(singular) > 0.6) & (np.diag(singular) < 1.3)), name
            np.testing.assert_allclose(singular - np.diag(np.diag(singular)), 0, atol=1e-2)


def test_muon_leaves_vectors_and_vocabulary_to_adamw(model: Transformer) -> None:
    params = nnx.state(model, nnx.Param)
    schedule = lambda step: 0.01  # noqa: E731
    by_muon, by_adamw = (run(o(schedule, weight_decay=0.2), params, 2)[-1] for o in (muon, adamw))
    for name in by_adamw:
        shared = name.endswith("scale") or name in ("embed.embedding", "lm_head.weight")
        assert np.allclose(by_muon[name], by_adamw[name], rtol=1e-5, atol=1e-6) == shared, name


def test_wsd_at_its_corners() -> None:
    schedule = wsd(2.0, 100, warmup=10, decay=20, final=0.5)
    steps = [0, 5, 10, 50, 80, 90, 100, 1000]
    np.testing.assert_allclose([schedule(step) for step in steps], [0, 1, 2, 2, 2, 1.25, 0.5, 0.5], rtol=1e-6)


def test_cosine_at_its_corners() -> None:
    schedule = cosine(2.0, 110, warmup=10, final=0.5)
    np.testing.assert_allclose([schedule(step) for step in (0, 5, 10, 60, 110)], [0, 1, 2, 1.25, 0.5], rtol=1e-6)


@pytest.mark.parametrize(("warmup", "decay"), [(60, 50), (-1, 10), (10, 0)])
def test_phases_that_do_not_fit_are_refused(warmup: int, decay: int) -> None:
    with pytest.raises(ConfigError, match="100 steps"):
        wsd(1.0, 100, warmup=warmup, decay=decay)


def test_a_warmup_of_all_the_steps_is_refused() -> None:
    with pytest.raises(ConfigError, match="10 steps"):
        cosine(1.0, 10, warmup=10)
