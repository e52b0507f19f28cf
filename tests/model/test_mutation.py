"""The parity check is checked: every one of these single mistakes, in one layer, must make it fail. No torch."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx

import exaone_jax
from exaone_jax.checkpoints.verify import verify
from tests import reference_model
from tests.golden.cases import CASES, ROUTER_MARGIN, batch
from tests.golden.weights import random_tensors, write_checkpoint
from tests.model.parity import kl_and_argmax

LENGTH = 160  # ten windows

# Square experts and as many key/value heads as heads: a checkpoint where a transposed or swapped tensor has the right shape.
MOE = CASES["exaone_moe-mtp"] | {
    "hidden_size": 64, "moe_intermediate_size": 64, "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 64,
    "swiglu_limits": [0.0, 0.7, 0.7, 0.0],
}  # fmt: skip
MODELS = {
    "moe": MOE,
    "post-norm": CASES["exaone4-hybrid-80"],
    "grouped": CASES["exaone_moe-mtp"],
    "3.x": CASES["exaone3.5-tied"],
}

Tensors = dict[str, np.ndarray]


def swap(first: str, second: str) -> Callable[[dict, Tensors], None]:
    def mutate(config: dict, tensors: Tensors) -> None:
        tensors[first], tensors[second] = tensors[second], tensors[first]

    return mutate


def change(name: str, how: Callable[[np.ndarray], np.ndarray]) -> Callable[[dict, Tensors], None]:
    def mutate(config: dict, tensors: Tensors) -> None:
        tensors[name] = how(tensors[name])

    return mutate


def set_entry(key: str, index: int, value) -> Callable[[dict, Tensors], None]:
    def mutate(config: dict, tensors: Tensors) -> None:
        config[key] = [value if i == index else old for i, old in enumerate(config[key])]

    return mutate


def set_key(key: str, value) -> Callable[[dict, Tensors], None]:
    return lambda config, tensors: config.update({key: value})


def _heads_reversed(kernel: np.ndarray) -> np.ndarray:
    return kernel.reshape(2, -1, kernel.shape[1])[::-1].reshape(kernel.shape)


def _other_head_grouping(config: dict, tensors: Tensors) -> None:
    for name in ("k_proj", "v_proj"):
        change(f"model.layers.1.self_attn.{name}.weight", _heads_reversed)(config, tensors)


def _rotating_global_layer(config: dict, tensors: Tensors) -> None:
    """A window that hides nothing, but rotates."""
    set_entry("layer_types", 3, "sliding_attention")(config, tensors)
    set_entry("sliding_windows", 3, 4096)(config, tensors)


def _large_bfloat16_bias(bias: np.ndarray) -> np.ndarray:
    """8 more for every expert changes no choice in float32. bfloat16 has steps of 1/16 above 8."""
    return (bias + 8).astype(ml_dtypes.bfloat16).astype(bias.dtype)


_ATTENTION, _MLP = "model.layers.{}.self_attn.{}.weight", "model.layers.2.mlp.{}"
MUTATIONS: dict[str, tuple[str, Callable[[dict, Tensors], None]]] = {
    "swapped q/k": ("moe", swap(_ATTENTION.format(1, "q_proj"), _ATTENTION.format(1, "k_proj"))),
    "swapped q/k norm": ("moe", swap(_ATTENTION.format(1, "q_norm"), _ATTENTION.format(1, "k_norm"))),
    "rope on a global layer": ("moe", _rotating_global_layer),
    "window one too long": ("moe", set_entry("sliding_windows", 2, 17)),
    "window one too short": ("moe", set_entry("sliding_windows", 2, 15)),
    "transposed expert": ("moe", change(_MLP.format("experts.3.down_proj.weight"), lambda kernel: kernel.T)),
    "transposed shared expert": (
        "moe",
        change(_MLP.format("shared_experts.gate_proj.weight"), lambda kernel: kernel.T),
    ),
    "experts in another order": (
        "moe",
        swap(_MLP.format("experts.3.down_proj.weight"), _MLP.format("experts.4.down_proj.weight")),
    ),
    "gate and up swapped": (
        "moe",
        swap(_MLP.format("experts.3.gate_proj.weight"), _MLP.format("experts.3.up_proj.weight")),
    ),
    "dropped bias": ("moe", change(_MLP.format("e_score_correction_bias"), np.zeros_like)),
    "bias in bfloat16": ("moe", change(_MLP.format("e_score_correction_bias"), _large_bfloat16_bias)),
    "pre-norms swapped": (
        "moe",
        swap("model.layers.1.input_layernorm.weight", "model.layers.1.post_attention_layernorm.weight"),
    ),
    "dropped clamp": ("moe", set_entry("swiglu_limits", 2, 0.0)),
    "clamp on another layer": ("moe", set_entry("swiglu_limits", 3, 0.7)),
    "no scaling of the experts": ("moe", set_key("routed_scaling_factor", 1.0)),
    "weights not normalised": ("moe", set_key("norm_topk_prob", False)),
    "heads grouped otherwise": ("grouped", _other_head_grouping),
    "post-norms swapped": (
        "post-norm",
        swap("model.layers.1.post_attention_layernorm.weight", "model.layers.1.post_feedforward_layernorm.weight"),
    ),
    "scaling of rope dropped": ("3.x", set_key("rope_scaling", None)),
}


@pytest.fixture(scope="module")
def oracles() -> dict[str, tuple[Tensors, np.ndarray, np.ndarray]]:
    """Tensors, tokens `[LENGTH]` and the numpy model's logits of each model."""
    found = {}
    for name, config in MODELS.items():
        tensors, tokens = random_tensors(config, 0), batch(name)[0, :LENGTH]
        out = reference_model.run(config, tensors, tokens)
        assert min((layer.margin for layer in out.routing), default=1) >= ROUTER_MARGIN
        found[name] = (tensors, tokens, out.logits)
    return found


@pytest.fixture(scope="module")
def directory(tmp_path_factory) -> Path:
    """One place for all checkpoints, one after the other: a model knows where it came from, and jit compiles by all it knows."""
    return tmp_path_factory.mktemp("mutated")


def logits_of(directory: Path, config: dict, tensors: Tensors, tokens: np.ndarray) -> np.ndarray:
    model = exaone_jax.load(write_checkpoint(directory, config, tensors), dtype="float32")
    return np.asarray(model(tokens[None])[0], np.float64)


@pytest.mark.parametrize("name", MODELS)
def test_without_a_mutation_the_check_passes(name: str, oracles, directory):
    tensors, tokens, oracle = oracles[name]
    assert kl_and_argmax(logits_of(directory, MODELS[name], tensors, tokens), oracle).ok


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_a_mutation_fails_the_check(mutation: str, oracles, directory):
    name, mutate = MUTATIONS[mutation]
    tensors, tokens, oracle = oracles[name]
    config, mutated = dict(MODELS[name]), dict(tensors)
    mutate(config, mutated)
    parity = kl_and_argmax(logits_of(directory, config, mutated, tokens), oracle)
    assert parity.max_kl > 1e-5, f"only {parity}: ten times the tolerance was expected at least"


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_a_mutation_fails_verify(mutation: str, tmp_path):
    """`verify` looks at bits and configurations: the mutated checkpoint is not the original, its copy is."""
    name, mutate = MUTATIONS[mutation]
    config, tensors = dict(MODELS[name]), random_tensors(MODELS[name], 0)
    original = write_checkpoint(tmp_path / "original", config, tensors)
    assert verify(original, write_checkpoint(tmp_path / "copy", config, tensors)).ok
    mutate(config, tensors)
    report = verify(original, write_checkpoint(tmp_path / "mutated", config, tensors))
    assert not report.ok
    assert report.different or report.config, report


def test_mtp_halves_swapped_fails_the_check(oracles, directory):
    """fc takes [embedding, hidden]; the other order has the same shape."""
    tensors, tokens, _ = oracles["moe"]
    fc = tensors["mtp.fc.weight"]
    swapped = dict(tensors) | {"mtp.fc.weight": np.concatenate(np.split(fc, 2, axis=1)[::-1], axis=1)}
    oracle = reference_model.mtp_logits(MOE, tensors, tokens)[0]
    for weights, same in ((tensors, True), (swapped, False)):
        model = exaone_jax.load(write_checkpoint(directory, MOE, weights), dtype="float32")
        ours = _mtp_logits(*nnx.split(model), jnp.asarray(tokens[None], jnp.int32))
        assert kl_and_argmax(np.asarray(ours[0], np.float64), oracle).ok == same


@partial(jax.jit, static_argnums=0)
def _mtp_logits(graphdef, params, tokens):
    model = nnx.merge(graphdef, params)
    return model.logits(model.mtp_forward(model.forward(tokens).hidden[:, :-1], tokens[:, 1:]))


def test_the_check_itself():
    logits = np.random.default_rng(0).normal(size=(400, 50))
    assert kl_and_argmax(logits, logits).ok
    assert kl_and_argmax(logits + 7.0, logits).ok  # a constant is no difference
    assert kl_and_argmax(logits + np.random.default_rng(1).normal(size=logits.shape) * 1e-4, logits).ok
    assert not kl_and_argmax(logits + np.random.default_rng(1).normal(size=logits.shape) * 1e-2, logits).ok
    spoilt = logits.copy()
    spoilt[7, 3] = np.nan
    assert not kl_and_argmax(spoilt, logits).ok
    assert not kl_and_argmax(np.flip(logits, 0), logits).ok
    assert not kl_and_argmax(np.zeros_like(logits), np.zeros_like(logits)).ok, "ties everywhere compare nothing"
