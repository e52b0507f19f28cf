"""The configuration of a training run: a YAML file, what it is based on, and `key=value` on top. Does not import jax."""

import difflib
import itertools
import json
import re
import types
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import yaml
from pydantic import (
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    PositiveFloat,
    PositiveInt,
    Tag,
    ValidationError,
    model_validator,
)

from exaone_jax.config.data import DataConfig
from exaone_jax.config.model import ModelConfig
from exaone_jax.errors import ConfigError


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class OptimizerConfig(_Frozen):
    """AdamW, or Muon for matrices and AdamW for the rest, and the schedule of the learning rate.

    warmup, decay: in steps; below 1, a part of the run's steps. decay is of WSD alone. final: the last learning rate.
    """

    name: Literal["adamw", "muon"] = "adamw"
    schedule: Literal["wsd", "cosine", "constant"] = "wsd"
    learning_rate: PositiveFloat
    warmup: float = Field(default=0.0, ge=0)
    decay: float = Field(default=0.2, ge=0)
    final: float = Field(default=0.0, ge=0)
    weight_decay: float = Field(default=0.1, ge=0)
    b1: float = Field(default=0.9, ge=0, lt=1)
    b2: float = Field(default=0.95, ge=0, lt=1)
    eps: PositiveFloat = 1e-8
    clip_norm: PositiveFloat = 1.0


class LossWeights(_Frozen):
    """As `exaone_jax.training.LossConfig`; the defaults are K-EXAONE's."""

    mtp_weight: float = Field(default=0.05, ge=0)
    balance_weight: float = Field(default=1e-4, ge=0)
    z_loss: float = Field(default=0.0, ge=0)


class StageConfig(_Frozen):
    """From step `start` on, rows of another length; what is None stays as it was."""

    start: PositiveInt
    context: PositiveInt
    batch_size: PositiveInt | None = None
    accumulate: PositiveInt | None = None
    data: DataConfig | None = None


class SaveConfig(_Frozen):
    """every: steps. minutes: of wall time. Both None: only at the end. keep: how many saved steps stay."""

    every: PositiveInt | None = 1000
    minutes: PositiveFloat | None = None
    keep: PositiveInt = 3


class GuardConfig(_Frozen):
    """What is done about bad steps.

    nonfinite: a loss or gradient that is NaN or infinite stops the run at the last good step, or is skipped.
    spikes: steps whose loss or gradient norm is `sigma` standard deviations above the last `window` ones are kept or skipped.
    checksum_every: steps between comparisons of the parameters' copies on different devices; None: never.
    hang_seconds: a step that takes longer ends the run with the stacks of all threads; None: wait for ever.
    """

    nonfinite: Literal["stop", "skip"] = "stop"
    spikes: Literal["keep", "skip"] = "keep"
    sigma: PositiveFloat = 6.0
    window: int = Field(default=128, ge=2)
    checksum_every: PositiveInt | None = None
    hang_seconds: PositiveFloat | None = 1800.0


class EvaluateConfig(_Frozen):
    """Loss on the first `rows` rows of `data.eval_sources`, at the end and every so many steps."""

    every: PositiveInt | None = None
    rows: PositiveInt = 64


class SampleConfig(_Frozen):
    """Greedy text after each prompt, every so many steps."""

    every: PositiveInt
    prompts: tuple[str, ...] = Field(min_length=1)
    max_new_tokens: PositiveInt = 64


class HostsConfig(_Frozen):
    """As `exaone_jax.parallel.hosts.Hosts`."""

    coordinator: str
    num_processes: PositiveInt
    process_id: int = Field(ge=0)
    timeout: PositiveInt = 300
    heartbeat: PositiveInt = 100


Target = Literal["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "experts", "lm_head"]


class LoraConfig(_Frozen):
    """Adapters of low rank are trained, and all else is frozen.

    alpha: an adapter's product is multiplied by alpha / rank. targets: which matrices of every layer have one: those of
    attention, those of the dense layers' MLP and the shared experts, and all three of each of the experts; and the output head,
    whose product with its adapter is one matrix, so that its backward pass costs what training it would.
    base: what the frozen matrices of the layers are kept in; where in 8 or 4 bits, all else that is frozen is in bfloat16.
    """

    rank: PositiveInt = 16
    alpha: PositiveFloat = 32.0
    targets: tuple[Target, ...] = Field(
        default=("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"), min_length=1
    )
    base: Literal["float32", "bfloat16", "int8", "nf4"] = "bfloat16"


def _named_or_inline(value: object) -> str:
    return "name" if isinstance(value, str) else "inline"


class RunConfig(_Frozen):
    """One run. Lengths are in tokens, batch_size in rows a step over all devices, times in the unit that the name says.

    model: a published name, a config.json, a checkpoint directory, or a ModelConfig itself; None: that of init_from.
    init_from: a Hugging Face or native checkpoint to start from; None: random weights from `seed`.
    tokenizer: its directory, or `bytes`: EXAONE's special tokens and the 256 bytes. None: that of init_from.
    accumulate: in how many parts, one after the other, the gradient of a batch is taken.
    stop_after: end, with the step saved, when so many are done; the schedules are those of `steps` all the same.
    ema: decay of an average of the parameters, which evaluation, samples and export then use.
    quantize_forward: what the layers' matrices and their inputs are rounded to for the products of the forward pass.
    mesh: AXIS=SIZE,…; None: all devices along fsdp. hosts: `environment` where jax finds them by itself (Cloud TPU, Slurm).
    lora: train adapters beside the weights of init_from, and write them for PEFT into `adapter` of run_dir at the end.
    export: where to write a Hugging Face directory at the end; with lora, of the adapted model.
    """

    run_dir: str
    steps: PositiveInt
    stop_after: PositiveInt | None = None
    seed: int = Field(default=0, ge=0, lt=2**31)
    model: (
        Annotated[Annotated[str, Tag("name")] | Annotated[ModelConfig, Tag("inline")], Discriminator(_named_or_inline)]
        | None
    ) = None
    init_from: str | None = None
    tokenizer: str | None = None
    data: DataConfig
    context: PositiveInt
    batch_size: PositiveInt
    accumulate: PositiveInt = 1
    stages: tuple[StageConfig, ...] = ()
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    quantize_forward: Literal["none", "int8", "float8"] = "none"
    remat: Literal["none", "dots", "full", "offload"] = "full"
    mesh: str | None = None
    hosts: Literal["environment"] | HostsConfig | None = None
    optimizer: OptimizerConfig
    loss: LossWeights = LossWeights()
    router_bias_rate: float = Field(default=1e-4, ge=0)
    freeze_router: bool = False
    lora: LoraConfig | None = None
    ema: float | None = Field(default=None, gt=0, lt=1)
    save: SaveConfig = SaveConfig()
    guard: GuardConfig = GuardConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    sample: SampleConfig | None = None
    trackers: tuple[Literal["tensorboard", "wandb", "clearml"], ...] = ()
    profile_steps: tuple[int, int] | None = None
    export: str | None = None

    @model_validator(mode="after")
    def _check(self) -> "RunConfig":
        if self.model is None and self.init_from is None:
            raise ValueError("needs `model` (random weights) or `init_from` (a checkpoint)")
        if self.lora is not None and self.init_from is None:
            raise ValueError("lora: needs init_from, the checkpoint that adapters are trained beside")
        if self.tokenizer is None and self.init_from is None:
            raise ValueError("needs `tokenizer`, a directory or `bytes`, as there is no `init_from` that brings one")
        starts = [0, *(stage.start for stage in self.stages), self.steps]
        if any(a >= b for a, b in itertools.pairwise(starts)):
            raise ValueError(f"stages must start in order between step 1 and steps {self.steps}, found {starts[1:-1]}")
        if self.evaluate.every is not None and not self.data.eval_sources:
            raise ValueError("evaluate.every needs data.eval_sources")
        if self.profile_steps is not None and not 0 <= self.profile_steps[0] < self.profile_steps[1]:
            raise ValueError(f"profile_steps must be [first, one past the last], found {list(self.profile_steps)}")
        return self


def read_run(path: Path | str, overrides: Iterable[str] = ()) -> RunConfig:
    """The configuration in a YAML file, with `key=value` or `section.key=value` on top; values are YAML.

    Raises ConfigError that names the file or override, the key, what was found and what was expected.
    """
    raw = _with_base(Path(path), ())
    for override in overrides:
        _override(raw, override)
    return parse_run(raw, str(path))


def parse_run(raw: Mapping[str, Any], source: str) -> RunConfig:
    """From parsed YAML. Strict: a string is no number, and true is no 1."""
    try:
        return RunConfig.model_validate_json(json.dumps(raw), strict=True)
    except ValidationError as error:
        problems = [_problem(dict(problem), raw) for problem in error.errors(include_url=False)]
        raise ConfigError("\n".join(f"{source}: {problem}" for problem in problems)) from error


def dump_run(config: RunConfig) -> str:
    """As YAML, every key written out."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


class _Loader(yaml.SafeLoader):
    """YAML with 1e-4 as a number, and no key twice."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?[0-9][0-9_]*(\.[0-9_]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)


def _mapping(loader: _Loader, node: yaml.MappingNode) -> dict[Any, Any]:
    keys = [loader.construct_object(key) for key, _ in node.value]
    if twice := sorted({str(key) for key in keys if keys.count(key) > 1}):
        raise ConfigError(f"line {node.start_mark.line + 1}: {', '.join(twice)} is given twice")
    return loader.construct_mapping(node, deep=True)


_Loader.add_constructor("tag:yaml.org,2002:map", _mapping)


def _parse(text: str, source: str) -> Any:
    try:
        return yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        raise ConfigError(f"{source}: not valid YAML: {error}") from error
    except ConfigError as error:
        raise ConfigError(f"{source}: {error}") from error


def _with_base(path: Path, seen: tuple[Path, ...]) -> dict[str, Any]:
    """The mapping in a file over that of its `base:`, a path beside it."""
    if path.resolve() in seen:
        raise ConfigError(f"{path}: is its own base, through {' -> '.join(map(str, seen))}")
    try:
        raw = _parse(path.read_text(encoding="utf-8"), str(path))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read: {error}") from error
    if not isinstance(raw, dict) or not all(isinstance(key, str) for key in raw):
        raise ConfigError(f"{path}: found {type(raw).__name__}, expected a mapping of keys to values")
    base = raw.pop("base", None)
    if base is None:
        return raw
    if not isinstance(base, str):
        raise ConfigError(f"{path}: base: found {base!r}, expected the path of another file")
    return _merged(_with_base(path.parent / base, (*seen, path.resolve())), raw)


def _merged(below: dict[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """Mappings are merged key by key, all else is replaced."""
    result = dict(below)
    for key, value in above.items():
        under = result.get(key)
        result[key] = _merged(under, value) if isinstance(under, dict) and isinstance(value, dict) else value
    return result


def _override(raw: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not re.fullmatch(r"\w+(\.\w+)*", key):
        raise ConfigError(f"found {override!r}, expected key=value, as steps=100 or optimizer.learning_rate=3e-4")
    place: Any = raw
    *parts, last = key.split(".")
    for part in parts:
        if isinstance(place, list) and part.isdecimal() and int(part) < len(place):
            place = place[int(part)]
        elif isinstance(place, dict):
            place[part] = place.get(part) if isinstance(place.get(part), dict | list) else {}
            place = place[part]
        else:
            raise ConfigError(f"{override}: {part!r} is no place in a list of {len(place)}")
    value = _parse(text, override)
    if isinstance(place, list):
        if not last.isdecimal() or int(last) >= len(place):
            raise ConfigError(f"{override}: {last!r} is no place in a list of {len(place)}")
        place[int(last)] = value
    else:
        place[last] = value


def _problem(problem: dict[str, Any], raw: Mapping[str, Any]) -> str:
    where = [part for part in problem["loc"] if part not in ("name", "inline", "HostsConfig", "literal['environment']")]
    name = ".".join(map(str, where))
    if problem["type"] == "extra_forbidden":
        known = sorted(_keys_at(RunConfig, where[:-1]))
        near = difflib.get_close_matches(str(where[-1]), known, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]}?" if near else f"expected one of {', '.join(known)}"
        return f"unknown key {name}; {hint}"
    if problem["type"] == "missing":
        return f"{name} is missing"
    message = problem["msg"].removeprefix("Value error, ")
    found = "" if problem["type"] == "value_error" else f"found {json.dumps(problem['input'])[:80]}: "
    return f"{name + ': ' if name else ''}{found}{message}"


def _keys_at(model: type[BaseModel], where: list[Any]) -> set[str]:
    """The keys that a mapping at this place may have."""
    models = {model}
    for part in where:
        if isinstance(part, str):
            fields = [each.model_fields[part] for each in models if part in each.model_fields]
            models = {found for field in fields for found in _models(field.annotation)}
    return {key for each in models for key in each.model_fields}


def _models(annotation: Any) -> set[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return {annotation}
    if get_origin(annotation) in (Union, types.UnionType, tuple, Annotated):
        return {found for each in get_args(annotation) for found in _models(each)}
    return set()
