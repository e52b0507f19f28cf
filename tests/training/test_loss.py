"""The objective and its gradients against a plain computation: document by document, with whole logits."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from exaone_jax.config.model import ModelConfig
from exaone_jax.data import PackedRows
from exaone_jax.errors import ConfigError
from exaone_jax.model import Transformer
from exaone_jax.model.linear import RouterBias
from exaone_jax.model.stack import SegmentStats
from exaone_jax.training import LossConfig
from exaone_jax.training.loss import LossMetrics, by_layer, targets, total_loss

Terms = tuple[jax.Array, tuple[LossMetrics, tuple[SegmentStats, ...]]]


def compiled_loss(model: Transformer, batch: PackedRows, config: LossConfig) -> Terms:
    graphdef, params = nnx.split(model)
    return jax.jit(lambda params: total_loss(nnx.merge(graphdef, params), batch, config))(params)


def negative_log_likelihoods(logits: jax.Array, labels: np.ndarray) -> jax.Array:
    log_probs = logits - jnp.log(jnp.sum(jnp.exp(logits), axis=-1, keepdims=True))
    return -log_probs[jnp.arange(len(labels)), labels]


def plain_losses(model: Transformer, documents: list[np.ndarray]) -> tuple[jax.Array, jax.Array]:
    """Mean loss of the next token and of the token after: a row for each document, nothing packed, nothing masked.

    What fills up the rows comes after the documents, where no causal model sees it.
    """
    tokens = np.zeros((len(documents), max(map(len, documents)) + 1), np.int32)
    for row, document in zip(tokens, documents, strict=True):
        row[: len(document)] = document
    hidden = model.forward(jnp.asarray(tokens)).hidden
    logits = model.logits(hidden)
    logits_ahead = model.logits(model.mtp_forward(hidden[:, :-1], jnp.asarray(tokens[:, 1:])))
    following = [negative_log_likelihoods(logits[i, : len(d) - 1], d[1:]) for i, d in enumerate(documents)]
    after = [negative_log_likelihoods(logits_ahead[i, : max(len(d) - 2, 0)], d[2:]) for i, d in enumerate(documents)]
    return jnp.mean(jnp.concatenate(following)), jnp.mean(jnp.concatenate(after))


def test_targets_stay_inside_their_document() -> None:
    rows = PackedRows(np.array([[5, 6, 7, 8, 9, 0]]), np.array([[1, 1, 1, 2, 2, 0]]))
    one, two = targets(rows, 1), targets(rows, 2)
    assert one.labels[0, :5].tolist() == [6, 7, 8, 9, 0]
    assert one.mask[0].tolist() == [True, True, False, True, False, False]
    assert two.labels[0, :4].tolist() == [7, 8, 9, 0]
    assert two.mask[0].tolist() == [True, False, False, False, False, False]


def test_padding_predicts_nothing() -> None:
    rows = PackedRows(np.zeros((2, 4), np.int32), np.zeros((2, 4), np.int32))
    assert not targets(rows, 1).mask.any()
    assert not targets(rows, 9).mask.any()


def test_losses_equal_those_of_each_document_alone(
    model: Transformer, batch: PackedRows, documents: list[np.ndarray]
) -> None:
    _, (metrics, _) = compiled_loss(model, batch, LossConfig())
    graphdef, params = nnx.split(model)
    following, after = jax.jit(lambda params: plain_losses(nnx.merge(graphdef, params), documents))(params)
    # float32 sums in another order, over logits of order 1 to 10
    np.testing.assert_allclose(metrics.loss, following, rtol=2e-6)
    np.testing.assert_allclose(metrics.mtp_loss, after, rtol=2e-6)
    assert metrics.tokens == sum(len(document) - 1 for document in documents)


def test_the_objective_is_the_weighted_sum(model: Transformer, batch: PackedRows) -> None:
    config = LossConfig(mtp_weight=0.25, balance_weight=0.5)
    objective, (metrics, _) = compiled_loss(model, batch, config)
    expected = metrics.loss + 0.25 * metrics.mtp_loss + 0.5 * metrics.balance_loss
    np.testing.assert_allclose(objective, expected, rtol=1e-6)
    assert metrics.objective == objective


def test_gradients_equal_those_of_the_plain_computation(
    model: Transformer, batch: PackedRows, documents: list[np.ndarray]
) -> None:
    graphdef, params, biases = nnx.split(model, nnx.Param, RouterBias)

    def plain(params: nnx.State) -> jax.Array:
        following, after = plain_losses(nnx.merge(graphdef, params, biases), documents)
        return following + 0.05 * after

    def ours(params: nnx.State) -> jax.Array:
        return total_loss(nnx.merge(graphdef, params, biases), batch, LossConfig(balance_weight=0.0))[0]

    expected, found = jax.jit(jax.grad(plain))(params), jax.jit(jax.grad(ours))(params)
    for (path, want), got in zip(nnx.to_flat_state(expected), jax.tree.leaves(found), strict=True):
        # float32 through 5 layers of order-1 activations: rounding, relative to the largest entry of each gradient
        np.testing.assert_allclose(
            got, want[...], rtol=0, atol=2e-5 * float(jnp.abs(want[...]).max()), err_msg=str(path)
        )


def test_the_balance_loss_moves_routers_only_where_it_is_differentiable(model: Transformer, batch: PackedRows) -> None:
    """An independent form of the loss for one sparse layer, from its router's input up."""
    graphdef, params, biases = nnx.split(model, nnx.Param, RouterBias)

    def balance(params: nnx.State) -> jax.Array:
        return total_loss(nnx.merge(graphdef, params, biases), batch, LossConfig(0.0, 1.0))[1][0].balance_loss

    grads = jax.jit(jax.grad(balance))(params)
    assert jnp.abs(grads["segments"][1][0]["moe"]["router"]["weight"][...]).max() > 0
    assert jnp.abs(grads["lm_head"]["weight"][...]).max() == 0
    assert jnp.abs(grads["mtp"]["fc"]["weight"][...]).max() == 0


@pytest.mark.parametrize("layer", [1, 2, 4])
def test_expert_load_is_in_layer_order_and_leaves_padding_out(
    model: Transformer, batch: PackedRows, layer: int
) -> None:
    """A bias that no score can beat sends every real token of one layer to experts 1 and 2."""
    start = 0
    for segment, blocks in zip(model.plan, model.segments, strict=True):
        if layer < start + segment.repeats * len(segment.pattern):
            repeat, place = divmod(layer - start, len(segment.pattern))
            bias = blocks[place].moe.router.bias
            bias[...] = bias[...].at[repeat].set(jnp.array([0.0, 9.0, 9.0, 0.0]))
            break
        start += segment.repeats * len(segment.pattern)
    _, (metrics, stats) = compiled_loss(model, batch, LossConfig())
    real = int((batch.segment_ids != 0).sum())
    assert metrics.expert_load.shape == (4, 4)
    np.testing.assert_array_equal(metrics.expert_load.sum(axis=1), 2 * real)
    forced = (metrics.expert_load == jnp.array([0, real, real, 0])).all(axis=1)
    assert np.flatnonzero(forced).tolist() == [layer - 1]
    assert len(by_layer(stats)) == 4


def test_z_loss_adds_the_squared_normaliser(model: Transformer, batch: PackedRows) -> None:
    normaliser = jax.nn.logsumexp(model(batch.tokens, segment_ids=jnp.asarray(batch.segment_ids)), axis=-1)
    mask = targets(batch, 1).mask
    extra = 0.1 * jnp.sum(jnp.where(mask, normaliser**2, 0)) / jnp.sum(mask)
    without, with_z = (compiled_loss(model, batch, LossConfig(0.0, 0.0, z))[0] for z in (0.0, 0.1))
    np.testing.assert_allclose(with_z - without, extra, rtol=1e-4)  # a difference of two float32 losses


def test_recomputing_changes_no_gradient(model: Transformer, batch: PackedRows) -> None:
    graphdef, params, biases = nnx.split(model, nnx.Param, RouterBias)

    def grads(config: LossConfig) -> list[jax.Array]:
        grad = jax.grad(lambda params: total_loss(nnx.merge(graphdef, params, biases), batch, config)[0])
        return jax.tree.leaves(jax.jit(grad)(params))

    expected = grads(LossConfig())
    for found in (grads(LossConfig(remat="dots")), grads(LossConfig(remat="full"))):
        for want, got in zip(expected, found, strict=True):
            np.testing.assert_allclose(got, want, rtol=0, atol=1e-5 * float(jnp.abs(want).max()))  # fused otherwise


def test_a_model_without_experts_or_mtp_has_only_the_next_token_loss(config: ModelConfig, batch: PackedRows) -> None:
    dense = config.model_copy(update={"layers": config.layers[:1], "moe": None, "mtp_layer": None})
    objective, (metrics, _) = compiled_loss(Transformer(dense, rngs=nnx.Rngs(0)), batch, LossConfig())
    assert objective == metrics.loss
    assert metrics.mtp_loss is metrics.balance_loss is metrics.expert_load is None


def test_an_mtp_layer_with_experts_is_refused(config: ModelConfig, batch: PackedRows) -> None:
    moe_mtp = config.model_copy(update={"mtp_layer": config.layers[1]})
    with pytest.raises(ConfigError, match="experts"):
        total_loss(Transformer(moe_mtp, rngs=nnx.Rngs(0)), batch, LossConfig())
