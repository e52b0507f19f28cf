"""ModelConfig: every EXAONE language model as data (DESIGN, contract 1)."""

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

ModelType = Literal["exaone", "exaone4", "exaone_moe", "exaone4_5"]
DType = Literal["float32", "bfloat16", "float16"]


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class LayerSpec(_Frozen):
    """What one decoder layer is. Code asks the spec, never the model's name."""

    window: int | None = Field(default=None, ge=1)  # visible keys, self included; None attends to everything before
    rope: bool = True
    norm: Literal["pre", "post"] = "pre"  # post: inside the residual branch, after attention and MLP (EXAONE 4.0, 4.5)
    qk_norm: bool = True
    moe: bool = False
    swiglu_limit: float | None = Field(default=None, gt=0)  # clamp of the pre-activations (K-EXAONE 2.0)


class MoEConfig(_Frozen):
    """Router and experts of the sparse layers. Sigmoid scores, selection bias, optional group-limited top-k."""

    num_experts: int = Field(ge=1)
    num_experts_per_tok: int = Field(ge=1)
    num_shared_experts: int = Field(ge=0)
    intermediate_size: int = Field(ge=1)  # of one routed expert; the shared one is num_shared_experts times as wide
    n_group: int = Field(default=1, ge=1)
    topk_group: int = Field(default=1, ge=1)
    norm_topk_prob: bool = True
    routed_scaling_factor: float = Field(default=1.0, gt=0)

    @model_validator(mode="after")
    def _check_groups(self) -> "MoEConfig":
        if self.num_experts % self.n_group:
            raise ValueError(f"num_experts {self.num_experts} does not divide into n_group {self.n_group} groups")
        if self.topk_group > self.n_group:
            raise ValueError(f"topk_group {self.topk_group} is more than n_group {self.n_group}")
        group_size = self.num_experts // self.n_group
        if self.n_group > 1 and group_size < 2:
            raise ValueError(f"a group of experts needs at least 2 members, found {group_size}")
        if self.num_experts_per_tok > group_size * self.topk_group:
            raise ValueError(
                f"num_experts_per_tok {self.num_experts_per_tok} is more than the {group_size * self.topk_group} "
                f"experts in topk_group {self.topk_group} groups"
            )
        return self


class Llama3RopeScaling(_Frozen):
    """Frequency scaling of Llama 3: low frequencies divided by `factor`, a ramp between the two bands."""

    factor: float = Field(ge=1)
    low_freq_factor: float = Field(gt=0)
    high_freq_factor: float = Field(gt=0)
    original_max_position_embeddings: int = Field(ge=1)

    @model_validator(mode="after")
    def _check_bands(self) -> "Llama3RopeScaling":
        if self.high_freq_factor <= self.low_freq_factor:
            raise ValueError(
                f"high_freq_factor {self.high_freq_factor} must be greater than low_freq_factor {self.low_freq_factor}"
            )
        return self


class VisionConfig(_Frozen):
    """EXAONE 4.5's vision tower. Its tensors are carried through conversion; the language model does not compute it."""

    depth: int = Field(ge=1)
    hidden_size: int = Field(ge=1)
    intermediate_size: int = Field(ge=1)
    num_heads: int = Field(ge=1)
    num_kv_heads: int = Field(ge=1)
    in_channels: int = Field(ge=1)
    patch_size: int = Field(ge=1)
    temporal_patch_size: int = Field(ge=1)
    spatial_merge_size: int = Field(ge=1)
    out_hidden_size: int = Field(ge=1)


class ModelConfig(_Frozen):
    """One EXAONE language model. Hashable, so it can be a static argument of jit."""

    model_type: ModelType
    vocab_size: int = Field(ge=1)
    hidden_size: int = Field(ge=1)
    intermediate_size: int = Field(ge=1)  # of dense MLPs
    num_heads: int = Field(ge=1)
    num_kv_heads: int = Field(ge=1)
    head_dim: int = Field(ge=2)
    layers: tuple[LayerSpec, ...] = Field(min_length=1)
    moe: MoEConfig | None = None
    mtp_layer: LayerSpec | None = None  # the multi-token-prediction layer, where the model has one
    mtp_num_steps: int = Field(default=1, ge=1)  # how often the one MTP layer is applied when drafting as trained
    rms_norm_eps: float = Field(default=1e-5, gt=0)
    rope_theta: float = Field(default=1e6, gt=0)
    rope_scaling: Llama3RopeScaling | None = None
    max_position_embeddings: int = Field(ge=1)
    tie_word_embeddings: bool = False
    initializer_range: float = Field(default=0.02, ge=0)
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    pad_token_id: int | None = None
    dtype: DType = "bfloat16"  # of the checkpoint
    vision: VisionConfig | None = None

    @model_validator(mode="after")
    def _check(self) -> "ModelConfig":
        if self.num_heads % self.num_kv_heads:
            raise ValueError(f"num_heads {self.num_heads} is not a multiple of num_kv_heads {self.num_kv_heads}")
        if self.head_dim % 2:
            raise ValueError(f"head_dim must be even for rotary embeddings, found {self.head_dim}")
        if any(layer.moe for layer in self.layers) and self.moe is None:
            raise ValueError("a layer is a mixture of experts but the model has no `moe` section")
        for name, ids in (
            ("bos_token_id", (self.bos_token_id,)),
            ("eos_token_id", self.eos_token_ids),
            ("pad_token_id", (self.pad_token_id,)),
        ):
            if wrong := [token for token in ids if token is not None and not 0 <= token < self.vocab_size]:
                raise ValueError(f"{name}: found {wrong[0]}, expected an id below vocab_size {self.vocab_size}")
        return self

    @property
    def num_layers(self) -> int:
        return len(self.layers)


class Segment(_Frozen):
    """`repeats` copies of `pattern`: their parameters are stacked on a leading axis and scanned."""

    pattern: tuple[LayerSpec, ...]
    repeats: int


def layer_plan(layers: tuple[LayerSpec, ...], max_pattern: int = 8) -> tuple[Segment, ...]:
    """Fold the layers into the segments with the fewest distinct layer bodies, counting each segment as one more.

    EXAONE 4.0 32B is LLLG x 16; K-EXAONE 236B is (dense L, L, L, G) x 1 then LLLG x 11.
    Ties go to the longest first segment, so a sequence of layers has one plan. Dynamic programming from the end.
    """
    n = len(layers)
    numbers = {layer: number for number, layer in enumerate(dict.fromkeys(layers))}
    kinds = [numbers[layer] for layer in layers]
    # From each layer on: the cost, where the first segment ends, and the size of its pattern.
    best = [(0, 0, 0)] * (n + 1)
    for start in range(n - 1, -1, -1):
        options = []
        for size in range(1, min(max_pattern, n - start) + 1):
            pattern, end = kinds[start : start + size], start
            while kinds[end : end + size] == pattern:
                end += size
                options.append((best[end][0] + size + 1, -end, size))
        cost, end, size = min(options)
        best[start] = (cost, -end, size)
    segments, start = [], 0
    while start < n:
        _, end, size = best[start]
        segments.append(Segment(pattern=layers[start : start + size], repeats=(end - start) // size))
        start = end
    return tuple(segments)


def single_layers(layers: tuple[LayerSpec, ...]) -> tuple[Segment, ...]:
    """The plan that folds nothing: every layer a segment of its own."""
    return tuple(Segment(pattern=(layer,), repeats=1) for layer in layers)
