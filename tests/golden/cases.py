"""The small models of the parity tests: one `config.json` a case, in the spellings of the published ones.

Between them: every model_type, tied and untied, head_dim 64, 80 and 128, given and left out, heads * head_dim other than
hidden, windows 16 and 128, Llama 3 scaling in three spellings, groups of experts. Sequences of LENGTH tokens are several
windows long, and original_max_position_embeddings is small so that all three bands of the scaling matter within them.
"""

import numpy as np

VOCAB = 320
LENGTH = 640  # 5 windows of 128, 40 of 16
LENGTHS = (LENGTH, 400, 150)  # of a batch's rows

_S, _F = "sliding_attention", "full_attention"
_COMMON = {"vocab_size": VOCAB, "max_position_embeddings": 4096, "initializer_range": 0.02, "hidden_act": "silu"}
_COMMON |= {"rms_norm_eps": 1e-5, "attention_dropout": 0.0, "bos_token_id": 1, "eos_token_id": 53, "pad_token_id": 0}
_COMMON |= {"torch_dtype": "float32"}


def _llama3(factor: float, original: int, **more) -> dict:
    bands = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": original}
    return {"rope_type": "llama3", "factor": factor, **bands, **more}


def _exaone3(**changes) -> dict:
    config = {"model_type": "exaone", "architectures": ["ExaoneForCausalLM"], "activation_function": "silu"}
    config |= {"vocab_size": VOCAB, "max_position_embeddings": 4096, "layer_norm_epsilon": 1e-5, "embed_dropout": 0.0}
    config |= {"attention_dropout": 0.0, "initializer_range": 0.02, "bos_token_id": 1, "eos_token_id": 361 % VOCAB}
    config |= {"pad_token_id": 0, "rope_theta": 1e6, "torch_dtype": "float32"}
    return config | changes


def _exaone4(**changes) -> dict:
    config = {"model_type": "exaone4", "architectures": ["Exaone4ForCausalLM"], "rope_theta": 1e6}
    config |= {"rope_scaling": _llama3(16.0, 256)}
    return _COMMON | config | changes


def _exaone_moe(layer_types: list[str], window: int, **changes) -> dict:
    """The first layer dense, the others sparse."""
    layers = len(layer_types)
    config = {"model_type": "exaone_moe", "architectures": ["ExaoneMoEForCausalLM"], "num_hidden_layers": layers}
    config |= {"layer_types": layer_types, "sliding_window": window, "sliding_window_pattern": "LLLG"}
    config |= {"mlp_layer_types": ["dense"] + ["sparse"] * (layers - 1), "first_k_dense_replace": 1}
    config |= {"is_moe_layer": [False] + [True] * (layers - 1), "scoring_func": "sigmoid", "topk_method": "noaux_tc"}
    config |= {"norm_topk_prob": True, "routed_scaling_factor": 2.5, "n_group": 1, "topk_group": 1}
    config |= {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}, "tie_word_embeddings": False}
    return _COMMON | config | changes


# What transformers 5.23 computes rightly (3.x as the Llama that it is)
TRANSFORMERS = {
    "exaone3.0": _exaone3(
        hidden_size=128, intermediate_size=192, num_layers=3, num_attention_heads=4, num_key_value_heads=2, head_dim=128,
        tie_word_embeddings=False, rope_scaling=None, rope_theta=5e5,
    ),
    "exaone3.5-tied": _exaone3(  # as 2.4B: head_dim 80, left out of the config
        hidden_size=320, intermediate_size=256, num_layers=3, num_attention_heads=4, num_key_value_heads=2,
        tie_word_embeddings=True, rope_scaling=_llama3(8.0, 256),
    ),
    "exaone4-full-tied": _exaone4(  # as 1.2B: no window anywhere, so rotation everywhere
        hidden_size=128, intermediate_size=192, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=1,
        head_dim=64, tie_word_embeddings=True, sliding_window=None, sliding_window_pattern=None, layer_types=[_F] * 4,
    ),
    "exaone4-hybrid": _exaone4(  # as 32B
        hidden_size=128, intermediate_size=192, num_hidden_layers=8, num_attention_heads=4, num_key_value_heads=2,
        head_dim=128, tie_word_embeddings=False, sliding_window=128, sliding_window_pattern="LLLG",
        layer_types=[_S, _S, _S, _F] * 2,
    ),
    "exaone4-hybrid-80": _exaone4(
        hidden_size=160, intermediate_size=192, num_hidden_layers=4, num_attention_heads=2, num_key_value_heads=2,
        tie_word_embeddings=True, sliding_window=16, sliding_window_pattern="LLLG", layer_types=[_S, _S, _S, _F],
    ),
    "exaone_moe": _exaone_moe(  # as K-EXAONE 236B
        [_S, _S, _F, _S, _F], 128, hidden_size=96, intermediate_size=160, moe_intermediate_size=32, num_experts=8,
        num_experts_per_tok=3, num_shared_experts=1, num_attention_heads=4, num_key_value_heads=2, head_dim=64,
    ),
    "exaone_moe-groups": _exaone_moe(
        [_S, _S, _F], 16, hidden_size=96, intermediate_size=128, moe_intermediate_size=32, num_experts=12,
        num_experts_per_tok=3, num_shared_experts=2, num_attention_heads=4, num_key_value_heads=4, head_dim=128,
        n_group=4, topk_group=2, tie_word_embeddings=True, architectures=["ExaoneMoeForCausalLM"],
    ),
    "exaone4_5": {
        "model_type": "exaone4_5", "architectures": ["Exaone4_5_ForConditionalGeneration"], "tie_word_embeddings": False,
        "image_token_id": 67, "video_token_id": 68, "vision_start_token_id": 73, "vision_end_token_id": 74,
        "torch_dtype": "float32",
        "text_config": _COMMON | {
            "model_type": "exaone4_5_text", "hidden_size": 128, "intermediate_size": 160, "num_hidden_layers": 4,
            "num_attention_heads": 2, "num_key_value_heads": 1, "tie_word_embeddings": False, "sliding_window": 128,
            "sliding_window_pattern": "LLLG", "layer_types": [_S, _S, _S, _F],
            "rope_scaling": _llama3(16.0, 256, rope_theta=1e6), "num_nextn_predict_layers": 1,
        },
        "vision_config": {
            "model_type": "exaone4_5_vision", "depth": 2, "hidden_size": 32, "intermediate_size": 48, "num_heads": 4,
            "num_key_value_heads": 2, "in_channels": 3, "patch_size": 14, "temporal_patch_size": 2, "spatial_merge_size": 2,
            "window_size": 112, "fullatt_block_indexes": [1], "out_hidden_size": 128, "hidden_act": "silu",
        },
    },
}  # fmt: skip

# What it does not: per-layer windows, clamps, MTP
_MOE_SMALL = {"hidden_size": 96, "intermediate_size": 160, "moe_intermediate_size": 32, "num_experts": 8}
_MOE_SMALL |= {"num_experts_per_tok": 3, "num_shared_experts": 1, "num_attention_heads": 4, "num_key_value_heads": 2}
_MOE_SMALL |= {"head_dim": 64, "num_nextn_predict_layers": 1}


def _k_exaone_2() -> dict:
    """K-EXAONE 2.0: global, a wider window, then the hybrid; two dense layers; clamps on the last layers and on a dense one.

    The clamps are tighter than the published 7.0, which activations of a random model do not reach.
    """
    config = _exaone_moe([_F, _S, _S, _F, _S, _F], 0, **_MOE_SMALL)
    for absent in ("sliding_window", "sliding_window_pattern", "first_k_dense_replace", "is_moe_layer"):
        del config[absent]
    return config | {
        "sliding_windows": [0, 96, 16, 0, 16, 0],
        "swiglu_limits": [0.0, 0.9, 0.0, 0.0, 0.7, 0.7],
        "mlp_layer_types": ["dense"] * 2 + ["sparse"] * 4,
        "mtp_layer_types": [_S],
        "mtp_sliding_windows": [16],
        "mtp_num_speculative_steps": 4,
    }


REFERENCE_ONLY = {
    "k-exaone-2.0": _k_exaone_2(),
    "exaone_moe-mtp": _exaone_moe(
        [_S, _S, _S, _F], 16, **_MOE_SMALL, mtp_layer_types=[_F], mtp_sliding_windows=[0],
        sliding_windows=[16, 16, 16, 0],
    ),
}  # fmt: skip

CASES = TRANSFORMERS | REFERENCE_ONLY

# Where two experts come within rounding of each other, float32 may choose another one than float64: a true difference, but no
# mistake. These seeds keep every choice of every row clear of that by ROUTER_MARGIN (of a score in 0..1); tests check it.
ROUTER_MARGIN = 5e-5
_SEEDS = {"exaone_moe": 14, "exaone_moe-groups": 2, "k-exaone-2.0": 20, "exaone_moe-mtp": 1}


def batch(case: str) -> np.ndarray:
    """Tokens int64 `[3, LENGTH]`; of row i the first LENGTHS[i] count."""
    bits = np.random.PCG64(_SEEDS.get(case, 1)).random_raw(3 * LENGTH)  # raw bits: the same under every numpy
    return (bits % np.uint64(VOCAB)).astype(np.int64).reshape(3, LENGTH)
