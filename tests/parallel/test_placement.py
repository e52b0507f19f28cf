"""A model on a mesh computes what it computes on one device: logits, gradients, statistics, decoded tokens."""

import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding

from exaone_jax.data.packing import PackedRows
from exaone_jax.errors import ConfigError
from exaone_jax.inference.generate import generate_tokens
from exaone_jax.inference.sampling import SamplingParams
from exaone_jax.model import Transformer
from exaone_jax.model.linear import RouterBias
from exaone_jax.parallel import RULES, MeshShape, init_model, make_mesh, place
from exaone_jax.training import LossConfig, adamw, init_state, train_step
from exaone_jax.training.loss import total_loss
from tests.parallel.small_model import CONFIG, on_mesh, one_device, rows

MESHES = [
    "fsdp=8",
    "expert=8",
    "tensor=2,expert=4",
    "fsdp=2,expert=2,tensor=2",
    "data=2,context=4",
    "expert=2,context=4",
    "fsdp=2,tensor=2,context=2",
]
BATCH, LENGTH = 8, 48  # more than GATHER_UP_TO tokens a device on the meshes without context, fewer with


def loss_and_gradients(model, batch):
    graphdef, params, biases = nnx.split(model, nnx.Param, RouterBias)

    @jax.jit
    def run(params, biases):
        def objective(params):
            return total_loss(nnx.merge(graphdef, params, biases), batch, LossConfig(balance_weight=0.1))

        (_, (metrics, _)), grads = jax.value_and_grad(objective, has_aux=True)(params)
        return metrics, grads

    metrics, grads = run(params, biases)
    return metrics, {path: np.asarray(leaf[...]) for path, leaf in nnx.to_flat_state(grads)}


@pytest.mark.parametrize("shape", MESHES)
def test_training_is_that_of_one_device(shape: str):
    batch = rows(BATCH, LENGTH)
    metrics, grads = loss_and_gradients(one_device(), batch)
    placed_metrics, placed_grads = loss_and_gradients(on_mesh(shape), batch)
    for name in ("objective", "loss", "mtp_loss", "balance_loss"):
        np.testing.assert_allclose(getattr(placed_metrics, name), getattr(metrics, name), rtol=1e-5, err_msg=name)
    np.testing.assert_array_equal(placed_metrics.expert_load, metrics.expert_load)
    for path, expected in grads.items():
        # float32 sums in another order: errors grow with the largest gradient of the array.
        error = np.abs(placed_grads[path] - expected).max()
        assert error <= 1e-5 * np.abs(expected).max() + 1e-8, (path, error, np.abs(expected).max())


@pytest.mark.parametrize("shape", ["fsdp=2,expert=2,tensor=2", "data=2,context=4"])
def test_training_in_bfloat16(shape: str):
    """As near to float32 as one device in bfloat16 is. (XLA:CPU dies of a sum in bfloat16 over some axes of a `shard_map` that
    leaves others to the compiler: the program has none.)"""
    batch = rows(BATCH, LENGTH)
    exact, grads = loss_and_gradients(one_device(), batch)

    def error(model) -> float:
        metrics, found = loss_and_gradients(model, batch)
        np.testing.assert_allclose(metrics.objective, exact.objective, rtol=2e-3)  # of 8 bits, over hundreds of tokens
        return math.sqrt(sum(np.square(found[path] - grads[path]).sum() for path in grads))

    # Both round alike, not the same; tokens whose experts are nearly tied go one way or the other.
    assert error(on_mesh(shape, "bfloat16")) < 1.5 * error(one_device("bfloat16"))


@pytest.mark.parametrize("shape", ["fsdp=2,expert=2,tensor=2", "expert=8", "data=2,context=4"])
@pytest.mark.parametrize("batch", [1, 4])
def test_decoding_is_that_of_one_device(shape: str, batch: int):
    """With drafts on the mesh and without on one device: they say the same."""
    random = np.random.default_rng(batch)
    prompts = [random.integers(0, CONFIG.vocab_size, length).tolist() for length in (37, 5, 20, 11)[:batch]]
    params = [SamplingParams(max_new_tokens=12, ignore_eos=True)] * batch
    expected = [out.tokens for out in generate_tokens(one_device(), prompts, params)]
    assert [out.tokens for out in generate_tokens(on_mesh(shape), prompts, params, drafts=2)] == expected


def test_the_cache_is_split():
    cache = on_mesh("fsdp=2,expert=2,tensor=2").init_cache(4, 64, 16)
    keys = cache.layers[0][0].k
    assert keys.addressable_shards[0].data.shape == (keys.shape[0], 1, 1, *keys.shape[3:])


def collectives(model, batch: PackedRows) -> dict[str, list[tuple[int, ...]]]:
    """The shapes of floating-point numbers that each kind of collective in the compiled gradients gives a device."""
    graphdef, params, biases = nnx.split(model, nnx.Param, RouterBias)

    def objective(params, biases, batch):
        return total_loss(nnx.merge(graphdef, params, biases), batch, LossConfig())[0]

    rows_split = NamedSharding(model.placement.mesh, model.placement.spec(batch.tokens.shape, ("batch", "sequence")))
    hlo = jax.jit(jax.grad(objective)).lower(params, biases, jax.device_put(batch, rows_split)).compile().as_text()
    found: dict[str, list[tuple[int, ...]]] = {}
    for line in hlo.splitlines():
        if made := re.search(r" = (.*?) (all-gather|all-to-all|collective-permute|reduce-scatter)\(", line):
            shapes = re.findall(r"f32\[([\d,]*)\]", made[1])
            found.setdefault(made[2], []).extend(tuple(map(int, filter(None, dims.split(",")))) for dims in shapes)
    return found


def test_tensor_parallelism_only_adds():
    found = collectives(on_mesh("data=4,tensor=2"), rows(BATCH, LENGTH))
    assert not any(found.values())


def test_fsdp_gathers_weights_and_no_activations():
    """Four rows a device, more than the largest weight; rows of the embedding travel by all-to-all, the table never."""
    model = on_mesh("fsdp=8")
    largest = max(leaf[...].size for _, leaf in nnx.to_flat_state(nnx.state(model)))
    assert largest < 4 * 64 * CONFIG.hidden_size
    found = collectives(model, rows(32, 64))
    assert 0 < max(map(math.prod, found["all-gather"])) <= largest
    assert found["all-gather"].count((CONFIG.vocab_size, CONFIG.hidden_size)) == 1  # the head
    assert all(math.prod(shape) <= 4 * 64 * CONFIG.hidden_size // 8 for shape in found["all-to-all"])


def test_gradients_of_head_and_experts_are_scattered():
    """Gathered once for each use at most, summed once, each device keeping its part; over tensor each has its part alone."""
    found = collectives(on_mesh("fsdp=2,expert=2,tensor=2"), rows(BATCH, LENGTH))
    vocab, size, moe = CONFIG.vocab_size // 2, CONFIG.hidden_size, CONFIG.moe
    assert moe is not None
    local, width = moe.num_experts // 2, moe.intermediate_size // 2
    assert found["reduce-scatter"].count((vocab, size // 2)) == 2  # of the loss and of that of the MTP layer
    assert 1 <= found["all-gather"].count((vocab, size)) <= 2
    assert (2 * vocab, size) not in found["all-gather"]
    sparse = sum(layer.moe for layer in CONFIG.layers)
    assert found["reduce-scatter"].count((local, width, size // 2)) == 2 * sparse  # gate and up
    assert found["reduce-scatter"].count((local, size // 2, width)) == sparse  # down
    # Once forward and once backward; where memory is no matter the compiler keeps one for the other.
    assert sparse <= found["all-gather"].count((local, size, width)) <= 2 * sparse


def test_context_parallelism_gathers_keys_and_permutes_tails():
    found = collectives(on_mesh("data=2,context=4"), rows(BATCH, 40))
    keys = (BATCH // 2, 40, CONFIG.num_kv_heads, CONFIG.head_dim)
    assert set(found["all-gather"]) == {keys}
    assert len(found["all-gather"]) == 4  # keys and values of the global layer and of the MTP layer
    tail = (BATCH // 2, 7, CONFIG.num_kv_heads, CONFIG.head_dim)
    assert found["collective-permute"].count(tail) == 3 * 2 * 2  # window layers x (k, v) x (forward, backward)


def test_heads_that_do_not_divide_are_refused():
    with pytest.raises(ConfigError, match="heads over tensor is 8 parts, and the model has 4"):
        place(CONFIG, make_mesh(MeshShape.parse("tensor=8")))


def test_experts_over_two_axes_are_refused():
    mesh, rules = make_mesh(MeshShape.parse("fsdp=2,expert=4")), {**RULES, "experts": ("expert", "fsdp"), "embed": ()}
    model = nnx.eval_shape(lambda: Transformer(CONFIG, rngs=nnx.Rngs(0), placement=place(CONFIG, mesh, rules)))
    graphdef, params = nnx.split(model)
    with pytest.raises(ConfigError, match="'experts' may be split over one mesh axis, found expert, fsdp"):
        jax.eval_shape(lambda p, t: nnx.merge(graphdef, p).forward(t).hidden, params, jnp.zeros((8, 4), jnp.int32))


def test_random_weights_do_not_depend_on_the_mesh():
    mesh = make_mesh(MeshShape.parse("fsdp=2,expert=2,tensor=2"))
    model = init_model(CONFIG, mesh, seed=3)
    expected = nnx.state(Transformer(CONFIG, rngs=nnx.Rngs(3)))
    for (path, found), (_, wanted) in zip(
        nnx.to_flat_state(nnx.state(model)), nnx.to_flat_state(expected), strict=True
    ):
        np.testing.assert_allclose(found[...], wanted[...], rtol=1e-6, err_msg=str(path))
    assert model.embed.embedding[...].addressable_shards[0].data.shape == (48, 16)


def test_a_training_step_on_a_mesh_and_remat_by_name():
    """The optimizer's state is split as its parameters are, and what is recomputed or kept in the host changes nothing."""
    optimizer, batch = adamw(lambda _: 1e-2, weight_decay=0.1, clip_norm=1.0), rows(BATCH, 40)
    results = []
    for model, remat in (
        (one_device(), None),
        (on_mesh("fsdp=4,tensor=2"), "offload"),
        (on_mesh("fsdp=4,expert=2"), "full"),
    ):
        graphdef, state = init_state(jax.tree.map(jnp.copy, model), optimizer)
        for _ in range(2):
            state, metrics = train_step(graphdef, state, batch, optimizer=optimizer, loss=LossConfig(remat=remat))
        moments = jax.tree.leaves(state.opt_state)
        results.append(float(metrics.loss.loss))
        if remat is not None:
            whole = sum(leaf.size for leaf in moments)
            assert sum(leaf.addressable_shards[0].data.size for leaf in moments) < whole / 3
    np.testing.assert_allclose(results[1:], results[0], rtol=1e-4)  # AdamW divides by small second moments
