"""Adapters beside a frozen model: their product and gradients, what is frozen in 8 and 4 bits, runs, and PEFT's files."""

import json
import re
from pathlib import Path
from typing import cast

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file

import exaone_jax
from exaone_jax.checkpoints import load
from exaone_jax.checkpoints.convert import save_hf
from exaone_jax.checkpoints.names import Parameter
from exaone_jax.config import ModelConfig
from exaone_jax.config.run import LoraConfig
from exaone_jax.data import pack
from exaone_jax.errors import CheckpointError, ConfigError
from exaone_jax.model import Transformer
from exaone_jax.model.linear import Frozen, RouterBias
from exaone_jax.model.quantized import NF4, Quantized
from exaone_jax.training.loop import ADAPTER, Outcome, train
from exaone_jax.training.lora import adapt, merge_adapters, save_adapter
from exaone_jax.training.loss import LossConfig, total_loss
from exaone_jax.training.setup import initial_state, set_up
from tests.training.runs import DENSE, SPARSE, small_run

EVERY = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "experts")
LORA = LoraConfig(rank=3, alpha=6.0, targets=EVERY, base="float32")


def with_random_adapters(model: Transformer, lora: LoraConfig = LORA) -> Transformer:
    """Whose b is not zero, as that of a fresh one is."""
    adapt(model, lora, nnx.Rngs(1))
    graphdef, params, rest = nnx.split(model, nnx.Param, ...)
    keys = iter(jax.random.split(jax.random.key(2), len(jax.tree.leaves(params))))
    return nnx.merge(graphdef, jax.tree.map(lambda x: 0.1 * jax.random.normal(next(keys), x.shape), params), rest)


def test_an_adapted_model_is_the_merged_one_and_starts_as_the_base(model: Transformer, batch) -> None:
    adapted = nnx.clone(model)
    adapt(adapted, LORA, nnx.Rngs(1))
    np.testing.assert_array_equal(adapted(batch.tokens), model(batch.tokens))
    changed = with_random_adapters(nnx.clone(model))
    merged = nnx.clone(changed)
    merge_adapters(merged, jnp.float32)
    assert nnx.to_flat_state(nnx.state(merged)).paths == nnx.to_flat_state(nnx.state(model)).paths
    assert np.abs(changed(batch.tokens) - model(batch.tokens)).max() > 0.1
    np.testing.assert_allclose(changed(batch.tokens), merged(batch.tokens), rtol=0, atol=2e-5)


def test_gradients_are_those_through_the_merged_matrices(model: Transformer, batch) -> None:
    changed = with_random_adapters(model)
    graphdef, params, rest = nnx.split(changed, nnx.Param, ...)

    def merged_loss(params: nnx.State) -> jax.Array:
        merged = nnx.merge(graphdef, params, rest)
        merge_adapters(merged, jnp.float32)
        return total_loss(merged, batch, LossConfig())[0]

    ours = jax.jit(jax.grad(lambda p: total_loss(nnx.merge(graphdef, p, rest), batch, LossConfig())[0]))(params)
    theirs = jax.jit(jax.grad(merged_loss))(params)
    for (path, found), expected in zip(nnx.to_flat_state(ours), jax.tree.leaves(theirs), strict=True):
        size = np.abs(expected).max()
        assert size > 0, path
        # float32 sums in other orders, and a merged matrix is rounded once more: 2e-5 of the largest was seen, and any
        # mistake in a factor is of the order of 1
        np.testing.assert_allclose(found[...], expected, rtol=0, atol=1e-4 * size, err_msg=str(path))


def test_no_gradient_of_a_frozen_matrix_is_made() -> None:
    """The backward pass of a dense model then costs what the forward pass does: two thirds of the products are left."""
    config = ModelConfig.model_validate(DENSE | {"hidden_size": 128, "intermediate_size": 512, "vocab_size": 64})
    rows = pack([np.arange(64, dtype=np.int32)] * 4, 64, pad_id=0)

    def flops(model: Transformer) -> float:
        graphdef, params, rest = nnx.split(model, nnx.Param, ...)
        step = jax.jit(jax.grad(lambda p, rest: total_loss(nnx.merge(graphdef, p, rest), rows, LossConfig())[0]))
        return cast(dict[str, float], step.lower(params, rest).compile().cost_analysis())["flops"]

    model = Transformer(config, rngs=nnx.Rngs(0))
    whole = flops(nnx.clone(model))
    adapt(model, LORA.model_copy(update={"rank": 1, "targets": ("q_proj", "down_proj")}), nnx.Rngs(0))
    assert flops(model) < 0.75 * whole


def test_what_is_frozen_has_no_parameters_left(model: Transformer) -> None:
    targets = ("q_proj", "experts")
    adapt(model, LoraConfig(rank=2, targets=targets, base="nf4"), nnx.Rngs(0))
    _, params, biases, frozen = nnx.split(model, nnx.Param, RouterBias, Frozen)
    adapted = {path[-3] if path[-3] != "adapters" else "experts" for path, _ in nnx.to_flat_state(params)}
    assert adapted == set(targets)
    assert not any(path[0] == "mtp" for path, _ in nnx.to_flat_state(params))
    kinds = {path[-1]: leaf.dtype for path, leaf in nnx.to_flat_state(frozen) if path[-1] in ("codes", "embedding")}
    assert kinds == {"codes": jnp.uint8, "embedding": jnp.bfloat16}
    assert {leaf.dtype for leaf in jax.tree.leaves(biases)} == {jnp.dtype("float32")}


def test_a_target_that_no_layer_has_is_refused() -> None:
    config = set_up(small_run(Path("unused"), model=DENSE)).model
    with pytest.raises(ConfigError, match=r"lora\.targets: this model has no experts$"):
        adapt(Transformer(config, rngs=nnx.Rngs(0)), LORA, nnx.Rngs(0))
    tied = config.model_copy(update={"tie_word_embeddings": True})
    with pytest.raises(ConfigError, match=r"this model has no lm_head; its output head is the embedding"):
        adapt(Transformer(tied, rngs=nnx.Rngs(0)), LoraConfig(targets=("q_proj", "lm_head")), nnx.Rngs(0))


def test_int8_rounds_each_row_to_127_steps() -> None:
    weight = np.random.default_rng(0).normal(size=(2, 5, 96)).astype(np.float32)
    weight[0, 0] = 0
    found = Quantized(jnp.asarray(weight), ("layers", "mlp", "embed"), "int8")[...]
    step = np.abs(weight).max(-1, keepdims=True) / 127
    assert np.all(np.abs(found - weight) <= 0.5001 * step)
    np.testing.assert_array_equal(found[0, 0], 0)


def test_nf4_takes_the_nearest_level_of_each_block() -> None:
    weight = np.random.default_rng(0).normal(size=(2, 5, 128)).astype(np.float32)
    weight[0, 0] = 0
    found = Quantized(jnp.asarray(weight), ("layers", "mlp", "embed"), "nf4")
    assert found.codes.shape == (2, 5, 64) and found.scale.shape == (2, 5, 2)
    blocks = weight.reshape(2, 5, 2, 64)
    most = np.abs(blocks).max(-1, keepdims=True)
    levels = np.asarray(NF4, np.float32) * np.where(most == 0, 1, most)[..., None]
    nearest = np.abs(blocks[..., None] - levels).argmin(-1)
    expected = np.take_along_axis(levels, nearest[..., None], -1)[..., 0].reshape(weight.shape)
    np.testing.assert_allclose(found[...], expected, rtol=1e-6, atol=1e-7)
    with pytest.raises(ValueError, match="rows of 3"):
        Quantized(jnp.ones((2, 3)), ("mlp", "embed"), "nf4")


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    """A checkpoint of every kind of layer, with weights wide enough for adapters of its layers to change much."""
    folder = tmp_path_factory.mktemp("base")
    model = SPARSE | {"num_kv_heads": 2, "initializer_range": 0.2}
    config = set_up(small_run(folder, model=model)).model
    save_hf(nnx.state(Transformer(config, rngs=nnx.Rngs(3))), config, folder / "hf")
    return folder / "hf"


def lora_run(folder: Path, base: Path, **changes):
    targets = ["q_proj", "o_proj", "down_proj", "experts"]
    lora = {"rank": 2, "alpha": 4.0, "targets": targets, "base": "float32"} | changes.pop("lora", {})
    return small_run(folder, model=None, init_from=str(base), lora=lora, **changes)


FOUR_BITS = {
    "lora": {"base": "nf4"},
    "steps": 12,
    "save": {"every": 4},
    "optimizer": {"learning_rate": 1e-2, "weight_decay": 0.0},
    "sample": {"prompts": ["line"], "max_new_tokens": 2, "every": 6},
    "ema": 0.5,
}


@pytest.fixture(scope="module")
def whole(base: Path, tmp_path_factory) -> tuple[Outcome, Path]:
    folder = tmp_path_factory.mktemp("whole")
    return train(lora_run(folder, base, **FOUR_BITS)), folder / "run"


def test_a_run_trains_adapters_alone_and_goes_on_bit_for_bit(whole, base: Path, tmp_path: Path, capsys) -> None:
    train(lora_run(tmp_path, base, stop_after=5, **FOUR_BITS))
    assert re.search(r"\b960 parameters of adapters are trained, 3\.45% of the model's 27,860", capsys.readouterr().out)
    parts, (straight, _) = train(lora_run(tmp_path, base, **FOUR_BITS)), whole
    assert (straight.steps, straight.loss, straight.sha256) == (parts.steps, parts.loss, parts.sha256)
    with pytest.raises(CheckpointError, match="adapters alone"):
        exaone_jax.load(tmp_path / "run" / "checkpoints" / "step_00000012")


def test_the_loss_falls_on_any_mesh(whole, base: Path, tmp_path: Path) -> None:
    one, folder = whole
    split = train(lora_run(tmp_path, base, mesh="fsdp=2,expert=2,tensor=2", **FOUR_BITS))
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert one.loss < next(line["loss"] for line in lines if "loss" in line) - 0.5
    assert split.loss == pytest.approx(one.loss, rel=1e-4)


def test_the_files_that_a_run_leaves_are_the_base_and_what_was_added(base: Path, tmp_path: Path) -> None:
    """Read as PEFT's definition has them: W + alpha / r B A, a stack's ranks side by side, gate and up in one matrix."""
    train(lora_run(tmp_path, base, export=str(tmp_path / "merged")))
    folder = tmp_path / "run" / ADAPTER
    settings = json.loads((folder / "adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == str(base) and settings["r"] == 2
    adapter = load_file(folder / "adapter_model.safetensors")
    before, after = (load_file(path / "model.safetensors") for path in (base, tmp_path / "merged"))

    def product(name: str, experts: int | None = None) -> np.ndarray:
        a, b = (adapter[f"base_model.model.{name}.lora_{side}.weight"] for side in "AB")
        if experts is None:
            return 2.0 * b @ a
        return 2.0 * np.einsum("ore,eri->eoi", b.reshape(len(b), -1, experts), a.reshape(experts, -1, a.shape[-1]))

    up, down = (product(f"model.layers.1.mlp.experts{inner}", 4) for inner in (".base_layer", ""))
    expected = {
        name: product(name.removesuffix(".weight"))
        for name in before
        if name.endswith(("q_proj.weight", "o_proj.weight")) and not name.startswith("mtp.")
    }
    expected |= {
        name: product(name.removesuffix(".weight"))
        for name in ("model.layers.0.mlp.down_proj.weight", "model.layers.1.mlp.shared_experts.down_proj.weight")
    }
    for e in range(4):
        prefix = f"model.layers.1.mlp.experts.{e}"
        expected |= {
            f"{prefix}.gate_proj.weight": up[e, :8],
            f"{prefix}.up_proj.weight": up[e, 8:],
            f"{prefix}.down_proj.weight": down[e],
        }
    assert after.keys() == before.keys()
    for name, weight in after.items():
        change = expected.pop(name, 0.0)
        np.testing.assert_allclose(weight, before[name] + change, rtol=0, atol=1e-6, err_msg=name)
        assert np.any(change) or np.array_equal(weight, before[name]), name
    assert not expected


def test_another_base_or_rank_is_refused(base: Path, tmp_path: Path) -> None:
    train(lora_run(tmp_path, base, stop_after=2))
    with pytest.raises(ConfigError, match="another lora than this run's"):
        train(lora_run(tmp_path, base, lora={"alpha": 8.0}))
    config = set_up(lora_run(tmp_path, base)).model
    other = tmp_path / "other"
    save_hf(nnx.state(Transformer(config, rngs=nnx.Rngs(4))), config, other)
    with pytest.raises(ConfigError, match="another init_from than this run's"):
        train(lora_run(tmp_path, other))


@pytest.mark.parametrize(
    ("lora", "message"),
    [
        ({"rank": 2}, "lora: needs init_from"),
        ({"rank": 0}, r"lora\.rank: .*greater than 0"),
        ({"targets": ["router"]}, r"lora\.targets\.0: .*'q_proj'.*'experts'"),
        ({"targets": []}, r"lora\.targets: .*at least 1"),
        ({"ranks": 2}, r"lora\.ranks.*rank"),
        ({"base": "int4"}, r"lora\.base: .*'nf4'"),
    ],
)
def test_what_cannot_be_is_refused_by_name(lora: dict[str, object], message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        small_run(tmp_path, lora=lora)


def test_a_base_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="nowhere"):
        train(lora_run(tmp_path, tmp_path / "nowhere"))


def test_a_base_is_quantised_as_it_is_read(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """When a matrix is read, none of those before it is there in another form than its codes."""
    setup, alive, read = set_up(lora_run(tmp_path, base, lora={"base": "int8"})), [], load._sharded
    codes = [value.shape for path, value in nnx.to_flat_state(setup.like.frozen) if path[-1] == "codes"]

    def noted(parameter: Parameter, *args) -> jax.Array:
        if (
            parameter.path[0] == "segments"
        ):  # that layer's matrices stay in bfloat16, those of multi-token prediction too
            alive.append(sum(x.dtype == jnp.bfloat16 and x.ndim > 2 and x.shape in codes for x in jax.live_arrays()))
        return read(parameter, *args)

    monkeypatch.setattr(load, "_sharded", noted)
    initial_state(setup)
    assert len(alive) > len(codes) > 10 and not any(alive)


def test_the_fresh_adapters_do_not_depend_on_the_mesh(base: Path, tmp_path: Path) -> None:
    meshes = ("data=-1", "fsdp=4,expert=2")
    states = [initial_state(set_up(lora_run(tmp_path, base, mesh=mesh))).model for mesh in meshes]
    jax.tree.map(np.testing.assert_array_equal, *states)


@pytest.mark.parametrize(
    ("name", "targets"),
    [
        ("exaone4-hybrid", EVERY[:-1]),
        ("exaone4-hybrid", ("down_proj",)),
        ("exaone_moe", EVERY),
        ("exaone_moe", ("experts",)),
        ("exaone_moe", ("gate_proj", "experts")),
        ("exaone_moe", ("o_proj", "lm_head")),
        ("exaone4-hybrid", ("lm_head",)),
    ],
)
def test_peft_loads_the_adapter_and_says_the_same(name: str, targets: tuple[str, ...], tmp_path: Path) -> None:
    torch, peft = pytest.importorskip("torch"), pytest.importorskip("peft")
    from tests.golden.cases import batch
    from tests.model.hf_models import build
    from tests.model.parity import assert_parity

    hf = build(name, tmp_path / "model")
    lora = LORA.model_copy(update={"targets": targets})
    model = with_random_adapters(exaone_jax.load(hf.saved, dtype="float32", scan_layers=True), lora)
    save_adapter(nnx.state(model, nnx.Param), model.config, lora, tmp_path / "adapter", str(hf.saved))
    tokens = batch(name)[:1, :64]
    plain = hf.logits(tokens)
    loaded = peft.PeftModel.from_pretrained(hf.model, tmp_path / "adapter").eval()
    assert not [n for n, p in loaded.named_parameters() if "lora_B" in n and not p.any()]  # all of them were found
    with torch.no_grad():
        logits = loaded(input_ids=torch.from_numpy(tokens), use_cache=False).logits.numpy()
    assert np.abs(logits - plain).max() > 0.1
    assert_parity(model(tokens)[0], logits[0])
