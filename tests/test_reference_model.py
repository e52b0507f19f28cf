"""The plain-numpy model is itself checked: against transformers, in float64, and by hand where transformers has nothing."""

import numpy as np
import pytest

from tests import reference_model
from tests.golden.cases import CASES, LENGTH, REFERENCE_ONLY, TRANSFORMERS, VOCAB
from tests.golden.weights import random_tensors


def tokens_of(seed: int, length: int = LENGTH) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, VOCAB, length)


@pytest.mark.parametrize("case", TRANSFORMERS)
def test_logits_are_those_of_transformers(case: str, tmp_path, monkeypatch):
    torch = pytest.importorskip("torch")
    pytest.importorskip("transformers")
    from tests.model.hf_models import build

    hf = build(case, tmp_path, dtype=torch.float64)
    rotary = [m for name, m in hf.model.named_modules() if name.endswith("rotary_emb") and "visual" not in name]
    frequencies = rotary[0].inv_freq.numpy()
    np.testing.assert_allclose(
        reference_model.inverse_frequencies(reference_model.text_config(hf.config)), frequencies, 1e-6
    )
    # The last bit of a frequency is 8e-5 radians at position 640, and 3e-4 in the logits: with theirs the rest can be seen.
    monkeypatch.setattr(reference_model, "inverse_frequencies", lambda config: frequencies)
    tokens = tokens_of(1)
    ours = reference_model.run(hf.config, hf.tensors, tokens).logits
    theirs = hf.logits(tokens[None])[0]
    # transformers keeps norms, softmax, router and cos/sin in float32 whatever the model's dtype: errors of 6e-8 on values of
    # about 1, some hundred times over. A mistake in the network is 1e-2 or more.
    np.testing.assert_allclose(ours, theirs, atol=3e-5, rtol=0)
    assert ours.std() > 0.5, "logits without spread would agree whatever the network"


@pytest.mark.parametrize("case", REFERENCE_ONLY)
def test_what_transformers_leaves_out_is_seen(case: str):
    """Clamps bite and MTP logits differ from the main ones: a parity test that ignored them would fail."""
    config, tokens = CASES[case], tokens_of(2, 200)
    tensors = random_tensors(config, 0)
    out = reference_model.run(config, tensors, tokens)
    if "swiglu_limits" in config:
        without = reference_model.run(config | {"swiglu_limits": [0.0] * len(config["layer_types"])}, tensors, tokens)
        assert np.abs(out.logits - without.logits).max() > 0.1
    first, second = reference_model.mtp_logits(config, tensors, tokens, steps=2)
    assert first.shape == (199, VOCAB)
    assert second.shape == (198, VOCAB)
    assert np.abs(first - out.logits[1:]).max() > 0.1


def test_clamp_is_before_the_activation():
    weights = {
        "gate_proj.weight": np.array([[9.0]]),
        "up_proj.weight": np.array([[-9.0]]),
        "down_proj.weight": np.array([[1.0]]),
    }
    got = reference_model.swiglu(weights.__getitem__, np.array([[1.0], [-1.0]]), limit=7.0)
    silu = lambda z: z / (1 + np.exp(-z))  # noqa: E731
    np.testing.assert_allclose(got[:, 0], [silu(7.0) * -7.0, silu(-9.0) * 7.0])  # the gate is not clamped from below


def test_drafting_repeats_the_teacher_forced_first_step():
    config, tokens = CASES["exaone_moe-mtp"], tokens_of(3, 60)
    tensors = random_tensors(config, 0)
    forced = reference_model.mtp_logits(config, tensors, tokens)[0]
    drafted = reference_model.mtp_draft(config, tensors, tokens[:-1], tokens[-1], steps=3)
    np.testing.assert_allclose(drafted[0], forced[-1], atol=1e-10)
    assert drafted.shape == (3, VOCAB)


def test_router_groups_bias_and_weights():
    config = {
        "n_group": 2,
        "topk_group": 1,
        "num_experts_per_tok": 2,
        "norm_topk_prob": True,
        "routed_scaling_factor": 2.5,
    }
    scores = np.array([[0.9, 0.1, 0.1, 0.6, 0.5, 0.3]])
    chosen, weights, _ = reference_model.route(config, scores, np.zeros(6))  # groups 0.9 + 0.1 < 0.6 + 0.5
    assert sorted(chosen[0]) == [3, 4]
    np.testing.assert_allclose(sorted(weights[0]), np.array([0.5, 0.6]) / 1.1 * 2.5)
    bias = np.array([0.0, 0.0, 0.0, 0.0, -0.3, 0.0])  # moves the choice, not the weights: 0.9 + 0.1 > 0.6 + 0.3
    chosen, weights, _ = reference_model.route(config, scores, bias)
    assert 0 in chosen[0]
    np.testing.assert_allclose(weights[0], np.array([0.9, 0.1]) / 1.0 * 2.5)


def test_balancing_rules():
    load = np.array([5, 1, 3, 3])
    np.testing.assert_allclose(reference_model.updated_bias(np.zeros(4), load, 1e-4), [-1e-4, 1e-4, 0, 0])
    even = np.full((4, 4), 0.5)
    balanced = np.array([[0, 1], [2, 3], [0, 1], [2, 3]])
    assert reference_model.sequence_balance_loss(even, balanced) == pytest.approx(1.0)
    skewed = np.tile([0.9, 0.9, 0.1, 0.1], (4, 1))
    assert reference_model.sequence_balance_loss(skewed, np.tile([0, 1], (4, 1))) == pytest.approx(1.8)


def test_llama3_bands_of_the_published_head_dims():
    """Untouched, ramp and scaled frequencies for theta 1e6 and an original context of 8192."""
    scaling = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    scaling |= {"original_max_position_embeddings": 8192}
    for dim, bands in {64: (14, 3, 15), 80: (17, 4, 19), 128: (27, 7, 30)}.items():
        plain = reference_model.inverse_frequencies({"head_dim": dim, "rope_theta": 1e6})
        ratio = plain / reference_model.inverse_frequencies(
            {"head_dim": dim, "rope_theta": 1e6, "rope_scaling": scaling}
        )
        found = (ratio < 1.0001).sum(), ((ratio >= 1.0001) & (ratio < 7.999)).sum(), (ratio >= 7.999).sum()
        assert found == bands
