"""Every EXAONE language model in plain numpy: the meaning that the JAX model is checked against.

Written from the published description of the models alone; it shares no code with `exaone_jax`. One sequence at a time,
loops where they read better, float64 unless asked otherwise, no cache. `config` is a `config.json` as a dict, `tensors` maps
Hugging Face names to numpy arrays (Linear weights `[out, in]`).

Shapes: T tokens, D hidden, H query heads, K key/value heads, E experts, V vocabulary.

It covers what transformers 5.23 does not compute: K-EXAONE 2.0's per-layer windows and SwiGLU clamps, and the MTP layer.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np

Tensors = Mapping[str, np.ndarray]


@dataclass
class Routing:
    """What the router of one sparse layer did. `margin` is how far the closest token was from choosing another expert."""

    layer: int
    scores: np.ndarray  # [T, E] sigmoid scores, without the bias
    chosen: np.ndarray  # [T, k] expert indices
    weights: np.ndarray  # [T, k]
    margin: float

    @property
    def load(self) -> np.ndarray:
        """Tokens sent to each expert, int [E]."""
        return np.bincount(self.chosen.ravel(), minlength=self.scores.shape[1])


@dataclass
class Output:
    hidden: np.ndarray  # [T, D] after the final norm
    logits: np.ndarray  # [T, V]
    routing: list[Routing] = field(default_factory=list)


def run(
    config: dict, tensors: Tensors, tokens: np.ndarray, positions: np.ndarray | None = None, dtype=np.float64
) -> Output:
    """Logits `[T, V]` of one sequence `tokens [T]`; position p predicts token p+1."""
    config, weight = text_config(config), _named(config, tensors, dtype)
    positions = np.arange(len(tokens)) if positions is None else positions
    x = weight("model.embed_tokens.weight")[tokens]
    routing: list[Routing] = []
    for layer in range(num_layers(config)):
        x = _decoder_layer(
            config,
            lambda name, layer=layer: weight(f"model.layers.{layer}.{name}"),
            x,
            positions,
            window=window_of(config, layer),
            rope=rope_on(config, layer),
            limit=swiglu_limit(config, layer),
            sparse=is_sparse(config, layer),
            on_route=lambda r, layer=layer: routing.append(Routing(layer, *r)),
        )
    hidden = rms_norm(x, weight("model.norm.weight"), _eps(config))
    return Output(hidden, hidden @ _head(config, weight).T, routing)


def mtp_hidden(
    config: dict, tensors: Tensors, hidden: np.ndarray, next_tokens: np.ndarray, dtype=np.float64
) -> np.ndarray:
    """The MTP layer over a sequence: `hidden [T, D]` after the final norm at p, token p+1 -> `[T, D]`, whose logits predict p+2.

    The embedding half comes first in the concatenation. RoPE always; window as the config says, or as layer 0 has it.
    """
    config, weight = text_config(config), _named(config, tensors, dtype)
    embedding = rms_norm(
        weight("model.embed_tokens.weight")[next_tokens], weight("mtp.pre_fc_norm_embedding.weight"), _eps(config)
    )
    previous = rms_norm(hidden.astype(dtype), weight("mtp.pre_fc_norm_hidden.weight"), _eps(config))
    x = np.concatenate([embedding, previous], axis=-1) @ weight("mtp.fc.weight").T
    x = _decoder_layer(
        config,
        lambda name: weight(f"mtp.layers.0.{name}"),
        x,
        np.arange(len(next_tokens)),
        window=mtp_window(config),
        rope=True,
        limit=None,
        sparse=False,
    )
    return rms_norm(x, weight("mtp.norm.weight"), _eps(config))


def mtp_logits(
    config: dict, tensors: Tensors, tokens: np.ndarray, steps: int = 1, dtype=np.float64
) -> list[np.ndarray]:
    """Teacher-forced logits of `steps` applications of the MTP layer; entry s is `[T-1-s, V]` and predicts token p+2+s.

    Application s takes the output of application s-1 as its hidden state, and token p+1+s.
    """
    weight = _named(config, tensors, dtype)
    hidden = run(config, tensors, tokens, dtype=dtype).hidden
    out = []
    for step in range(steps):
        next_tokens = tokens[1 + step :]
        hidden = mtp_hidden(config, tensors, hidden[: len(next_tokens)], next_tokens, dtype)
        out.append(hidden @ _head(text_config(config), weight).T)
    return out


def mtp_draft(
    config: dict, tensors: Tensors, tokens: np.ndarray, next_token: int, steps: int, dtype=np.float64
) -> np.ndarray:
    """Drafting as a server does it: logits `[steps, V]` for the tokens after `next_token`, greedy between the steps.

    The MTP layer's own past holds the true hidden states of `tokens`; each draft adds its own output as one more hidden state.
    """
    weight = _named(config, tensors, dtype)
    hidden = run(config, tensors, tokens, dtype=dtype).hidden
    next_tokens = np.append(tokens[1:], next_token)
    logits = []
    for _ in range(steps):
        out = mtp_hidden(config, tensors, hidden, next_tokens, dtype)[-1]
        logits.append(_head(text_config(config), weight) @ out)
        hidden = np.concatenate([hidden, out[None]])
        next_tokens = np.append(next_tokens, np.argmax(logits[-1]))
    return np.stack(logits)


# What the config says


def text_config(config: dict) -> dict:
    """The language model's part of a config (EXAONE 4.5 nests it)."""
    return config.get("text_config", config)


def num_layers(config: dict) -> int:
    return config["num_hidden_layers"] if "num_hidden_layers" in config else config["num_layers"]


def head_dim(config: dict) -> int:
    return config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]


def window_of(config: dict, layer: int) -> int | None:
    """Visible keys of a layer, the query's own included; None is everything before."""
    if config.get("sliding_windows"):
        return config["sliding_windows"][layer] or None
    return config["sliding_window"] if _layer_types(config)[layer] == "sliding_attention" else None


def mtp_window(config: dict) -> int | None:
    if config.get("mtp_sliding_windows"):
        return config["mtp_sliding_windows"][0] or None
    if config.get("mtp_layer_types"):
        return config["sliding_window"] if config["mtp_layer_types"][0] == "sliding_attention" else None
    return window_of(config, 0)


def rope_on(config: dict, layer: int) -> bool:
    """Hybrid models rotate on their window layers only; models without any window rotate everywhere."""
    hybrid = config.get("sliding_window") is not None or bool(config.get("sliding_windows"))
    return not hybrid or window_of(config, layer) is not None


def swiglu_limit(config: dict, layer: int) -> float | None:
    limits = config.get("swiglu_limits")
    return (limits[layer] or None) if limits else None


def is_sparse(config: dict, layer: int) -> bool:
    if not config.get("num_experts"):
        return False
    if config.get("mlp_layer_types"):
        return config["mlp_layer_types"][layer] == "sparse"
    if config.get("is_moe_layer"):
        return config["is_moe_layer"][layer]
    return layer >= config["first_k_dense_replace"]


def post_norm(config: dict) -> bool:
    """EXAONE 4.0 and 4.5 normalise what attention and MLP give; every other generation what they take."""
    return config["model_type"] in ("exaone4", "exaone4_5_text")


def _layer_types(config: dict) -> list[str]:
    types = config.get("layer_types")
    return types[: num_layers(config)] if types else ["full_attention"] * num_layers(config)


def _eps(config: dict) -> float:
    return config["rms_norm_eps"] if "rms_norm_eps" in config else config["layer_norm_epsilon"]


def _rope_parameters(config: dict) -> dict:
    """rope_theta beside rope_scaling (3.x, 4.0), inside it (4.5), or both in rope_parameters (K-EXAONE)."""
    scaling = config.get("rope_parameters") or config.get("rope_scaling") or {}
    return {"rope_theta": config.get("rope_theta"), **scaling}


# Tensors by the names that EXAONE 4.0 and K-EXAONE share

_NAMES_3X = {
    "model.embed_tokens": "transformer.wte",
    "model.norm": "transformer.ln_f",
    "model.layers": "transformer.h",
    "input_layernorm": "ln_1",
    "post_attention_layernorm": "ln_2",
    "self_attn.o_proj": "attn.attention.out_proj",
    "self_attn": "attn.attention",
    "mlp.gate_proj": "mlp.c_fc_0",
    "mlp.up_proj": "mlp.c_fc_1",
    "mlp.down_proj": "mlp.c_proj",
}


def _named(config: dict, tensors: Tensors, dtype) -> Callable[[str], np.ndarray]:
    def weight(name: str) -> np.ndarray:
        if config["model_type"] == "exaone":
            for common, old in _NAMES_3X.items():
                name = name.replace(common, old)
        elif "text_config" in config:
            name = name.replace("model.", "model.language_model.", 1) if name.startswith("model.") else name
        return np.asarray(tensors[name]).astype(dtype)

    return weight


def _head(config: dict, weight: Callable[[str], np.ndarray]) -> np.ndarray:
    return weight("model.embed_tokens.weight" if config["tie_word_embeddings"] else "lm_head.weight")


# The network


def rms_norm(x: np.ndarray, scale: np.ndarray, eps: float) -> np.ndarray:
    return scale * (x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + eps))


def silu(x: np.ndarray) -> np.ndarray:
    return x * sigmoid(x)


def sigmoid(x: np.ndarray) -> np.ndarray:
    return np.where(x >= 0, 1 / (1 + np.exp(-np.abs(x))), np.exp(-np.abs(x)) / (1 + np.exp(-np.abs(x))))


def inverse_frequencies(config: dict) -> np.ndarray:
    """float32 `[head_dim / 2]`, with Llama 3's scaling where the config asks for it."""
    rope = _rope_parameters(config)
    dim = head_dim(config)
    frequencies = (1.0 / rope["rope_theta"] ** (np.arange(0, dim, 2) / dim)).astype(np.float32)
    if rope.get("rope_type", rope.get("type")) != "llama3":
        return frequencies
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    original, factor = rope["original_max_position_embeddings"], rope["factor"]
    scaled = []
    for f in frequencies.astype(np.float64):
        wavelength = 2 * np.pi / f
        if wavelength < original / high:
            scaled.append(f)
        elif wavelength > original / low:
            scaled.append(f / factor)
        else:
            smooth = (original / wavelength - low) / (high - low)
            scaled.append((1 - smooth) * f / factor + smooth * f)
    return np.array(scaled, np.float32)


def rotate(x: np.ndarray, positions: np.ndarray, frequencies: np.ndarray) -> np.ndarray:
    """Rotary embedding of one head `x [T, head_dim]`, whose halves are the two coordinates. Angles are float32 by definition."""
    angles = (positions.astype(np.float32)[:, None] * frequencies).astype(x.dtype)
    cos, sin = np.cos(angles), np.sin(angles)
    first, second = np.split(x, 2, axis=-1)
    return np.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


def attention(config: dict, weight, x: np.ndarray, positions: np.ndarray, window: int | None, rope: bool) -> np.ndarray:
    """Grouped-query attention `[T, D] -> [T, D]`: norm of q and k over head_dim (where there are such weights), then rotation."""
    heads, kv_heads, dim, eps = (
        config["num_attention_heads"],
        config["num_key_value_heads"],
        head_dim(config),
        _eps(config),
    )
    length = len(x)
    q = (x @ weight("self_attn.q_proj.weight").T).reshape(length, heads, dim)
    k = (x @ weight("self_attn.k_proj.weight").T).reshape(length, kv_heads, dim)
    v = (x @ weight("self_attn.v_proj.weight").T).reshape(length, kv_heads, dim)
    if config["model_type"] != "exaone":
        q = rms_norm(q, weight("self_attn.q_norm.weight"), eps)
        k = rms_norm(k, weight("self_attn.k_norm.weight"), eps)
    distance = np.arange(length)[:, None] - np.arange(length)[None, :]
    visible = (distance >= 0) & (distance < (window or length))
    frequencies = inverse_frequencies(config)
    out = np.empty_like(q)
    for h in range(heads):
        qh, kh, vh = q[:, h], k[:, h // (heads // kv_heads)], v[:, h // (heads // kv_heads)]
        if rope:
            qh, kh = rotate(qh, positions, frequencies), rotate(kh, positions, frequencies)
        scores = np.where(visible, qh @ kh.T / np.sqrt(dim), -np.inf)
        p = np.exp(scores - scores.max(axis=-1, keepdims=True))
        out[:, h] = (p / p.sum(axis=-1, keepdims=True)) @ vh
    return out.reshape(length, heads * dim) @ weight("self_attn.o_proj.weight").T


def swiglu(weight, x: np.ndarray, limit: float | None) -> np.ndarray:
    """down(silu(gate) * up). A limit L clamps before the activation: gate from above at L, up to [-L, L]."""
    gate, up = x @ weight("gate_proj.weight").T, x @ weight("up_proj.weight").T
    if limit is not None:
        gate, up = np.minimum(gate, limit), np.clip(up, -limit, limit)
    return (silu(gate) * up) @ weight("down_proj.weight").T


def route(config: dict, scores: np.ndarray, bias: np.ndarray) -> tuple[np.ndarray, np.ndarray, float]:
    """Experts `[T, k]`, their weights `[T, k]`, and the smallest margin of any decision. The bias chooses, it does not weigh."""
    groups, keep, k = config.get("n_group", 1), config.get("topk_group", 1), config["num_experts_per_tok"]
    chosen, margin = [], np.inf
    for choice in scores + bias:
        if groups > keep:
            by_group = choice.reshape(groups, -1)
            group_score = np.sort(by_group, axis=-1)[:, -2:].sum(axis=-1)
            order = np.argsort(-group_score, kind="stable")
            margin = min(margin, group_score[order[keep - 1]] - group_score[order[keep]])
            allowed = np.isin(np.arange(groups), order[:keep])
            choice = np.where(allowed[:, None], by_group, -np.inf).ravel()
        order = np.argsort(-choice, kind="stable")
        if k < len(order):
            margin = min(margin, choice[order[k - 1]] - choice[order[k]])
        chosen.append(order[:k])
    chosen = np.array(chosen)
    weights = np.take_along_axis(scores, chosen, axis=-1)
    if config.get("norm_topk_prob", True):
        weights = weights / (weights.sum(axis=-1, keepdims=True) + 1e-20)
    return chosen, weights * config["routed_scaling_factor"], margin


def mixture_of_experts(config: dict, weight, x: np.ndarray, limit: float | None, on_route) -> np.ndarray:
    scores = sigmoid(x @ weight("gate.weight").T)
    chosen, weights, margin = route(config, scores, weight("e_score_correction_bias"))
    on_route((scores, chosen, weights, margin))
    out = np.zeros_like(x)
    if config["num_shared_experts"]:
        out += swiglu(lambda name: weight(f"shared_experts.{name}"), x, limit)
    for expert in range(config["num_experts"]):
        tokens, slots = np.nonzero(chosen == expert)
        y = swiglu(lambda name, expert=expert: weight(f"experts.{expert}.{name}"), x[tokens], limit)
        out[tokens] += weights[tokens, slots][:, None] * y
    return out


def _decoder_layer(config, weight, x, positions, *, window, rope, limit, sparse, on_route=None) -> np.ndarray:
    eps = _eps(config)

    def mlp(x):
        inner = lambda name: weight(f"mlp.{name}")  # noqa: E731
        return mixture_of_experts(config, inner, x, limit, on_route) if sparse else swiglu(inner, x, limit)

    if post_norm(config):
        attended = attention(config, weight, x, positions, window, rope)
        h = x + rms_norm(attended, weight("post_attention_layernorm.weight"), eps)
        return h + rms_norm(mlp(h), weight("post_feedforward_layernorm.weight"), eps)
    h = x + attention(config, weight, rms_norm(x, weight("input_layernorm.weight"), eps), positions, window, rope)
    return h + mlp(rms_norm(h, weight("post_attention_layernorm.weight"), eps))


# Balancing the experts (training)


def updated_bias(bias: np.ndarray, load: np.ndarray, rate: float) -> np.ndarray:
    """The selection bias after a step: up by `rate` for experts under the mean load, down for those over it."""
    return bias + rate * np.sign(load.mean() - load)


def sequence_balance_loss(scores: np.ndarray, chosen: np.ndarray) -> float:
    """DeepSeek-V3's sequence-wise loss (its equations 17 to 20), without its coefficient: sum_e f_e P_e.

    f_e = E / (k T) * tokens that chose e; P_e = mean over tokens of e's share of the sigmoid scores. 1 when balanced.
    """
    length, experts = scores.shape
    f = np.bincount(chosen.ravel(), minlength=experts) * experts / (chosen.shape[1] * length)
    p = (scores / scores.sum(axis=-1, keepdims=True)).mean(axis=0)
    return float(f @ p)
