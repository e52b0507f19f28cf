"""Names and counts: every published model, shape only, to the last parameter and tensor."""

import re

import pytest

from exaone_jax.checkpoints.names import Totals, parameters, path_name, tensor_map, totals
from exaone_jax.config.hf import published, published_names, read_config
from exaone_jax.config.model import LayerSpec, ModelConfig
from exaone_jax.errors import ConfigError
from tests.checkpoints.synthetic import MODELS, SMALL, exaone_moe

SMALL_2B, SMALL_7B, BIG_32B = (2_405_327_360, 30), (7_818_448_896, 32), (32_003_200_000, 64)
PUBLISHED = {  # parameters, tensors, bytes of data (the router bias is float32, the rest bfloat16)
    "EXAONE-3.0-7.8B-Instruct": SMALL_7B,
    "EXAONE-3.5-2.4B-Instruct": SMALL_2B,
    "EXAONE-3.5-7.8B-Instruct": SMALL_7B,
    "EXAONE-3.5-32B-Instruct": BIG_32B,
    "EXAONE-Deep-2.4B": SMALL_2B,
    "EXAONE-Deep-7.8B": SMALL_7B,
    "EXAONE-Deep-32B": BIG_32B,
}
COUNTS = {
    name: (size, 9 * layers + (2 if size == SMALL_2B[0] else 3)) for name, (size, layers) in PUBLISHED.items()
} | {
    "EXAONE-4.0-1.2B": (1_279_391_488, 11 * 30 + 2),
    "EXAONE-4.0-32B": (32_003_216_384, 11 * 64 + 3),
    "EXAONE-4.0.1-32B": (32_003_216_384, 11 * 64 + 3),
    "EXAONE-4.5-33B": (34_350_097_664, 1_064),
    "K-EXAONE-236B-A23B": (237_099_669_632, 18_688),
    "K-EXAONE-2.0-750B-A37B": (749_357_484_800, 59_396),
}
INDEX_BYTES = {"K-EXAONE-236B-A23B": 474_199_351_296, "K-EXAONE-2.0-750B-A37B": 1_498_715_008_512}


def test_every_published_model_is_counted():
    assert set(published_names()) == set(COUNTS)


@pytest.mark.parametrize("name", COUNTS)
def test_published_counts(name: str):
    config = read_config(published(name))
    found = totals(config)
    assert (found.parameters, found.tensors) == COUNTS[name]
    if name in INDEX_BYTES:
        assert found.bytes == INDEX_BYTES[name]


@pytest.mark.parametrize("name", COUNTS)
def test_every_tensor_is_mapped_once_and_fills_its_parameter(name: str):
    config = read_config(published(name))
    maps = tensor_map(config)
    assert len({tensor.name for tensor in maps}) == len(maps)
    assert len({(tensor.path, tensor.index) for tensor in maps}) == len(maps)
    for parameter in parameters(config).values():
        count = 1
        for size in parameter.stacked:
            count *= size
        assert len(parameter.tensors) == count
        assert {tensor.shape for tensor in parameter.tensors} == {parameter.shape[len(parameter.stacked) :]}


def test_k_exaone_names_and_shapes():
    """Spot checks against the index of the published repository (facts, section 3)."""
    maps = {tensor.name: tensor for tensor in tensor_map(read_config(published("K-EXAONE-236B-A23B")))}
    assert maps["model.layers.0.mlp.gate_proj.weight"].shape == (18432, 6144)
    assert maps["model.layers.1.mlp.experts.127.down_proj.weight"].shape == (6144, 2048)
    assert maps["model.layers.47.self_attn.q_proj.weight"].shape == (8192, 6144)
    assert maps["model.layers.3.mlp.shared_experts.up_proj.weight"].shape == (2048, 6144)
    assert maps["model.layers.5.mlp.gate.weight"].shape == (128, 6144)
    assert maps["mtp.fc.weight"].shape == (6144, 12288)
    assert maps["mtp.layers.0.mlp.down_proj.weight"].shape == (6144, 18432)
    bias = maps["model.layers.5.mlp.e_score_correction_bias"]
    assert (bias.shape, bias.keep_float32) == ((128,), True)
    assert sum(name.startswith("mtp.") for name in maps) == 15


def test_norms_of_the_two_placements_do_not_mix():
    """`post_attention_layernorm` is inside the residual branch in EXAONE 4 and before the MLP in K-EXAONE."""

    def path_of(config: ModelConfig) -> str:
        maps = tensor_map(config)
        return next(path_name(t.path) for t in maps if t.name.endswith("layers.1.post_attention_layernorm.weight"))

    assert path_of(MODELS["exaone4"]).endswith("post_attention_norm.scale")
    assert path_of(MODELS["exaone_moe"]).endswith("mlp_norm.scale")


def test_exaone3_gate_and_up():
    maps = {tensor.name: tensor for tensor in tensor_map(MODELS["exaone"])}
    assert path_name(maps["transformer.h.1.mlp.c_fc_0.weight"].path).endswith("gate_proj.weight")
    assert path_name(maps["transformer.h.1.mlp.c_fc_1.weight"].path).endswith("up_proj.weight")
    assert path_name(maps["transformer.h.1.attn.attention.out_proj.weight"].path).endswith("o_proj.weight")


def test_tied_models_have_no_head():
    for name in ("exaone-tied", "exaone4-tied"):
        assert not any("lm_head" in tensor.name for tensor in tensor_map(MODELS[name]))


def test_layer_numbers_follow_the_plan():
    """Layer index = start of the segment + repeat x pattern length + place in the pattern."""
    config = exaone_moe(layers=12)
    layers = {}
    for tensor in tensor_map(config):
        match = re.fullmatch(r"model\.layers\.(\d+)\.self_attn\.q_proj\.weight", tensor.name)
        if match:
            layers[(tensor.path[1], tensor.index[0], tensor.path[2])] = int(match.group(1))
    assert [layers[key] for key in sorted(layers)] == list(range(12))
    assert {key[0] for key in layers} == {0, 1}  # the block with the dense layer, then LLLG twice


def test_totals_of_a_tiny_model_by_hand():
    small = SMALL | {"vocab_size": 8, "hidden_size": 4, "intermediate_size": 6, "num_heads": 2, "num_kv_heads": 1}
    small |= {"eos_token_ids": (2,)}
    config = ModelConfig(model_type="exaone", layers=(LayerSpec(qk_norm=False),), **(small | {"head_dim": 2}))
    attention, mlp, norms = 4 * 4 + 2 * 2 * 4 + 4 * 4, 3 * 4 * 6, 3 * 4
    size = 2 * 8 * 4 + attention + mlp + norms
    assert totals(config) == Totals(tensors=12, parameters=size, bytes=2 * size)


def test_a_layer_without_names_is_an_error():
    config = MODELS["exaone4"].model_copy(update={"layers": (LayerSpec(norm="pre"),)})
    with pytest.raises(ConfigError, match=r"'exaone4' has no tensor for input_norm\.scale"):
        tensor_map(config)
