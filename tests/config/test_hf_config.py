"""Every spelling of config.json in the facts gives the same ModelConfig, goes back out, and bad ones are refused."""

import copy
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from exaone_jax.config import (
    LayerSpec,
    Llama3RopeScaling,
    ModelConfig,
    MoEConfig,
    VisionConfig,
    from_hf,
    hf,
    published,
    published_names,
    quantization,
    read_config,
    read_config_and_extra,
    read_raw_config,
    to_hf,
)
from exaone_jax.errors import ConfigError

DELETE = object()


def raw(name):
    return read_raw_config(published(name))


def edited(name, changes):
    """A published config.json with some keys changed; `a.b` reaches into an object."""
    result = copy.deepcopy(raw(name))
    for path, value in changes.items():
        *parents, key = path.split(".")
        place = result
        for parent in parents:
            place = place[parent]
        if value is DELETE:
            del place[key]
        else:
            place[key] = value
    return result


def tiny(**changes):
    """A small exaone_moe config.json: four layers, the first dense."""
    config = {
        "model_type": "exaone_moe",
        "vocab_size": 64,
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
        "sliding_window": 8,
        "layer_types": ["sliding_attention"] * 3 + ["full_attention"],
        "first_k_dense_replace": 1,
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "num_shared_experts": 1,
        "moe_intermediate_size": 8,
        "routed_scaling_factor": 2.5,
    } | changes
    return {key: value for key, value in config.items() if value is not DELETE}


def windows(config):
    return [layer.window for layer in config.layers]


# ---- spellings that mean the same -----------------------------------------------------------------------------------

LLAMA3 = {
    "factor": 16.0,
    "high_freq_factor": 4.0,
    "low_freq_factor": 1.0,
    "original_max_position_embeddings": 8192,
    "rope_type": "llama3",
}
SAME = [
    ("EXAONE-4.0-32B", {"rope_theta": DELETE, "rope_scaling": {**LLAMA3, "rope_theta": 1e6}}),
    (
        "EXAONE-4.0-32B",
        {"rope_scaling": DELETE, "rope_theta": DELETE, "rope_parameters": {**LLAMA3, "rope_theta": 1e6}},
    ),
    ("EXAONE-4.0-32B", {"rope_scaling": {**LLAMA3, "rope_theta": 1000000}}),
    ("EXAONE-4.0-32B", {"rope_parameters": {**LLAMA3, "rope_theta": 1e6}}),
    ("EXAONE-4.0-32B", {"rope_theta": DELETE, "rope_parameters": {**LLAMA3, "rope_theta": 1e6}}),
    ("K-EXAONE-236B-A23B", {"rope_scaling": {"type": "default"}, "rope_theta": 1000000}),
    ("EXAONE-4.0-32B", {"rope_scaling.type": "llama3", "rope_scaling.rope_type": DELETE}),
    ("EXAONE-4.0-32B", {"rope_scaling.type": "llama3"}),
    ("EXAONE-4.0-32B", {"layer_types": DELETE}),
    ("EXAONE-4.0-32B", {"layer_types": DELETE, "sliding_window_pattern": 4}),
    ("EXAONE-4.0-32B", {"head_dim": DELETE}),
    ("EXAONE-4.0-32B", {"head_dim": None}),
    ("EXAONE-4.0-32B", {"eos_token_id": [361]}),
    ("EXAONE-4.0-32B", {"torch_dtype": DELETE, "dtype": "bfloat16"}),
    ("EXAONE-4.0-32B", {"dtype": "bfloat16"}),
    ("EXAONE-4.0-32B", {"architectures": None}),
    ("EXAONE-4.0-32B", {"rms_norm_eps": DELETE, "layer_norm_epsilon": 1e-5}),
    ("EXAONE-4.0-1.2B", {"layer_types": DELETE}),
    ("EXAONE-3.5-2.4B-Instruct", {"head_dim": DELETE}),
    ("EXAONE-3.5-2.4B-Instruct", {"num_layers": DELETE, "num_hidden_layers": 30}),
    ("EXAONE-3.5-2.4B-Instruct", {"num_hidden_layers": 30, "ln_no_scale": False}),
    ("EXAONE-3.0-7.8B-Instruct", {"rope_scaling": DELETE}),
    ("K-EXAONE-236B-A23B", {"architectures": ["ExaoneMoEForCausalLM"]}),
    ("K-EXAONE-236B-A23B", {"mlp_layer_types": DELETE}),
    ("K-EXAONE-236B-A23B", {"mlp_layer_types": DELETE, "is_moe_layer": DELETE}),
    (
        "K-EXAONE-236B-A23B",
        {
            "mlp_layer_types": DELETE,
            "is_moe_layer": DELETE,
            "first_k_dense_replace": DELETE,
            "first_last_k_dense_replace": 1,
        },
    ),
    ("K-EXAONE-236B-A23B", {"first_k_dense_replace": 3}),
    ("K-EXAONE-236B-A23B", {"sliding_window": DELETE}),
    ("K-EXAONE-236B-A23B", {"sliding_windows": DELETE}),
    ("K-EXAONE-236B-A23B", {"layer_types": DELETE}),
    ("K-EXAONE-236B-A23B", {"layer_types": DELETE, "sliding_windows": DELETE}),
    ("K-EXAONE-236B-A23B", {"mtp_layer_types": DELETE}),
    ("K-EXAONE-236B-A23B", {"mtp_sliding_windows": DELETE}),
    ("K-EXAONE-236B-A23B", {"n_group": DELETE, "topk_group": DELETE, "norm_topk_prob": DELETE}),
    ("K-EXAONE-236B-A23B", {"rope_parameters": DELETE, "rope_theta": 1000000, "rope_scaling": None}),
    ("K-EXAONE-2.0-750B-A37B", {"layer_types": DELETE}),
    ("EXAONE-4.5-33B", {"text_config.layer_types": ["sliding_attention"] * 3 + ["full_attention"]}),
    ("EXAONE-4.5-33B", {"text_config.model_type": "exaone4"}),
    ("EXAONE-4.5-33B", {"text_config.head_dim": 128}),
    ("EXAONE-4.5-33B", {"dtype": DELETE, "text_config.torch_dtype": "bfloat16"}),
    ("EXAONE-4.5-33B", {"text_config.eos_token_id": DELETE, "eos_token_id": 53}),
]


@pytest.mark.parametrize(("name", "changes"), SAME)
def test_spellings_give_the_same_model(name, changes):
    if name == "EXAONE-4.5-33B" and "text_config.layer_types" in changes:  # the 65 entries of the released FP8 config
        changes = {"text_config.layer_types": changes["text_config.layer_types"] * 16 + ["sliding_attention"]}
    assert from_hf(edited(name, changes))[0] == from_hf(raw(name))[0]


@pytest.mark.parametrize("name", published_names())
def test_published_configs_go_out_and_come_back(name):
    config, extra = read_config_and_extra(published(name))
    out = to_hf(config, extra)
    assert from_hf(out) == (config, extra)
    assert from_hf(json.loads(json.dumps(out))) == (config, extra)
    missing = set(raw(name)) - set(out)
    # what they say is said by layer_types, mlp_layer_types and dtype
    assert missing <= {"sliding_window_pattern", "first_k_dense_replace", "torch_dtype"}


def test_unknown_keys_survive_at_every_level():
    changes = {"vision_config.a": 1, "text_config.b": [None, {"c": 2}], "d": None, "text_config.use_cache": True}
    config, extra = from_hf(edited("EXAONE-4.5-33B", changes))
    out = to_hf(config, extra)
    assert out["vision_config"]["a"] == 1
    assert out["text_config"]["b"] == [None, {"c": 2}]
    assert out["text_config"]["use_cache"] is True
    assert out.get("d", "absent") is None
    assert out["vision_token_id"] == 67
    assert config == read_config(published("EXAONE-4.5-33B"))


def test_quantization_is_found_and_kept():
    fp8 = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    for name, key in (
        ("K-EXAONE-236B-A23B", "quantization_config"),
        ("EXAONE-4.5-33B", "text_config.quantization_config"),
    ):
        config, extra = from_hf(edited(name, {key: fp8}))
        assert quantization(extra) == fp8
        assert from_hf(to_hf(config, extra))[1] == extra
        assert config == read_config(published(name))
    assert quantization(from_hf(raw("EXAONE-4.0-32B"))[1]) is None


# ---- what each family means -----------------------------------------------------------------------------------------


def test_rope_and_norms_by_family():
    old = read_config(published("EXAONE-3.5-7.8B-Instruct"))
    assert {(layer.norm, layer.qk_norm, layer.rope) for layer in old.layers} == {("pre", False, True)}
    small = read_config(published("EXAONE-4.0-1.2B"))
    assert {(layer.norm, layer.qk_norm, layer.rope) for layer in small.layers} == {("post", True, True)}
    for name in ("EXAONE-4.0-32B", "EXAONE-4.5-33B", "K-EXAONE-236B-A23B", "K-EXAONE-2.0-750B-A37B"):
        config = read_config(published(name))
        assert all(layer.rope == (layer.window is not None) for layer in config.layers)
        assert {layer.norm for layer in config.layers} == {"pre" if name.startswith("K-") else "post"}


def test_no_layer_slides():
    # transformers rotates iff sliding_window is None: a number with only global layers means no positions at all
    full = {"layer_types": ["full_attention"] * 4}
    assert [layer.rope for layer in from_hf(tiny(**full, sliding_window=None))[0].layers] == [True] * 4
    assert [layer.rope for layer in from_hf(tiny(**full, sliding_window=8))[0].layers] == [False] * 4
    with pytest.raises(ConfigError, match="sliding_window: missing, and no layer slides"):
        from_hf(tiny(**full, sliding_window=DELETE))


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("LLLG", [8, 8, 8, None, 8, None]),  # the last layer is global
        ("LG", [8, None, 8, None, 8, None]),
        ("L", [8, 8, 8, 8, 8, None]),
        ("G", [None] * 6),
        (4, [8, 8, 8, None, 8, 8]),  # an integer has no such rule
        (1, [None] * 6),
        (0, [None] * 6),
    ],
)
def test_patterns(pattern, expected):
    config, extra = from_hf(tiny(num_hidden_layers=6, layer_types=DELETE, sliding_window_pattern=pattern))
    assert windows(config) == expected
    assert from_hf(to_hf(config, extra)) == (config, extra)


def test_windows_by_layer_beat_the_scalar():
    config, _ = from_hf(tiny(sliding_windows=[4, 16, 8, 0]))
    assert windows(config) == [4, 16, 8, None]
    assert "sliding_window" not in to_hf(config)


def test_mlp_priority():
    def sparse(**keys):
        return [layer.moe for layer in from_hf(tiny(**keys))[0].layers]

    kinds, flags = ["sparse", "dense", "dense", "sparse"], [False, False, True, True]
    assert sparse(mlp_layer_types=kinds, first_k_dense_replace=3) == [True, False, False, True]
    assert sparse(is_moe_layer=flags) == flags
    assert sparse(first_k_dense_replace=3, first_last_k_dense_replace=1) == [False, False, False, True]
    assert sparse(first_k_dense_replace=DELETE, first_last_k_dense_replace=2) == [False, False, True, True]


def test_swiglu_limits():
    config, _ = from_hf(tiny(swiglu_limits=[0, 0.0, 7, 7.0]))
    assert [layer.swiglu_limit for layer in config.layers] == [None, None, 7.0, 7.0]


@pytest.mark.parametrize(
    ("keys", "window"),
    [
        ({}, 8),  # as layer 0
        ({"mtp_layer_types": ["full_attention"]}, None),
        ({"mtp_layer_types": ["sliding_attention"]}, 8),
        ({"mtp_layer_types": ["sliding_attention"], "mtp_sliding_windows": [5]}, 5),
        ({"mtp_sliding_windows": [0]}, None),
    ],
)
def test_mtp_layer(keys, window):
    config, extra = from_hf(tiny(num_nextn_predict_layers=1, mtp_num_speculative_steps=3, **keys))
    assert config.mtp_layer == LayerSpec(window=window, rope=True, norm="pre", qk_norm=True)
    assert config.mtp_num_steps == 3
    assert from_hf(to_hf(config, extra)) == (config, extra)


def test_mtp_keys_without_an_mtp_layer_are_kept():
    config, extra = from_hf(tiny(mtp_layer_types=["full_attention"], num_nextn_predict_layers=0))
    assert config.mtp_layer is None
    assert extra == {"mtp_layer_types": ["full_attention"]}
    assert from_hf(to_hf(config, extra)) == (config, extra)


def test_published_mtp_layers():
    def layer(name):
        return read_config(published(name)).mtp_layer

    assert layer("EXAONE-4.0-32B") is None
    assert layer("K-EXAONE-236B-A23B") == LayerSpec(window=None, rope=True, norm="pre")
    assert layer("EXAONE-4.5-33B") == LayerSpec(window=4096, rope=True, norm="post")
    second = read_config(published("K-EXAONE-2.0-750B-A37B"))
    # The layer slides; its window could not be read in the release. 128 is that of Megatron-Bridge's test of it.
    assert second.mtp_layer == LayerSpec(window=128, rope=True, norm="pre")
    assert second.mtp_num_steps == 4


def test_eos_may_be_several():
    config, _ = from_hf(tiny(eos_token_id=[53, 1]))
    assert config.eos_token_ids == (53, 1)
    assert to_hf(config)["eos_token_id"] == [53, 1]
    assert from_hf(tiny())[0].eos_token_ids == ()


def test_outer_keys_of_exaone4_5():
    config, extra = from_hf(edited("EXAONE-4.5-33B", {"tie_word_embeddings": True}))
    assert config.tie_word_embeddings  # as transformers, which ties by the outer key
    assert from_hf(to_hf(config, extra)) == (config, extra)
    assert from_hf(edited("EXAONE-4.5-33B", {"vision_config": DELETE}))[0].vision is None


# ---- what is refused ------------------------------------------------------------------------------------------------

ROPE = {"rope_type": "llama3", "rope_theta": 1e4, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
BAD = [
    ({"model_type": "exaone_mo"}, r'model_type: found "exaone_mo", expected one of .*did you mean exaone_moe\?'),
    ({"model_type": "llama"}, 'model_type: found "llama"'),
    ({"model_type": None}, "model_type: found null"),
    ({"model_type": ["exaone4"]}, "model_type: found"),
    (
        {"architectures": ["ExaoneMoeForSequenceClassification"]},
        "architectures: found .* expected .*ExaoneMoeForCausalLM",
    ),
    ({"architectures": "ExaoneMoeForCausalLM"}, "architectures: found"),
    ({"hidden_size": DELETE}, "hidden_size: missing, expected an integer of at least 1"),
    ({"hidden_size": -16}, "hidden_size: found -16, expected an integer of at least 1"),
    ({"hidden_size": "16"}, 'hidden_size: found "16"'),
    ({"hidden_size": 16.0}, "hidden_size: found 16.0"),
    ({"hidden_size": True}, "hidden_size: found true"),
    ({"hidden_size": 10**30}, "hidden_size: found 1000"),
    ({"hidden_size": 18}, "head_dim: missing, and hidden_size 18 is not a multiple of num_attention_heads 4"),
    ({"head_dim": 7}, "head_dim must be even"),
    ({"num_hidden_layers": 10**9}, "num_hidden_layers: found 1000000000, expected .* at most"),
    ({"num_layers": 5}, "num_layers: found 5, expected the same value as num_hidden_layers, 4"),
    ({"num_key_value_heads": 3}, "num_heads 4 is not a multiple of num_kv_heads 3"),
    ({"vocab_size": 0}, "vocab_size: found 0"),
    ({"eos_token_id": [2, 2**31]}, "eos_token_id: found .* expected .* below 2"),
    ({"pad_token_id": 2**31}, "pad_token_id: found 2147483648, expected .* at most 2147483647"),
    ({"hidden_act": "gelu"}, 'hidden_act: found "gelu", expected "silu"'),
    ({"activation_function": "relu"}, "activation_function"),
    ({"attention_bias": True}, "attention_bias: found true, expected false"),
    ({"mlp_bias": True}, "mlp_bias: found true, expected false"),
    ({"attention_dropout": 0.1}, "attention_dropout: found 0.1, expected 0"),
    ({"scoring_func": "softmax"}, 'scoring_func: found "softmax", expected "sigmoid"'),
    ({"topk_method": "greedy"}, 'topk_method: found "greedy", expected "noaux_tc"'),
    ({"reorder_qk_norm": False}, "reorder_qk_norm"),
    ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
    ({"rms_norm_eps": 0}, "rms_norm_eps: found 0, expected a number greater than 0"),
    ({"rms_norm_eps": "1e-5"}, "rms_norm_eps: found"),
    ({"initializer_range": -0.02}, "initializer_range: found -0.02"),
    ({"tie_word_embeddings": 1}, "tie_word_embeddings: found 1, expected true or false"),
    ({"eos_token_id": "53"}, "eos_token_id: found"),
    ({"eos_token_id": [53, None]}, "eos_token_id: found"),
    ({"bos_token_id": -1}, "bos_token_id: found -1"),
    ({"bos_token_id": 64}, "bos_token_id: found 64, expected an id below vocab_size 64"),
    ({"eos_token_id": [2, 361]}, "eos_token_id: found 361, expected an id below vocab_size 64"),
    ({"pad_token_id": 10**9}, "pad_token_id: found 1000000000, expected an id below vocab_size 64"),
    ({"torch_dtype": "int8"}, 'torch_dtype: found "int8", expected one of float32, bfloat16, float16'),
    ({"dtype": "float32", "torch_dtype": "bfloat16"}, "torch_dtype: found .* the same value as dtype"),
    ({"rope_parameters": DELETE}, "rope_theta: missing"),
    ({"rope_parameters": "default"}, "rope_parameters: found"),
    ({"rope_parameters": []}, "rope_parameters: found"),
    ({"rope_parameters": 0}, "rope_parameters: found"),
    ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}}, r'rope_parameters.rope_type: found "yarn"'),
    ({"rope_parameters": {"type": "linear", "rope_theta": 1e4}}, r'rope_parameters.type: found "linear"'),
    ({"rope_parameters": ROPE}, r"rope_parameters.factor: missing"),
    ({"rope_parameters": {**ROPE, "factor": 8.0}}, r"rope_parameters.original_max_position_embeddings: missing"),
    (
        {"rope_parameters": {**ROPE, "factor": 8.0, "low_freq_factor": 4.0, "original_max_position_embeddings": 64}},
        "high_freq_factor 4.0 must be greater than low_freq_factor 4.0",
    ),
    ({"rope_parameters": {"rope_theta": 1e4, "fctor": 8.0}}, r"rope_parameters.fctor: .* no such key"),
    (
        {"rope_parameters": {"full_attention": {"rope_theta": 1e4}}, "rope_theta": 1e4},
        r"rope_parameters.full_attention",
    ),
    ({"rope_theta": 5e5}, r"rope_theta: found 500000.0, expected the same value as rope_parameters.rope_theta"),
    ({"rope_parameters": {"rope_theta": float("nan")}}, "rope_theta: found NaN"),
    ({"layer_types": ["sliding_attention"] * 3}, "layer_types: found 3 entries, expected 4"),
    ({"layer_types": ["sliding_attention"] * 6}, "layer_types: found 6 entries, expected 4"),
    ({"layer_types": ["sliding_attention"] * 3 + ["linear_attention"]}, "layer_types: found"),
    ({"layer_types": "LLLG"}, "layer_types: found"),
    ({"layer_types": DELETE}, "sliding_window_pattern: missing"),
    ({"layer_types": DELETE, "sliding_window_pattern": "LLXG"}, "sliding_window_pattern: found"),
    ({"layer_types": DELETE, "sliding_window_pattern": ""}, "sliding_window_pattern: found"),
    ({"sliding_window": DELETE}, "sliding_window: missing, expected the window of the sliding layers"),
    ({"sliding_window": 0}, "sliding_window: found 0"),
    ({"sliding_windows": [8, 8, 8]}, "sliding_windows: found 3 entries, expected 4"),
    ({"sliding_windows": [8, 8, 8, 8]}, r"sliding_windows\[3\]: found 8, expected 0 on a full_attention layer"),
    (
        {"sliding_windows": [8, 0, 8, 0]},
        r"sliding_windows\[1\]: found 0, expected at least 1 on a sliding_attention layer",
    ),
    ({"sliding_windows": [8, 8, -1, 0]}, "sliding_windows: found"),
    ({"swiglu_limits": [7.0]}, "swiglu_limits: found 1 entries, expected 4"),
    ({"swiglu_limits": [7.0, 0, 0, -7.0]}, "swiglu_limits: found"),
    ({"mlp_layer_types": ["dense"] * 3}, "mlp_layer_types: found 3 entries"),
    ({"mlp_layer_types": ["dense", "moe", "moe", "moe"]}, "mlp_layer_types: found"),
    ({"is_moe_layer": [0, 1, 1, 1]}, "is_moe_layer: found"),
    (
        {"mlp_layer_types": ["dense", *["sparse"] * 3], "is_moe_layer": [False, True, True, False]},
        "is_moe_layer: found .* expected true exactly where mlp_layer_types says sparse",
    ),
    ({"first_k_dense_replace": DELETE}, "mlp_layer_types: missing"),
    ({"num_experts": DELETE}, "num_experts: missing"),
    ({"num_experts": 0}, "num_experts: found 0"),
    ({"num_experts_per_tok": 9}, "num_experts_per_tok 9 is more than the 8 experts"),
    ({"n_group": 3}, "num_experts 8 does not divide into n_group 3 groups"),
    ({"n_group": 8, "topk_group": 8}, "a group of experts needs at least 2 members"),
    ({"n_group": 2, "topk_group": 3}, "topk_group 3 is more than n_group 2"),
    ({"num_nextn_predict_layers": 3}, "num_nextn_predict_layers: found 3, expected 0 or 1"),
    ({"num_nextn_predict_layers": -1}, "num_nextn_predict_layers: found -1"),
    ({"num_nextn_predict_layers": 1, "mtp_layer_types": []}, "mtp_layer_types: found 0 entries, expected 1"),
    (
        {"num_nextn_predict_layers": 1, "mtp_layer_types": ["full_attention"], "mtp_sliding_windows": [8]},
        r"mtp_sliding_windows\[0\]: found 8, expected 0",
    ),
    (
        {"num_nextn_predict_layers": 1, "mtp_layer_types": ["sliding_attention"], "mtp_sliding_windows": [0]},
        r"mtp_sliding_windows\[0\]: found 0, expected at least 1",
    ),
    ({"num_nextn_predict_layers": 1, "mtp_num_speculative_steps": 0}, "mtp_num_speculative_steps: found 0"),
]


@pytest.mark.parametrize(("changes", "message"), BAD)
def test_bad_values_name_key_found_and_expected(changes, message):
    with pytest.raises(ConfigError, match=message):
        from_hf(tiny(**changes))


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        (
            "EXAONE-3.5-2.4B-Instruct",
            {"sliding_window": 4096},
            "sliding_window: .* no such key in a model of type exaone",
        ),
        ("EXAONE-3.5-2.4B-Instruct", {"ln_no_scale": True}, "ln_no_scale: found true, expected false"),
        ("EXAONE-3.5-2.4B-Instruct", {"num_nextn_predict_layers": 1}, "num_nextn_predict_layers"),
        ("EXAONE-4.0-32B", {"num_experts": 8}, "num_experts: found 8, expected no such key"),
        ("EXAONE-4.0-32B", {"swiglu_limits": [7.0] * 64}, "swiglu_limits"),
        ("EXAONE-4.0-32B", {"rope_scaling.factor": 0.5}, "factor"),
        (
            "EXAONE-4.0-32B",
            {"rope_parameters": {**LLAMA3, "rope_theta": 1e6, "factor": 8.0}},
            "rope_scaling: found .* expected the same as rope_parameters",
        ),
        (
            "EXAONE-4.0-32B",
            {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}},
            "rope_scaling: found .* expected the same as rope_parameters",
        ),
        (
            "EXAONE-4.0-32B",
            {"rope_parameters": {**LLAMA3, "rope_theta": 1e4}},
            "rope_theta: found 1000000.0, expected the same value as rope_parameters.rope_theta, 10000.0",
        ),
        ("EXAONE-4.0-32B", {"original_max_position_embeddings": 4096}, "original_max_position_embeddings: found 4096"),
        ("EXAONE-4.5-33B", {"text_config": DELETE}, "text_config: found null, expected a JSON object"),
        ("EXAONE-4.5-33B", {"text_config.model_type": "qwen3"}, 'text_config.model_type: found "qwen3"'),
        ("EXAONE-4.5-33B", {"text_config.hidden_size": 0}, "text_config.hidden_size: found 0"),
        ("EXAONE-4.5-33B", {"text_config.rope_scaling.rope_type": "yarn"}, "text_config.rope_scaling.rope_type: found"),
        ("EXAONE-4.5-33B", {"vision_config.depth": None}, "vision_config.depth: missing"),
        ("EXAONE-4.5-33B", {"vision_config": []}, r"vision_config: found \[\], expected a JSON object"),
    ],
)
def test_bad_values_of_other_families(name, changes, message):
    with pytest.raises(ConfigError, match=message):
        from_hf(edited(name, changes))


@pytest.mark.parametrize("value", [None, [], "x", 3])
def test_a_config_must_be_an_object(value):
    with pytest.raises(ConfigError, match="expected a JSON object"):
        from_hf(value)


def test_to_hf_refuses_what_no_config_json_says():
    config = from_hf(tiny())[0]
    rotated = config.layers[3].model_copy(update={"rope": True})
    with pytest.raises(ConfigError, match=r"layers\[3\] is .*rope=True.* would be read as .*rope=False"):
        to_hf(config.model_copy(update={"layers": (*config.layers[:3], rotated)}))
    with pytest.raises(ConfigError, match="extra hidden_size: found 3"):
        to_hf(config, {"hidden_size": 3})


# ---- files ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not valid JSON"),
        (b'{"a": 1,}', "not valid JSON.*line 1 column"),
        (b'{"a": 1', "not valid JSON"),
        (b"[1, 2]", "found a JSON list, expected an object"),
        (b'{"a": NaN}', "NaN is not a number in JSON"),
        (b'{"model_type": "exaone4", "model_type": "exaone"}', "key 'model_type' appears twice"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 3\n", "Git LFS pointer"),
        (b"<!DOCTYPE html><html></html>", "HTML or XML page"),
        (b"\xff\xfe{}", "not UTF-8 text"),
        (b'{"a": ' + b"[" * 100_000, "nested too deeply|not valid JSON"),
        (b'{"a": ' + b"1" * 10_000 + b"}", "not valid JSON"),
        (b"{}", "model_type: found null"),
    ],
)
def test_bad_files_name_the_path(tmp_path, content, message):
    path = tmp_path / "config.json"
    path.write_bytes(content)
    for place in (path, tmp_path):
        with pytest.raises(ConfigError, match=message) as error:
            read_config(place)
        assert str(tmp_path) in str(error.value)


def test_missing_and_oversized_files(tmp_path):
    with pytest.raises(ConfigError, match=r"absent: no such file"):
        read_config(tmp_path / "absent")
    with pytest.raises(ConfigError, match=r"config.json: no such file"):
        read_config(tmp_path)
    with (tmp_path / "config.json").open("wb") as file:
        file.truncate(1 << 30)
    with pytest.raises(ConfigError, match="too large for a config"):
        read_config(tmp_path)


def test_a_directory_named_config_json(tmp_path):
    (tmp_path / "config.json").mkdir()
    for place in (tmp_path, tmp_path / "config.json"):
        with pytest.raises(ConfigError, match=r"[^n]/config.json: cannot be read: Is a directory"):
            read_config(place)


def test_a_directory_is_read(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(tiny()))
    assert read_config(tmp_path) == read_config(tmp_path / "config.json") == from_hf(tiny())[0]


def test_published_names():
    assert len(published_names()) == 13
    with pytest.raises(ConfigError, match=r"did you mean K-EXAONE-236B-A23B\?"):
        published("k-exaone-236b")
    with pytest.raises(ConfigError, match=r"no published model '\.\./x'"):
        published("../x")


def test_configs_are_found_in_an_installed_wheel(tmp_path, monkeypatch):
    models = tmp_path / "exaone_jax" / "configs" / "models"  # where the wheel puts configs/
    models.mkdir(parents=True)
    (models / "EXAONE-X.json").write_text("{}")
    monkeypatch.setattr(hf, "__file__", str(tmp_path / "exaone_jax" / "config" / "hf.py"))
    assert published_names() == ("EXAONE-X",)
    assert published("EXAONE-X") == models / "EXAONE-X.json"
    models.rename(tmp_path / "gone")
    with pytest.raises(ConfigError, match="the installation is incomplete"):
        published("EXAONE-X")


# ---- any model goes out and comes back ------------------------------------------------------------------------------

SCALING = st.builds(
    Llama3RopeScaling,
    factor=st.floats(1, 64),
    low_freq_factor=st.floats(0.5, 2),
    high_freq_factor=st.floats(3, 8),
    original_max_position_embeddings=st.integers(1, 8192),
)
MOE = st.builds(
    MoEConfig,
    num_experts=st.just(16),
    num_experts_per_tok=st.integers(1, 4),
    num_shared_experts=st.integers(0, 2),
    intermediate_size=st.integers(1, 64),
    n_group=st.sampled_from([1, 2, 4]),
    topk_group=st.just(1),
    norm_topk_prob=st.booleans(),
    routed_scaling_factor=st.floats(0.5, 4),
)
SMALL = st.integers(1, 64)
VISION = st.builds(VisionConfig, **dict.fromkeys(VisionConfig.model_fields, SMALL))
# What from_hf could not tell from a key of the model is free: any JSON under names that no config uses.
EXTRA = st.dictionaries(
    st.text(min_size=1).map("x_{}".format), st.none() | st.booleans() | st.integers() | st.lists(st.text()), max_size=3
)


@st.composite
def layer_specs(draw, model_type):
    count = draw(st.integers(1, 9))
    if model_type == "exaone":
        return (LayerSpec(norm="pre", qk_norm=False),) * count
    sizes = [draw(SMALL)] if model_type != "exaone_moe" else draw(st.lists(SMALL, min_size=1, max_size=3))
    chosen = draw(st.lists(st.sampled_from([None, *sizes]), min_size=count, max_size=count))
    rotated = not any(chosen) and draw(st.booleans())
    moe = model_type == "exaone_moe"
    return tuple(
        LayerSpec(
            window=window,
            rope=rotated or window is not None,
            norm="pre" if moe else "post",
            moe=moe and draw(st.booleans()),
            swiglu_limit=draw(st.none() | st.floats(0.5, 10)) if moe else None,
        )
        for window in chosen
    )


@st.composite
def model_configs(draw, model_type):
    layers = draw(layer_specs(model_type))
    kv_heads = draw(st.integers(1, 4))
    vocab_size = draw(SMALL)
    token = st.integers(0, vocab_size - 1)
    mtp = None
    if model_type != "exaone" and draw(st.booleans()):
        mtp = LayerSpec(window=draw(st.none() | SMALL), rope=True, norm=layers[0].norm)
    return ModelConfig(
        model_type=model_type,
        vocab_size=vocab_size,
        hidden_size=draw(SMALL),
        intermediate_size=draw(SMALL),
        num_heads=kv_heads * draw(st.integers(1, 4)),
        num_kv_heads=kv_heads,
        head_dim=2 * draw(st.integers(1, 64)),
        layers=layers,
        moe=draw(MOE) if any(layer.moe for layer in layers) or model_type == "exaone_moe" else None,
        mtp_layer=mtp,
        mtp_num_steps=draw(st.integers(1, 4)) if mtp else 1,
        rms_norm_eps=draw(st.floats(1e-8, 1e-3)),
        rope_theta=draw(st.floats(1e3, 1e7)),
        rope_scaling=draw(st.none() | SCALING),
        max_position_embeddings=draw(st.integers(1, 2**20)),
        tie_word_embeddings=draw(st.booleans()),
        initializer_range=draw(st.floats(0, 1)),
        bos_token_id=draw(st.none() | token),
        eos_token_ids=tuple(draw(st.lists(token, max_size=3))),
        pad_token_id=draw(st.none() | token),
        dtype=draw(st.sampled_from(["float32", "bfloat16", "float16"])),
        vision=draw(st.none() | VISION) if model_type == "exaone4_5" else None,
    )


@pytest.mark.parametrize("model_type", ["exaone", "exaone4", "exaone_moe", "exaone4_5"])
@settings(max_examples=80, deadline=None)
@given(data=st.data())
def test_any_model_round_trips(model_type, data):
    config, extra = data.draw(model_configs(model_type)), data.draw(EXTRA)
    if config.model_type == "exaone4_5" and extra:
        extra = extra | {"text_config": dict(extra)} | ({"vision_config": dict(extra)} if config.vision else {})
    out = json.loads(json.dumps(to_hf(config, extra)))
    assert from_hf(out) == (config, extra)
