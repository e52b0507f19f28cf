"""config.json <-> ModelConfig: every spelling that EXAONE releases have used, and back to what transformers reads."""

import difflib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from exaone_jax.config.model import DType, LayerSpec, Llama3RopeScaling, ModelConfig, ModelType, MoEConfig, VisionConfig
from exaone_jax.errors import ConfigError

Json = dict[str, Any]
_Model = TypeVar("_Model", bound=BaseModel)
_REQUIRED: Any = object()
_MAX_INTEGER = 2**48
_MAX_TOKEN_ID = 2**31 - 1
_MAX_LAYERS = 4096  # stops a damaged config before it allocates
_MAX_CONFIG_BYTES = 16 << 20  # the largest published config.json is under 20 kB

_ARCHITECTURES: dict[ModelType, tuple[str, ...]] = {  # the first is the one we write
    "exaone": ("ExaoneForCausalLM",),
    "exaone4": ("Exaone4ForCausalLM",),
    "exaone_moe": ("ExaoneMoeForCausalLM", "ExaoneMoEForCausalLM"),
    "exaone4_5": ("Exaone4_5_ForConditionalGeneration",),
}
_TEXT_MODEL_TYPES = ("exaone4", "exaone4_5_text")  # the second: EXAONE 4.5 as first released
_VISION_MODEL_TYPE = "exaone4_5_vision"
_DTYPES: tuple[DType, ...] = ("float32", "bfloat16", "float16")
_LAYER_TYPES = ("full_attention", "sliding_attention")

# Keys that change what is computed, and the one value that this package computes.
_ONLY: Json = {
    "hidden_act": "silu",
    "activation_function": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "attention_dropout": 0,
    "embed_dropout": 0,
    "resid_dropout": 0,
    "ln_no_scale": False,
    "partial_rotary_factor": 1.0,
    "reorder_qk_norm": True,
    "scoring_func": "sigmoid",
    "topk_method": "noaux_tc",
    "per_layer_config": None,
}
# Keys that only some families compute with; on another family they would be dropped in silence, so they are refused.
_MOE_KEYS = ("num_experts", "mlp_layer_types", "is_moe_layer", "moe_intermediate_size")
_PER_LAYER_KEYS = ("sliding_windows", "swiglu_limits")
_FOREIGN: dict[ModelType, tuple[str, ...]] = {
    "exaone": (*_MOE_KEYS, *_PER_LAYER_KEYS, "sliding_window", "layer_types", "num_nextn_predict_layers"),
    "exaone4": (*_MOE_KEYS, *_PER_LAYER_KEYS),
    "exaone_moe": (),
    "exaone4_5": (*_MOE_KEYS, *_PER_LAYER_KEYS),
}


def _wrong(name: str, found: object, expected: str) -> ConfigError:
    text = json.dumps(found, default=repr)
    text = text if len(text) <= 200 else f"{text[:200]}..."
    return ConfigError(f"{name}: found {text}, expected {expected}")


class _Keys:
    """One JSON object being read. Every value taken is checked; what is never taken is `rest`, kept for the way out.

    A key with the value null reads as a key that is not there.
    """

    def __init__(self, raw: object, where: str = ""):
        if not isinstance(raw, dict):
            raise _wrong(where.rstrip(".") or "config", raw, "a JSON object")
        self.raw: Json = raw
        self.where = where
        self.taken: set[str] = set()

    def __contains__(self, key: str) -> bool:
        return self.raw.get(key) is not None

    def rest(self) -> Json:
        return {key: value for key, value in self.raw.items() if key not in self.taken}

    def wrong(self, key: str, expected: str) -> ConfigError:
        return _wrong(self.where + key, self.raw.get(key), expected)

    def take(self, key: str, default: Any, expected: str, valid: Callable[[Any], bool]) -> Any:
        self.taken.add(key)
        value = self.raw.get(key)
        if value is None:
            if default is _REQUIRED:
                raise ConfigError(f"{self.where}{key}: missing, expected {expected}")
            return default
        if not valid(value):
            raise self.wrong(key, expected)
        return value

    def integer(self, key: str, default: Any = _REQUIRED, minimum: int = 1, maximum: int = _MAX_INTEGER) -> Any:
        expected = f"an integer of at least {minimum}" + (f" and at most {maximum}" if maximum < _MAX_INTEGER else "")
        return self.take(key, default, expected, lambda v: _is_int(v) and minimum <= v <= maximum)

    def token_id(self, key: str) -> Any:
        return self.integer(key, default=None, minimum=0, maximum=_MAX_TOKEN_ID)

    def positive(self, key: str, default: Any = _REQUIRED) -> Any:
        value = self.take(key, default, "a number greater than 0", lambda v: _is_number(v) and v > 0)
        return value if value is None else float(value)

    def not_negative(self, key: str, default: Any = _REQUIRED) -> float:
        return float(self.take(key, default, "a number of at least 0", lambda v: _is_number(v) and v >= 0))

    def boolean(self, key: str, default: Any = _REQUIRED) -> Any:
        return self.take(key, default, "true or false", lambda v: isinstance(v, bool))

    def choice(self, key: str, choices: tuple[str, ...], default: Any = _REQUIRED) -> Any:
        return self.take(key, default, f"one of {', '.join(choices)}", lambda v: v in choices)

    def items(self, key: str, length: int, expected: str, valid: Callable[[Any], bool], spare: int = 0) -> list | None:
        """A list of `length` entries (`spare` more are allowed and cut off), each of them `valid`. None if absent."""
        expected = f"a list of {length} entries, each {expected}"
        value = self.take(key, None, expected, lambda v: isinstance(v, list) and all(valid(item) for item in v))
        if value is None:
            return None
        if not length <= len(value) <= length + spare:
            raise ConfigError(f"{self.where}{key}: found {len(value)} entries, expected {length}, one for each layer")
        return value[:length]

    def alias(self, *names: str) -> str:
        """The one of several spellings of a key that is present (the first if none is); all present must agree."""
        present = [name for name in names if name in self]
        self.taken.update(names)
        for other in present[1:]:
            if self.raw[other] != self.raw[present[0]]:
                raise self.wrong(other, f"the same value as {present[0]}, {json.dumps(self.raw[present[0]])}")
        return present[0] if present else names[0]


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e300


def _nearest(name: str, known: tuple[str, ...]) -> str:
    """' (did you mean X?)' where one of the known names is near, else ''."""
    folded = {option.casefold(): option for option in known}
    found = difflib.get_close_matches(name.casefold(), folded, n=1, cutoff=0.5)
    return f" (did you mean {folded[found[0]]}?)" if found else ""


def _build(model: type[_Model], **fields: Any) -> _Model:
    """Construct a pydantic model; what its validators refuse becomes a ConfigError."""
    try:
        return model(**fields)
    except ValidationError as error:
        problems = []
        for problem in error.errors(include_url=False):
            place = ".".join(str(part) for part in problem["loc"])
            problems.append(f"{place}: {problem['msg']}" if place else problem["msg"].removeprefix("Value error, "))
        raise ConfigError("; ".join(problems)) from error


# ---- config.json -> ModelConfig -------------------------------------------------------------------------------------


def from_hf(raw: Json) -> tuple[ModelConfig, Json]:
    """The ModelConfig that a parsed config.json describes, and the keys that it does not interpret.

    The second value keeps every key that the network does not depend on (`use_cache`, `transformers_version`,
    `quantization_config`, ... and, for EXAONE 4.5, those of `text_config` and `vision_config` under these names), so
    that `to_hf` can write them again. Raises ConfigError, naming the key, what was found and what was expected, for
    what this package cannot compute and for values that contradict each other.
    """
    top = _Keys(raw)
    model_type = _model_type(top)
    if model_type != "exaone4_5":
        return _language_model(top, model_type, {}), top.rest()
    text = _Keys(top.raw.get("text_config"), "text_config.")
    top.taken.add("text_config")
    text.choice("model_type", _TEXT_MODEL_TYPES, default=None)
    vision, vision_rest = _vision(top)
    config = _language_model(text, model_type, {"vision": vision, **_wrapper_fields(top, text)})
    extra = top.rest()
    for name, rest in (("text_config", text.rest()), ("vision_config", vision_rest)):
        if rest:
            extra[name] = rest
    return config, extra


def quantization(extra: Json) -> Json | None:
    """The `quantization_config` among the keys that `from_hf` kept, or None: weights are stored as they compute.

    Quantised weights (FP8, AWQ, GPTQ, NVFP4) can be inspected but not loaded: a checkpoint reader must refuse them.
    """
    for place in (extra, extra.get("text_config")):
        if isinstance(place, dict) and place.get("quantization_config") is not None:
            return place["quantization_config"]
    return None


def _model_type(keys: _Keys) -> ModelType:
    keys.taken.add("model_type")
    found = keys.raw.get("model_type")
    known = tuple(_ARCHITECTURES)
    if found in known:
        model_type = found
    elif found == "exaone4_5_text":  # transformers reads it as exaone4 too
        model_type = "exaone4"
    else:
        hint = _nearest(found, known) if isinstance(found, str) else ""
        raise keys.wrong("model_type", f"one of {', '.join(known)}{hint}")
    names = _ARCHITECTURES[model_type]
    architectures = keys.take("architectures", [names[0]], "a list of class names", lambda v: isinstance(v, list))
    if len(architectures) != 1 or architectures[0] not in names:
        raise keys.wrong("architectures", " or ".join(json.dumps([name]) for name in names))
    return model_type


def _language_model(keys: _Keys, model_type: ModelType, wrapper: Json) -> ModelConfig:
    """The language model that `keys` describes. `wrapper` overrides with what the enclosing EXAONE 4.5 config says."""
    _refuse_what_we_cannot_compute(keys, model_type)
    hidden_size, num_heads = keys.integer("hidden_size"), keys.integer("num_attention_heads")
    if "head_dim" not in keys and hidden_size % num_heads:
        raise ConfigError(
            f"{keys.where}head_dim: missing, and hidden_size {hidden_size} is not a multiple of "
            f"num_attention_heads {num_heads}"
        )
    layers, sliding_window = _layers(keys, model_type)
    mtp_layer, mtp_num_steps = _mtp(keys, layers, sliding_window)
    theta, scaling = _rope(keys)
    fields: Json = {
        "model_type": model_type,
        "vocab_size": keys.integer("vocab_size"),
        "hidden_size": hidden_size,
        "intermediate_size": keys.integer("intermediate_size"),
        "num_heads": num_heads,
        "num_kv_heads": keys.integer("num_key_value_heads"),
        "head_dim": keys.integer("head_dim", default=hidden_size // num_heads, minimum=2),
        "layers": layers,
        "moe": _moe(keys, any(layer.moe for layer in layers)) if model_type == "exaone_moe" else None,
        "mtp_layer": mtp_layer,
        "mtp_num_steps": mtp_num_steps,
        "rms_norm_eps": keys.positive(keys.alias("rms_norm_eps", "layer_norm_epsilon"), default=1e-5),
        "rope_theta": theta,
        "rope_scaling": scaling,
        "max_position_embeddings": keys.integer("max_position_embeddings"),
        "tie_word_embeddings": keys.boolean("tie_word_embeddings", default=False),
        "initializer_range": keys.not_negative("initializer_range", default=0.02),
        "bos_token_id": keys.token_id("bos_token_id"),
        "eos_token_ids": _eos_token_ids(keys),
        "pad_token_id": keys.token_id("pad_token_id"),
        "dtype": keys.choice(keys.alias("dtype", "torch_dtype"), _DTYPES, default="bfloat16"),
    }
    return _build(ModelConfig, **fields | wrapper)


def _refuse_what_we_cannot_compute(keys: _Keys, model_type: ModelType) -> None:
    for key, value in _ONLY.items():
        found = keys.raw.get(key)
        if found is not None and (found != value or isinstance(found, bool) != isinstance(value, bool)):
            raise keys.wrong(key, f"{json.dumps(value)}: nothing else is implemented")
    for key in _FOREIGN[model_type]:
        if keys.raw.get(key):
            raise keys.wrong(key, f"no such key in a model of type {model_type}")
    keys.taken.update(_canonical_constants(model_type))


def _eos_token_ids(keys: _Keys) -> tuple[int, ...]:
    expected = "a token id or a list of token ids, each at least 0 and below 2**31"
    value = keys.take("eos_token_id", [], expected, lambda v: _is_int(v) or isinstance(v, list))
    ids = value if isinstance(value, list) else [value]
    if not all(_is_int(token) and 0 <= token <= _MAX_TOKEN_ID for token in ids):
        raise keys.wrong("eos_token_id", expected)
    return tuple(ids)


def _layers(keys: _Keys, model_type: ModelType) -> tuple[tuple[LayerSpec, ...], int | None]:
    """One LayerSpec a layer, and the model's scalar `sliding_window`."""
    num_layers = keys.integer(keys.alias("num_hidden_layers", "num_layers"), maximum=_MAX_LAYERS)
    sliding_window = keys.integer("sliding_window", default=None)
    windows = [None] * num_layers if model_type == "exaone" else _windows(keys, num_layers, sliding_window)
    # transformers rotates iff config.sliding_window is None or the layer slides. K-EXAONE 2.0 has no scalar window,
    # only windows layer by layer, and its global layers are not rotated either.
    hybrid = sliding_window is not None or any(windows)
    sparse = _sparse(keys, num_layers) if model_type == "exaone_moe" else [False] * num_layers
    limits = keys.items("swiglu_limits", num_layers, "a number of at least 0", lambda v: _is_number(v) and v >= 0)
    layers = tuple(
        _build(
            LayerSpec,
            window=window,
            rope=window is not None or not hybrid,
            norm="post" if model_type in ("exaone4", "exaone4_5") else "pre",
            qk_norm=model_type != "exaone",
            moe=moe,
            swiglu_limit=limit or None,
        )
        for window, moe, limit in zip(windows, sparse, limits or [None] * num_layers, strict=True)
    )
    return layers, sliding_window


def _windows(keys: _Keys, num_layers: int, sliding_window: int | None) -> list[int | None]:
    """The window of each layer, None where it attends to everything before it.

    sliding_windows win over the scalar, whose default transformers writes beside any list.
    """
    # The released EXAONE-4.5-33B-FP8 lists its MTP layer as a 65th of 64 layer types.
    types = keys.items("layer_types", num_layers, " or ".join(_LAYER_TYPES), lambda v: v in _LAYER_TYPES, spare=1)
    sizes = keys.items("sliding_windows", num_layers, "an integer of at least 0", lambda v: _is_int(v) and v >= 0)
    if types is None:
        if sizes is None:
            slides = _pattern(keys, num_layers, sliding_window)
        else:
            slides = [size > 0 for size in sizes]
    else:
        slides = [layer_type == "sliding_attention" for layer_type in types]
    if sizes is None:
        if any(slides) and sliding_window is None:
            raise ConfigError(f"{keys.where}sliding_window: missing, expected the window of the sliding layers")
        sizes = [sliding_window or 0 if slide else 0 for slide in slides]
    for layer, (slide, size) in enumerate(zip(slides, sizes, strict=True)):
        if slide != (size > 0):
            expected = "at least 1 on a sliding_attention layer" if slide else "0 on a full_attention layer"
            raise ConfigError(f"{keys.where}sliding_windows[{layer}]: found {size}, expected {expected}")
    if not any(slides) and "sliding_window" not in keys.raw:
        raise ConfigError(
            f"{keys.where}sliding_window: missing, and no layer slides; expected null (every layer has rotary "
            "embeddings) or a number (as transformers reads it: none has)"
        )
    return [size or None for size in sizes]


def _pattern(keys: _Keys, num_layers: int, sliding_window: int | None) -> list[bool]:
    """Which layers slide by `sliding_window_pattern`, where neither layer_types nor sliding_windows say so.

    LG's rule: "LLLG" repeats from layer 0 and the last layer is global whatever the pattern says; N makes every N-th
    layer global. transformers 5.23 documents this, but computes the rule for N alone and raises TypeError on a string.
    """
    expected = 'a string of L and G such as "LLLG", or an integer of at least 0'
    pattern = keys.take(
        "sliding_window_pattern",
        0 if sliding_window is None and "sliding_window" in keys.raw else _REQUIRED,
        f"{expected}, or layer_types",
        lambda v: (_is_int(v) and v >= 0) or (isinstance(v, str) and v != "" and set(v) <= {"L", "G"}),
    )
    if sliding_window is None or not pattern:
        return [False] * num_layers
    if isinstance(pattern, int):
        return [(layer + 1) % pattern != 0 for layer in range(num_layers)]
    return [pattern[layer % len(pattern)] == "L" and layer < num_layers - 1 for layer in range(num_layers)]


def _sparse(keys: _Keys, num_layers: int) -> list[bool]:
    """Which layers are mixtures of experts: mlp_layer_types or is_moe_layer, else the first k layers are dense.

    A list wins over the number, as in transformers, which writes the number's default beside any list.
    """
    kinds = keys.items("mlp_layer_types", num_layers, "dense or sparse", lambda v: v in ("dense", "sparse"))
    flags = keys.items("is_moe_layer", num_layers, "true or false", lambda v: isinstance(v, bool))
    first = keys.integer("first_k_dense_replace", default=None, minimum=0)
    older = keys.integer("first_last_k_dense_replace", default=None, minimum=0)  # its name until transformers 5
    if kinds is not None:
        sparse = [kind == "sparse" for kind in kinds]
        if flags is not None and flags != sparse:
            raise keys.wrong("is_moe_layer", "true exactly where mlp_layer_types says sparse")
        return sparse
    if flags is not None:
        return flags
    dense = first if first is not None else older
    if dense is None:
        raise ConfigError(f"{keys.where}mlp_layer_types: missing, expected it, is_moe_layer or first_k_dense_replace")
    return [layer >= dense for layer in range(num_layers)]


def _moe(keys: _Keys, needed: bool) -> MoEConfig | None:
    if not needed and "num_experts" not in keys:
        return None
    return _build(
        MoEConfig,
        num_experts=keys.integer("num_experts"),
        num_experts_per_tok=keys.integer("num_experts_per_tok"),
        num_shared_experts=keys.integer("num_shared_experts", minimum=0),
        intermediate_size=keys.integer("moe_intermediate_size"),
        n_group=keys.integer("n_group", default=1),
        topk_group=keys.integer("topk_group", default=1),
        norm_topk_prob=keys.boolean("norm_topk_prob", default=True),
        routed_scaling_factor=keys.positive("routed_scaling_factor"),
    )


def _mtp(keys: _Keys, layers: tuple[LayerSpec, ...], sliding_window: int | None) -> tuple[LayerSpec | None, int]:
    """The multi-token-prediction layer and how often it is applied in a draft.

    Dense, with the main model's norms; always rotated, full attention or not, as vLLM does in code that LG contributed.
    """
    count = keys.integer("num_nextn_predict_layers", default=0, minimum=0)
    if count > 1:
        raise keys.wrong("num_nextn_predict_layers", "0 or 1: nothing else has been published")
    if count == 0:
        return None, 1  # the mtp_* keys, if there are any, describe nothing and are kept as they are
    types = keys.items("mtp_layer_types", 1, " or ".join(_LAYER_TYPES), lambda v: v in _LAYER_TYPES)
    sizes = keys.items("mtp_sliding_windows", 1, "an integer of at least 0", lambda v: _is_int(v) and v >= 0)
    if types is not None:
        slides = types == ["sliding_attention"]
        size = sizes[0] if sizes else (sliding_window or 0) * slides
        if slides != (size > 0):
            raise _wrong(f"{keys.where}mtp_sliding_windows[0]", size, "at least 1" if slides else "0 (full_attention)")
        window = size or None
    elif sizes is not None:
        window = sizes[0] or None
    else:
        window = layers[0].window  # EXAONE 4.5 says nothing; engines take layer_types[0]
    layer = layers[0].model_copy(update={"window": window, "rope": True, "moe": False, "swiglu_limit": None})
    return layer, keys.integer("mtp_num_speculative_steps", default=1)


def _rope(keys: _Keys) -> tuple[float, Llama3RopeScaling | None]:
    """theta and scaling from `rope_parameters`, nested `rope_scaling`, or flat `rope_theta` beside `rope_scaling`.

    Where several are there they must mean the same, however each is spelled.
    """
    spellings = ("rope_parameters", "rope_scaling")
    keys.taken.update(spellings)
    read = {name: _rope_object(keys, name) for name in spellings if name in keys}
    thetas = {f"{name}.rope_theta": theta for name, (theta, _) in read.items() if theta is not None}
    flat = keys.positive("rope_theta", default=None if thetas else _REQUIRED)
    if flat is not None:
        thetas["rope_theta"] = flat
    (first, theta), *others = thetas.items()
    for name, other in others:
        if other != theta:
            raise _wrong(keys.where + name, other, f"the same value as {keys.where}{first}, {theta}")
    scalings = [scaling for _, scaling in read.values()]
    if len(scalings) == 2 and scalings[0] != scalings[1]:
        raise keys.wrong("rope_scaling", f"the same as rope_parameters, {json.dumps(keys.raw['rope_parameters'])}")
    return theta, scalings[0] if scalings else None


def _rope_object(keys: _Keys, name: str) -> tuple[float | None, Llama3RopeScaling | None]:
    """theta (None if it is not in there) and scaling of one object, `rope_parameters` or `rope_scaling`."""
    inner = _Keys(keys.raw[name], f"{keys.where}{name}.")
    theta = inner.positive("rope_theta", default=None)
    rope_type = inner.choice(inner.alias("rope_type", "type"), ("default", "llama3"), default="default")
    if inner.raw.get("partial_rotary_factor", 1) != 1:
        raise inner.wrong("partial_rotary_factor", "1: nothing else is implemented")
    inner.taken.add("partial_rotary_factor")
    scaling = None
    if rope_type == "llama3":
        scaling = _build(
            Llama3RopeScaling,
            factor=inner.positive("factor"),
            low_freq_factor=inner.positive("low_freq_factor"),
            high_freq_factor=inner.positive("high_freq_factor"),
            original_max_position_embeddings=inner.integer("original_max_position_embeddings"),
        )
        outer = "original_max_position_embeddings"  # transformers lets an outer key win
        if outer in keys and keys.raw[outer] != scaling.original_max_position_embeddings:
            raise keys.wrong(outer, f"the same value as {inner.where}{outer}")
    if inner.rest():
        key = next(iter(inner.rest()))
        raise inner.wrong(key, f"no such key for rope_type {rope_type}")
    return theta, scaling


def _vision(top: _Keys) -> tuple[VisionConfig | None, Json]:
    top.taken.add("vision_config")
    if "vision_config" not in top:
        return None, {}
    keys = _Keys(top.raw["vision_config"], "vision_config.")
    keys.choice("model_type", (_VISION_MODEL_TYPE,), default=_VISION_MODEL_TYPE)
    config = VisionConfig(
        depth=keys.integer("depth"),
        hidden_size=keys.integer("hidden_size"),
        intermediate_size=keys.integer("intermediate_size"),
        num_heads=keys.integer("num_heads"),
        num_kv_heads=keys.integer("num_key_value_heads"),
        in_channels=keys.integer("in_channels"),
        patch_size=keys.integer("patch_size"),
        temporal_patch_size=keys.integer("temporal_patch_size"),
        spatial_merge_size=keys.integer("spatial_merge_size"),
        out_hidden_size=keys.integer("out_hidden_size"),
    )
    return config, keys.rest()


def _wrapper_fields(top: _Keys, text: _Keys) -> Json:
    """What EXAONE 4.5 may say beside `text_config` rather than in it."""
    fields: Json = {}
    if "tie_word_embeddings" in top:  # transformers ties by the outer key; the inner one is a default it writes
        fields["tie_word_embeddings"] = top.boolean("tie_word_embeddings")
        text.taken.add("tie_word_embeddings")
    name = top.alias("dtype", "torch_dtype")
    if name in top:
        fields["dtype"] = top.choice(name, _DTYPES)
    for key in ("bos_token_id", "pad_token_id"):
        if key in top and key not in text:
            fields[key] = top.token_id(key)
    if "eos_token_id" in top and "eos_token_id" not in text:
        fields["eos_token_ids"] = _eos_token_ids(top)
    return fields


# ---- ModelConfig -> config.json -------------------------------------------------------------------------------------


def to_hf(config: ModelConfig, extra: Json | None = None) -> Json:
    """The config.json of `config`, with the uninterpreted keys `extra` that `from_hf` returned.

    Written as transformers 5.23 reads it to the same network (exaone: as LG's remote code reads it). What 5.23 does not
    compute, K-EXAONE 2.0's per-layer windows and limits, is in the keys of its release. Raises ConfigError for a
    ModelConfig that no config.json describes (say, rotary embeddings on one global layer of a hybrid).
    """
    extra = {} if extra is None else extra
    head: Json = {"architectures": [_ARCHITECTURES[config.model_type][0]], "model_type": config.model_type}
    if config.model_type == "exaone4_5":
        result = _wrapped(config, head, extra)
    else:
        result = _merged(head | _text_fields(config), extra, "")
    again, _ = from_hf(result)
    if again != config:
        names = [name for name in ModelConfig.model_fields if getattr(again, name) != getattr(config, name)]
        raise ConfigError(
            f"no config.json of type {config.model_type} describes this model: {_difference(config, again, names[0])}"
        )
    return result


def _difference(config: ModelConfig, again: ModelConfig, name: str) -> str:
    wanted, got = getattr(config, name), getattr(again, name)
    if name == "layers":
        layer = next(index for index, pair in enumerate(zip(wanted, got, strict=True)) if pair[0] != pair[1])
        name, wanted, got = f"layers[{layer}]", wanted[layer], got[layer]
    return f"{name} is {wanted!r} and would be read as {got!r}"


def _merged(fields: Json, extra: Json, where: str) -> Json:
    for key in extra:
        if key in fields:
            raise _wrong(f"extra {where}{key}", extra[key], "keys that ModelConfig does not describe")
    return fields | extra


def _wrapped(config: ModelConfig, head: Json, extra: Json) -> Json:
    text = {"model_type": "exaone4", **_text_fields(config)}
    del text["tie_word_embeddings"]
    parts = {"text_config": _merged(text, extra.get("text_config", {}), "text_config.")}
    if config.vision is not None:
        vision = {"model_type": _VISION_MODEL_TYPE, **_vision_fields(config.vision)}
        parts["vision_config"] = _merged(vision, extra.get("vision_config", {}), "vision_config.")
    head = head | {"dtype": config.dtype, "tie_word_embeddings": config.tie_word_embeddings}
    outer = {key: value for key, value in extra.items() if key not in ("text_config", "vision_config")}
    return _merged(head, outer, "") | parts


def _vision_fields(vision: VisionConfig) -> Json:
    fields = vision.model_dump()
    fields["num_key_value_heads"] = fields.pop("num_kv_heads")
    return fields


def _canonical_constants(model_type: ModelType) -> Json:
    """The constants of `_ONLY` that `to_hf` writes, as the releases do."""
    if model_type == "exaone":
        return {"activation_function": "silu", "attention_dropout": 0.0, "embed_dropout": 0.0}
    fields: Json = {"hidden_act": "silu", "attention_dropout": 0.0}
    if model_type == "exaone_moe":
        fields |= {"scoring_func": "sigmoid", "topk_method": "noaux_tc"}
    return fields


def _text_fields(config: ModelConfig) -> Json:
    """The keys of the language model, in the spelling of its family's release."""
    old = config.model_type == "exaone"
    eos = config.eos_token_ids
    return {
        **_canonical_constants(config.model_type),
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_layers" if old else "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "layer_norm_epsilon" if old else "rms_norm_eps": config.rms_norm_eps,
        "max_position_embeddings": config.max_position_embeddings,
        **_rope_fields(config),
        **({} if old else _attention_fields(config)),
        **(_moe_fields(config) if config.model_type == "exaone_moe" else {}),
        **_mtp_fields(config),
        "tie_word_embeddings": config.tie_word_embeddings,
        "initializer_range": config.initializer_range,
        "bos_token_id": config.bos_token_id,
        "eos_token_id": None if not eos else eos[0] if len(eos) == 1 else list(eos),
        "pad_token_id": config.pad_token_id,
        "torch_dtype" if old else "dtype": config.dtype,
    }


def _rope_fields(config: ModelConfig) -> Json:
    scaling = None if config.rope_scaling is None else {"rope_type": "llama3", **config.rope_scaling.model_dump()}
    if config.model_type in ("exaone", "exaone4"):  # their releases predate rope_parameters; every version reads these
        return {"rope_theta": config.rope_theta, "rope_scaling": scaling}
    return {"rope_parameters": {**(scaling or {"rope_type": "default"}), "rope_theta": config.rope_theta}}


def _layer_type(layer: LayerSpec) -> str:
    return "full_attention" if layer.window is None else "sliding_attention"


def _attention_fields(config: ModelConfig) -> Json:
    windows = {layer.window for layer in config.layers} - {None}
    fields: Json = {"layer_types": [_layer_type(layer) for layer in config.layers]}
    if len(windows) <= 1:
        rotated = all(layer.rope for layer in config.layers)
        # No layer slides: null rotates every layer and a number, here one that does nothing else, rotates none.
        fields["sliding_window"] = (
            next(iter(windows)) if windows else None if rotated else config.max_position_embeddings
        )
    if config.model_type == "exaone_moe" and windows:
        fields["sliding_windows"] = [layer.window or 0 for layer in config.layers]
    return fields


def _moe_fields(config: ModelConfig) -> Json:
    sparse = [layer.moe for layer in config.layers]
    fields: Json = {"mlp_layer_types": ["sparse" if moe else "dense" for moe in sparse], "is_moe_layer": sparse}
    limits = [layer.swiglu_limit or 0.0 for layer in config.layers]
    if any(limits):
        fields["swiglu_limits"] = limits
    if config.moe is not None:
        fields |= config.moe.model_dump()
        fields["moe_intermediate_size"] = fields.pop("intermediate_size")
    return fields


def _mtp_fields(config: ModelConfig) -> Json:
    if config.model_type == "exaone":
        return {}
    if config.mtp_layer is None:
        return {"num_nextn_predict_layers": 0}
    return {
        "num_nextn_predict_layers": 1,
        "mtp_layer_types": [_layer_type(config.mtp_layer)],
        "mtp_sliding_windows": [config.mtp_layer.window or 0],
        "mtp_num_speculative_steps": config.mtp_num_steps,
    }


# ---- files ----------------------------------------------------------------------------------------------------------


def read_raw_config(path: Path | str) -> Json:
    """The JSON object in `path`: a config.json, or a directory that holds one. Raises ConfigError naming the path."""
    path = Path(path)
    if path.is_dir() and path.name != "config.json":
        path = path / "config.json"
    try:
        size = path.stat().st_size
        if size > _MAX_CONFIG_BYTES:
            raise ConfigError(f"{path}: {size} bytes is too large for a config.json")
        text = path.read_text("utf-8")
    except FileNotFoundError as error:
        raise ConfigError(f"{path}: no such file") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not UTF-8 text ({error.reason} at byte {error.start})") from error
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from error
    return _parse(text, path)


def _parse(text: str, path: Path) -> Json:
    start = text.lstrip("\ufeff \t\r\n")[:64].lower()
    if start.startswith("version https://git-lfs"):
        raise ConfigError(f"{path}: a Git LFS pointer, not the file itself; fetch it with `git lfs pull`")
    if start.startswith("<"):
        raise ConfigError(f"{path}: an HTML or XML page, not JSON; was the download refused?")
    try:
        value = json.loads(text, object_pairs_hook=_no_duplicates, parse_constant=_no_constant)
    except json.JSONDecodeError as error:
        raise ConfigError(f"{path}: not valid JSON: {error.msg} at line {error.lineno} column {error.colno}") from error
    except (RecursionError, MemoryError) as error:
        raise ConfigError(f"{path}: JSON nested too deeply") from error
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error
    except ValueError as error:  # an integer of thousands of digits
        raise ConfigError(f"{path}: not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise ConfigError(f"{path}: found a JSON {type(value).__name__}, expected an object")
    return value


def _no_duplicates(pairs: list[tuple[str, Any]]) -> Json:
    result: Json = {}
    for key, value in pairs:
        if key in result:
            raise ConfigError(f"key {key!r} appears twice")
        result[key] = value
    return result


def _no_constant(name: str) -> Any:
    raise ConfigError(f"{name} is not a number in JSON")


def read_config(path: Path | str) -> ModelConfig:
    """The ModelConfig in `path`: a config.json, or a directory that holds one. Raises ConfigError naming the path."""
    return read_config_and_extra(path)[0]


def read_config_and_extra(path: Path | str) -> tuple[ModelConfig, Json]:
    """`from_hf` of the file that `read_config` reads."""
    raw = read_raw_config(path)
    try:
        return from_hf(raw)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error


def _published_directory() -> Path:
    package = Path(__file__).resolve().parents[1]
    for root in (package, package.parent):  # an installed wheel carries configs/ inside the package
        if (root / "configs" / "models").is_dir():
            return root / "configs" / "models"
    raise ConfigError(f"configs/models: not found in {package} nor {package.parent}; the installation is incomplete")


def published_names() -> tuple[str, ...]:
    """The published models: the names of their Hugging Face repositories without the owner."""
    return tuple(sorted(path.stem for path in _published_directory().glob("*.json")))


def published(name: str) -> Path:
    """The config.json of a published model, `K-EXAONE-236B-A23B` say. Raises ConfigError naming the nearest one."""
    names = published_names()
    if name not in names:
        raise ConfigError(f"no published model {name!r}{_nearest(name, names)}; there are {', '.join(names)}")
    return _published_directory() / f"{name}.json"
