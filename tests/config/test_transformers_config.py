"""transformers' own config classes read what `to_hf` writes to the same network, and `from_hf` reads what they save."""

import json

import pytest

from exaone_jax.config import from_hf, published, published_names, read_config_and_extra, to_hf

transformers = pytest.importorskip("transformers", minversion="5.1")
if not hasattr(transformers, "Exaone4_5_Config"):
    pytest.skip("this transformers has no EXAONE 4.5", allow_module_level=True)

CLASSES = {
    "exaone4": transformers.Exaone4Config,
    "exaone_moe": transformers.ExaoneMoeConfig,
    "exaone4_5": transformers.Exaone4_5_Config,
}
NAMES = [name for name in published_names() if name.startswith(("EXAONE-4", "K-"))]  # `exaone` is not in transformers

COMPUTED = [
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "hidden_act",
    "rms_norm_eps",
    "rope_parameters",
    "layer_types",
    "max_position_embeddings",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
    "initializer_range",
    "attention_dropout",
    "mlp_layer_types",
    "num_experts",
    "num_experts_per_tok",
    "num_shared_experts",
    "moe_intermediate_size",
    "n_group",
    "topk_group",
    "norm_topk_prob",
    "routed_scaling_factor",
]


def load(directory, raw):
    (directory / "config.json").write_text(json.dumps(raw))
    return CLASSES[raw["model_type"]].from_pretrained(directory)


def network(config):
    """What transformers computes with: the values that its modelling files read."""
    text = config.get_text_config()
    fields = {key: getattr(text, key, None) for key in COMPUTED}
    fields["head_dim"] = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    fields["tie_word_embeddings"] = config.tie_word_embeddings
    fields["dtype"] = str(config.dtype)
    fields["sliding_window"] = text.sliding_window
    if hasattr(config, "vision_config"):
        fields["vision"] = config.vision_config.to_dict()
    return fields


def compare(hf, config):
    """`hf`, a transformers config, against the ModelConfig that we read from the same file."""
    text = hf.get_text_config()
    assert text.num_hidden_layers == config.num_layers
    slides = [kind == "sliding_attention" for kind in text.layer_types]
    assert [text.sliding_window if slide else None for slide in slides] == [layer.window for layer in config.layers]
    # the rule of its modelling files: `if self.sliding_window is None or self.is_sliding`
    assert [text.sliding_window is None or slide for slide in slides] == [layer.rope for layer in config.layers]
    sparse = [kind == "sparse" for kind in getattr(text, "mlp_layer_types", ["dense"] * len(slides))]
    assert sparse == [layer.moe for layer in config.layers]
    rope = dict(text.rope_parameters)
    assert rope.pop("rope_theta") == config.rope_theta
    assert rope.pop("rope_type") == ("default" if config.rope_scaling is None else "llama3")
    rope.pop("type", None)
    assert rope == ({} if config.rope_scaling is None else config.rope_scaling.model_dump())
    assert (getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads) == config.head_dim
    assert text.num_key_value_heads == config.num_kv_heads
    assert text.rms_norm_eps == config.rms_norm_eps
    assert hf.tie_word_embeddings == config.tie_word_embeddings


@pytest.mark.parametrize("name", NAMES)
def test_published(tmp_path, name):
    config, extra = read_config_and_extra(published(name))
    theirs = load(tmp_path, json.loads(published(name).read_text()))
    ours = load(tmp_path, to_hf(config, extra))
    assert network(ours) == network(theirs)
    if name != "K-EXAONE-2.0-750B-A37B":  # 5.23 reads its windows as 4096 each
        compare(ours, config)
    # what transformers saves keeps every key, so it is the same model
    ours.save_pretrained(tmp_path)
    saved, _ = from_hf(json.loads((tmp_path / "config.json").read_text()))
    assert saved == config


E4 = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4}
E4 |= {"num_key_value_heads": 2, "max_position_embeddings": 256}
S, F = "sliding_attention", "full_attention"
LLAMA3 = {"rope_type": "llama3", "rope_theta": 1e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA3 |= {"original_max_position_embeddings": 64}
MADE = [
    ("exaone4", {}),
    ("exaone4", {"layer_types": [S, F, S, S], "sliding_window": 16}),
    ("exaone4", {"layer_types": [F] * 4, "sliding_window": None}),
    ("exaone4", {"layer_types": [F] * 4, "sliding_window": 16}),
    ("exaone4", {"sliding_window_pattern": 3, "sliding_window": 7}),
    ("exaone4", {"rope_parameters": LLAMA3, "tie_word_embeddings": True, "head_dim": 10}),
    ("exaone_moe", {}),
    ("exaone_moe", {"layer_types": [F] * 4, "sliding_window": 5}),
    ("exaone_moe", {"first_k_dense_replace": 2, "num_experts": 8, "num_experts_per_tok": 2, "n_group": 2}),
    ("exaone_moe", {"mlp_layer_types": ["sparse", "dense", "sparse", "dense"], "routed_scaling_factor": 1.5}),
    ("exaone_moe", {"mlp_layer_types": ["dense"] * 4, "eos_token_id": [1, 2], "num_shared_experts": 2}),
]


@pytest.mark.parametrize(("model_type", "keys"), MADE)
def test_made_by_transformers(tmp_path, model_type, keys):
    theirs = CLASSES[model_type](**E4, **keys)
    theirs.save_pretrained(tmp_path)
    config, extra = from_hf(json.loads((tmp_path / "config.json").read_text()))
    compare(theirs, config)
    ours = load(tmp_path, to_hf(config, extra))
    compare(ours, config)
    # a window that no layer has is only a flag (rotary embeddings off), and dtype None becomes the default
    different = {"dtype"} if any(kind == S for kind in theirs.layer_types) else {"dtype", "sliding_window"}
    drop = dict.fromkeys(different)
    assert network(ours) | drop == network(theirs) | drop


def test_exaone4_5_made_by_transformers(tmp_path):
    text = transformers.Exaone4Config(**E4, layer_types=[S, S, S, F], sliding_window=8)
    vision = {"depth": 2, "hidden_size": 16, "intermediate_size": 8, "num_heads": 4, "num_key_value_heads": 2}
    theirs = transformers.Exaone4_5_Config(text_config=text, vision_config=vision, tie_word_embeddings=True)
    theirs.save_pretrained(tmp_path)
    config, extra = from_hf(json.loads((tmp_path / "config.json").read_text()))
    assert config.tie_word_embeddings
    assert config.vision is not None
    assert config.vision.depth == 2
    compare(theirs, config)
    compare(load(tmp_path, to_hf(config, extra)), config)
