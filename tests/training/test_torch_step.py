"""One training step beside transformers and torch in float32: loss, every gradient and every updated parameter."""

import copy
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

import exaone_jax  # noqa: E402
from exaone_jax.checkpoints.convert import save_hf  # noqa: E402
from exaone_jax.data import PackedRows  # noqa: E402
from exaone_jax.training import LossConfig, adamw, init_state, train_step  # noqa: E402
from exaone_jax.training.loss import total_loss  # noqa: E402
from exaone_jax.training.step import trained_model  # noqa: E402
from tests.golden.cases import batch  # noqa: E402
from tests.model.hf_models import HFModel, build  # noqa: E402
from tests.model.parity import assert_parity  # noqa: E402

DOCUMENTS = ((0, 40), (40, 64)), ((0, 50),)  # of two rows of 64 tokens: two packed into one, and one beside padding
LENGTH = 64
RATE, DECAY, CLIP = 1e-3, 0.1, 1.0
# An update of Adam's first step is g / (|g| + eps). With the usual 1e-8 a gradient that is all rounding would still move its
# parameter by the whole rate; with this one an error of e in a gradient moves it by at most RATE * e / EPS.
EPS = 1e-4


def rows(name: str) -> PackedRows:
    tokens = np.maximum(batch(name)[: len(DOCUMENTS), :LENGTH], 1).astype(
        np.int32
    )  # torch trains no row of its pad id, 0
    segments = np.zeros_like(tokens)
    for row, documents in enumerate(DOCUMENTS):
        for number, (start, end) in enumerate(documents, 1):
            segments[row, start:end] = number
    return PackedRows(tokens, segments)


def torch_loss(model, tokens: np.ndarray):
    """The mean over all targets, each document on its own."""
    total, count = 0.0, 0
    for row, documents in zip(tokens, DOCUMENTS, strict=True):
        for start, end in documents:
            ids = torch.from_numpy(row[None, start:end].astype(np.int64))
            logits = model(input_ids=ids, use_cache=False).logits
            total = total + torch.nn.functional.cross_entropy(logits[0, :-1], ids[0, 1:], reduction="sum")
            count += end - start - 1
    return total / count


def ours_of(hf: HFModel, model, directory: Path) -> dict[tuple, np.ndarray]:
    """The parameters of a transformers model by the paths of ours: conversion moves numbers and changes none."""
    model.save_pretrained(directory)
    return arrays(nnx.state(exaone_jax.load(directory, dtype="float32", scan_layers=True), nnx.Param))


def arrays(state: nnx.State) -> dict[tuple, np.ndarray]:
    return {path: np.asarray(value[...]) for path, value in nnx.to_flat_state(state)}


@pytest.mark.parametrize("name", ["exaone4-hybrid", "exaone_moe"])
def test_a_step_is_that_of_torch(name: str, tmp_path: Path) -> None:
    """And what is exported after it loads in transformers and says the same."""
    hf = build(name, tmp_path / "model")
    theirs = copy.deepcopy(hf.model).train()
    packed = rows(name)
    loss = torch_loss(theirs, packed.tokens)
    loss.backward()
    gradients = copy.deepcopy(theirs)
    with torch.no_grad():
        for holder, parameter in zip(gradients.parameters(), theirs.parameters(), strict=True):
            holder.copy_(parameter.grad)

    model = exaone_jax.load(hf.saved, dtype="float32", scan_layers=True)
    config = LossConfig(balance_weight=0.0, mtp_weight=0.0)
    graphdef, params, rest = nnx.split(model, nnx.Param, ...)

    @jax.jit
    def value_and_grad(params: nnx.State):
        return jax.value_and_grad(lambda p: total_loss(nnx.merge(graphdef, p, rest), packed, config)[0])(params)

    objective, ours = value_and_grad(params)
    np.testing.assert_allclose(objective, loss.item(), rtol=1e-6)
    expected = ours_of(hf, gradients, tmp_path / "gradients")
    found = arrays(ours)
    assert found.keys() == expected.keys()
    for path, gradient in expected.items():
        # float32 sums in other orders: each gradient as a whole to 1e-5, and its worst element, a sum that cancels, to 3e-5
        # of the largest (1.3e-5 was seen, in a norm's scale)
        np.testing.assert_allclose(found[path], gradient, rtol=0, atol=3e-5 * np.abs(gradient).max(), err_msg=str(path))
        assert np.linalg.norm(found[path] - gradient) <= 1e-5 * np.linalg.norm(gradient), path

    decays = [p for n, p in theirs.named_parameters() if p.ndim > 1 and "embed_tokens" not in n]
    kept = [p for n, p in theirs.named_parameters() if p.ndim == 1 or "embed_tokens" in n]
    groups = [{"params": decays, "weight_decay": DECAY}, {"params": kept, "weight_decay": 0.0}]
    theirs_optimizer = torch.optim.AdamW(groups, lr=RATE, betas=(0.9, 0.95), eps=EPS)
    norm = torch.nn.utils.clip_grad_norm_(theirs.parameters(), CLIP)
    theirs_optimizer.step()
    updated = ours_of(hf, theirs, tmp_path / "updated")

    optimizer = adamw(lambda step: RATE, weight_decay=DECAY, eps=EPS, clip_norm=CLIP)
    before = arrays(params)
    graphdef, state = init_state(model, optimizer)
    state, metrics = train_step(graphdef, state, packed, optimizer=optimizer, loss=config)
    np.testing.assert_allclose(metrics.grad_norm, norm.item(), rtol=1e-5)
    for path, value in updated.items():
        step = value - before[path]
        assert np.abs(step).max() > 0.1 * RATE, path
        np.testing.assert_allclose(arrays(state.params)[path], value, rtol=0, atol=1e-2 * RATE, err_msg=str(path))

    trained = trained_model(graphdef, state)
    save_hf(nnx.state(trained), trained.config, tmp_path / "exported", extra_files_from=hf.published)
    exported = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "exported", dtype=torch.float32).eval()
    with torch.no_grad():
        logits = exported(input_ids=torch.from_numpy(packed.tokens[:1].astype(np.int64)), use_cache=False).logits
    assert_parity(trained(packed.tokens[:1])[0], logits[0].numpy())
