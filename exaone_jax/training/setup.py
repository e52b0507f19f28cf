"""From a run's configuration to what the loop needs: model, state, stages of rows, and batches on their devices."""

import dataclasses
import hashlib
import itertools
import json
import math
from collections.abc import Callable, Iterator
from functools import cache, partial
from pathlib import Path
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from exaone_jax.checkpoints.load import checkpoint_config, open_checkpoint, read_open
from exaone_jax.checkpoints.names import ParameterPath
from exaone_jax.checkpoints.native import files_beside_weights
from exaone_jax.config import ModelConfig, published, read_config, to_hf
from exaone_jax.config.data import DataConfig
from exaone_jax.config.run import LoraConfig, OptimizerConfig, RunConfig
from exaone_jax.data.packing import PackedRows
from exaone_jax.data.rows import Rows, batches, open_rows
from exaone_jax.errors import ConfigError
from exaone_jax.model import Transformer
from exaone_jax.model.linear import Frozen, RouterBias
from exaone_jax.model.narrow import check_device
from exaone_jax.model.placement import ACTIVATIONS, OneDevice
from exaone_jax.model.quantized import quantise
from exaone_jax.parallel import MeshShape, make_mesh, partition_spec, place, sharded_shapes
from exaone_jax.text import ChatTemplate, Tokenizer, detect_generation, train_bpe
from exaone_jax.training.lora import adapt, base_digest, base_dtype
from exaone_jax.training.loss import LossConfig, has_mtp_loss
from exaone_jax.training.optimizer import Optimizer, adamw, cosine, frozen, muon, wsd
from exaone_jax.training.saves import Identity
from exaone_jax.training.step import Graph, Guard, TrainState, fresh_state

_BYTES = "bytes"
_Each = Callable[[ParameterPath, jax.Array], Any]
_BYTE_VOCABULARY = 618  # EXAONE's 362 added tokens and the 256 bytes


@dataclasses.dataclass(frozen=True)
class Stage:
    """Steps [start, stop) of rows of one length. first: the batch of `rows` that step `start` reads."""

    start: int
    stop: int
    context: int
    batch_size: int
    accumulate: int
    rows: Rows
    first: int

    @property
    def epochs(self) -> float:
        """How often its rows have been read when it ends, by stages before it as well."""
        return (self.first + self.stop - self.start) * self.batch_size / self.rows.rows_per_epoch

    @property
    def shape(self) -> tuple[int, ...]:
        """Of a batch: `[B, T]`, or `[A, B / A, T]` where gradients are taken in A parts."""
        if self.accumulate == 1:
            return (self.batch_size, self.context)
        return (self.accumulate, self.batch_size // self.accumulate, self.context)


@dataclasses.dataclass(frozen=True)
class Setup:
    """like: the state as jax.ShapeDtypeStructs with shardings. files: the tokenizer's, by name."""

    config: RunConfig
    model: ModelConfig
    tokenizer: Tokenizer
    template: ChatTemplate
    files: dict[str, Path]
    mesh: Mesh
    stages: tuple[Stage, ...]
    optimizer: Optimizer
    loss: LossConfig
    guard: Guard
    graphdef: Graph
    like: TrainState

    @property
    def identity(self) -> Identity:
        """What a saved step must have been made with: the same rows in the same order, as far as it has read them."""
        run = self.config
        stages = [(stage.start, stage.context, stage.batch_size, stage.rows.fingerprint) for stage in self.stages]
        data = hashlib.sha256(json.dumps([run.seed, stages]).encode()).hexdigest()
        return Identity(self.model, {"data, seed, batch_size, context or stages": data})

    def identity_beside(self, frozen: nnx.State) -> Identity:
        """Of a run that trains adapters: the same settings too, and the same weights beside them."""
        lora = "" if self.config.lora is None else self.config.lora.model_dump_json()
        known = {"lora": hashlib.sha256(lora.encode()).hexdigest(), "init_from": base_digest(frozen)}
        own = self.identity
        return dataclasses.replace(own, fingerprints={**own.fingerprints, **known}, adapters=True)

    def step_arguments(self) -> dict[str, Any]:
        """The static arguments of `train_step`."""
        run = self.config
        rate = 0.0 if run.freeze_router or run.lora is not None else run.router_bias_rate
        return {
            "optimizer": self.optimizer,
            "loss": self.loss,
            "router_bias_rate": rate,
            "ema": run.ema or 0.0,
            "guard": self.guard,
        }

    def stage_of(self, step: int) -> Stage:
        return next(stage for stage in reversed(self.stages) if stage.start <= step)


def set_up(config: RunConfig) -> Setup:
    """Everything but the arrays. Raises ConfigError, CheckpointError or InputError where the run cannot be."""
    model = _model_config(config)
    tokenizer, files = _tokenizer(config, model)
    template = _template(config, model, tokenizer)
    mesh = make_mesh(MeshShape(fsdp=-1) if config.mesh is None else MeshShape.parse(config.mesh))
    if config.quantize_forward != "none":
        check_device(config.quantize_forward, mesh.devices.flat[0], model.moe is not None)
    weights = config.loss
    loss = LossConfig(
        weights.mtp_weight,
        weights.balance_weight,
        weights.z_loss,
        None if config.remat == "none" else config.remat,
    )
    optimizer = make_optimizer(config.optimizer, config.steps, ("router",) if config.freeze_router else ())
    guard = Guard(config.guard.nonfinite == "stop", config.guard.sigma if config.guard.spikes == "skip" else None)
    stages = tuple(_stages(config, model, tokenizer, template, mesh))
    graphdef, like = _abstract(config, model, mesh, optimizer)
    has_mtp_loss(nnx.merge(graphdef, *like.model), loss)
    return Setup(
        config, model, tokenizer, template, files, mesh, stages, optimizer, loss, guard, graphdef, like
    )  # fmt: skip


def initial_state(setup: Setup) -> TrainState:
    """At step 0: random weights, the same on any mesh, or those of `init_from`; every array sharded as in `like`."""
    run = setup.config
    shardings = jax.tree.map(lambda struct: struct.sharding, setup.like)
    fresh = partial(fresh_state, optimizer=setup.optimizer, ema=run.ema is not None, window=run.guard.window)
    if run.init_from is None:

        def make() -> TrainState:
            model = Transformer(setup.model, dtype=run.dtype, param_dtype=jnp.float32, rngs=nnx.Rngs(run.seed))
            _, params, biases = nnx.split(model, nnx.Param, RouterBias)
            return fresh(params, biases)

        return jax.jit(make, out_shardings=shardings)()
    if run.lora is not None:
        return _beside_checkpoint(setup, run.lora, shardings, fresh)
    parts = (setup.like.params, setup.like.router_biases)
    values = _read(Path(run.init_from), parts, "float32")
    return jax.jit(fresh, out_shardings=shardings, donate_argnums=(0, 1))(*(_filled(part, values) for part in parts))


def _beside_checkpoint(
    setup: Setup, lora: LoraConfig, shardings: TrainState, fresh: Callable[..., TrainState]
) -> TrainState:
    """Fresh adapters, and the model frozen: quantised array by array, so that no more than one is there in 16 bits."""
    run, like = setup.config, setup.like
    _, source = _abstract(run.model_copy(update={"lora": None}), setup.model, setup.mesh, setup.optimizer)
    frozen = dict(nnx.to_flat_state(like.frozen))
    axes = {path: variable.get_metadata("axes") for path, variable in nnx.to_flat_state(source.params)}

    def kept(path: ParameterPath, array: jax.Array) -> Any:
        if (*path, "codes") not in frozen:
            return array
        out = tuple(frozen[(*path, name)].get_value().sharding for name in ("codes", "scale"))
        found = jax.jit(quantise, static_argnums=(1, 2), out_shardings=out)(array, axes[path], lora.base)
        return dict(zip(("codes", "scale"), jax.block_until_ready(found), strict=True))

    def make() -> TrainState:
        model = Transformer(setup.model, rngs=nnx.Rngs(0))  # nothing reads its own weights, so the program has none
        adapt(model, lora, nnx.Rngs(run.seed))
        return fresh(nnx.state(model, nnx.Param), nnx.State({}))

    values = _read(Path(cast(str, run.init_from)), source.model[:2], base_dtype(lora), kept)
    bare = dataclasses.replace(shardings, router_biases=nnx.State({}), frozen=nnx.State({}))
    adapters = jax.jit(make, out_shardings=bare)()
    biases, base = (_filled(part, values) for part in (like.router_biases, like.frozen))
    return dataclasses.replace(adapters, router_biases=biases, frozen=base)


def _read(
    path: Path, like: tuple[nnx.State, ...], dtype: str, each: _Each = lambda _, array: array
) -> dict[ParameterPath, Any]:
    """What a checkpoint has for states of jax.ShapeDtypeStructs with shardings."""
    flat = (pair for part in like for pair in nnx.to_flat_state(part))
    shardings = {cast(ParameterPath, key): variable.get_value().sharding for key, variable in flat}
    config, checkpoint = open_checkpoint(path)
    with checkpoint:
        return read_open(config, checkpoint, dtype=dtype, mesh_shardings=shardings, each=each)


def _filled(like: nnx.State, values: dict[ParameterPath, Any]) -> nnx.State:
    """A state with these values; of an array that became several, each by its name."""
    leaves = []
    for path, variable in nnx.to_flat_state(like):
        *lead, name = path = cast(ParameterPath, path)
        leaves.append((path, variable.replace(values[path] if path in values else values[tuple(lead)][name])))
    return nnx.from_flat_state(leaves)


@cache  # the same for the same: a second run in a process finds its step compiled
def make_optimizer(config: OptimizerConfig, steps: int, frozen_modules: tuple[str, ...] = ()) -> Optimizer:
    """Raises ConfigError where the schedule does not fit into the steps."""
    warmup = _steps(config.warmup, steps)
    match config.schedule:
        case "wsd":
            decay = max(1, _steps(config.decay, steps))
            schedule = wsd(config.learning_rate, steps, warmup=warmup, decay=decay, final=config.final)
        case "cosine":
            schedule = cosine(config.learning_rate, steps, warmup=warmup, final=config.final)
        case "constant":
            rise = optax.linear_schedule(0.0, config.learning_rate, warmup)
            schedule = optax.join_schedules([rise, optax.constant_schedule(config.learning_rate)], [warmup])
    make = muon if config.name == "muon" else adamw
    fields = ("weight_decay", "b1", "b2", "eps", "clip_norm")
    optimizer = make(schedule, **{name: getattr(config, name) for name in fields})
    return frozen(optimizer, frozen_modules) if frozen_modules else optimizer


def _steps(value: float, steps: int) -> int:
    return round(value * steps) if value < 1 else round(value)


def _model_config(config: RunConfig) -> ModelConfig:
    of_checkpoint = None if config.init_from is None else checkpoint_config(Path(config.init_from))
    if config.model is None:
        return cast(ModelConfig, of_checkpoint)
    if isinstance(config.model, ModelConfig):
        asked = config.model
    else:
        asked = read_config(Path(config.model) if Path(config.model).exists() else published(config.model))
    if of_checkpoint is not None and of_checkpoint != asked:
        names = [name for name in ModelConfig.model_fields if getattr(asked, name) != getattr(of_checkpoint, name)]
        raise ConfigError(
            f"init_from {config.init_from}: is a checkpoint of another model than `model`; different: "
            + ", ".join(
                f"{name} {getattr(of_checkpoint, name)!s:.60} for {getattr(asked, name)!s:.60}" for name in names
            )
        )
    return asked


def _tokenizer(config: RunConfig, model: ModelConfig) -> tuple[Tokenizer, dict[str, Path]]:
    if config.tokenizer == _BYTES:
        tokenizer, files = train_bpe([], _BYTE_VOCABULARY), {}
    else:
        folder = Path(config.tokenizer or cast(str, config.init_from))
        tokenizer = Tokenizer.from_directory(folder)
        files = {file.path: folder / file.path for file in files_beside_weights(folder)[0] if "/" not in file.path}
    if tokenizer.vocab_size > model.vocab_size:
        raise ConfigError(
            f"tokenizer: has ids up to {tokenizer.vocab_size - 1}, and the model's vocabulary is of {model.vocab_size}"
        )
    if config.init_from is not None and config.tokenizer is not None:
        own = Path(config.init_from)
        if (own / "tokenizer.json").is_file() and (
            of := Tokenizer.from_directory(own).vocab_size
        ) != tokenizer.vocab_size:
            raise ConfigError(
                f"tokenizer: {config.tokenizer} has {tokenizer.vocab_size} ids, and that of {own} has {of}; expected the "
                "tokenizer that the checkpoint was trained with"
            )
    for name in ("bos", "pad"):
        asked, there = getattr(model, f"{name}_token_id"), getattr(tokenizer, f"{name}_id")
        if asked is not None and there is not None and asked != there and config.init_from is not None:
            raise ConfigError(f"tokenizer: its {name} token is {there}, and the checkpoint's config.json says {asked}")
    return tokenizer, files


def _template(config: RunConfig, model: ModelConfig, tokenizer: Tokenizer) -> ChatTemplate:
    """The tokenizer's own, or that of the model's generation."""
    if config.init_from is not None:
        return ChatTemplate.for_checkpoint(config.init_from, tokenizer)
    own = tokenizer.chat_templates.get("default")
    generation = detect_generation(to_hf(model), template=own, tokens=tokenizer.control_tokens)
    return ChatTemplate.for_tokenizer(tokenizer, generation)


def _stages(
    config: RunConfig, model: ModelConfig, tokenizer: Tokenizer, template: ChatTemplate, mesh: Mesh
) -> Iterator[Stage]:
    context, batch_size, accumulate, data = config.context, config.batch_size, config.accumulate, config.data
    starts = [0, *(stage.start for stage in config.stages), config.steps]
    tokens, opened = 0, {}
    for number, (start, stop) in enumerate(itertools.pairwise(starts)):
        if number:
            stage = config.stages[number - 1]
            context, batch_size = stage.context, stage.batch_size or batch_size
            accumulate, data = stage.accumulate or accumulate, stage.data or data
        _check_divides(context, batch_size, accumulate, model, mesh)
        rows = _rows(data, tokenizer, template, context, opened)
        # Where it goes on in the same data, it starts as many tokens in as were read.
        first = 0 if number and config.stages[number - 1].data is not None else -(-tokens // (batch_size * context))
        tokens = (first + stop - start) * batch_size * context
        made = Stage(start, stop, context, batch_size, accumulate, rows, first)
        _check_enough(made, data)
        yield made


def _check_enough(stage: Stage, data: DataConfig) -> None:
    if data.epochs is None or stage.epochs <= data.epochs:
        return
    rows = stage.rows.rows_per_epoch
    most = stage.start + int(data.epochs * rows / stage.batch_size) - stage.first
    raise ConfigError(
        f"data: steps {stage.start} to {stage.stop} of {stage.batch_size} rows read its {rows:,} rows {stage.epochs:.2f} times, "
        f"expected at most data.epochs = {data.epochs:g}; that is enough to step {max(most, stage.start)}, and "
        f"data.epochs={math.ceil(stage.epochs)} for this schedule"
    )


def _rows(data: DataConfig, tokenizer: Tokenizer, template: ChatTemplate, length: int, opened: dict[Any, Rows]) -> Rows:
    key = (data.model_dump_json(), length)
    if key not in opened:
        opened[key] = open_rows(data, tokenizer, template, length)
    return opened[key]


def _check_divides(context: int, batch_size: int, accumulate: int, model: ModelConfig, mesh: Mesh) -> None:
    if context > model.max_position_embeddings:
        raise ConfigError(f"context: found {context:,}, expected at most the model's {model.max_position_embeddings:,}")
    parts = math.prod(mesh.shape[axis] for axis in ("data", "fsdp", "expert"))
    if batch_size % (accumulate * parts):
        raise ConfigError(
            f"batch_size: found {batch_size} rows, expected a multiple of accumulate {accumulate} x data x fsdp x expert "
            f"{parts}"
        )
    if context % mesh.shape["context"]:
        raise ConfigError(
            f"context: {context:,} tokens do not divide into the mesh's context={mesh.shape['context']} parts"
        )


def _abstract(config: RunConfig, model: ModelConfig, mesh: Mesh, optimizer: Optimizer) -> tuple[Graph, TrainState]:
    narrow = None if config.quantize_forward == "none" else config.quantize_forward
    placement = OneDevice(narrow) if mesh.size == 1 else place(model, mesh, narrow=narrow)

    def make() -> Transformer:
        rngs = nnx.Rngs(0)
        made = Transformer(model, dtype=config.dtype, param_dtype=jnp.float32, rngs=rngs, placement=placement)
        if config.lora is not None:
            adapt(made, config.lora, rngs)
        return made

    graphdef, *parts = nnx.split(nnx.eval_shape(make), nnx.Param, RouterBias, Frozen)
    fresh = partial(fresh_state, optimizer=optimizer, ema=config.ema is not None, window=config.guard.window)
    return graphdef, sharded_shapes(jax.eval_shape(fresh, *parts), mesh)


def batch_sharding(mesh: Mesh, shape: tuple[int, ...]) -> NamedSharding:
    """Of a batch `[B, T]` or `[A, B, T]`: rows over the batch axes, tokens over the sequence's."""
    spec = _row_spec(mesh, shape[-2:])
    return NamedSharding(mesh, PartitionSpec(*(None,) * (len(shape) - 2), *spec))


def _row_spec(mesh: Mesh, shape: tuple[int, ...]) -> PartitionSpec:
    return partition_spec("batch", shape, ACTIVATIONS[:2], mesh)


def abstract_batch(stage: Stage, mesh: Mesh) -> PackedRows:
    """A batch of a stage as jax.ShapeDtypeStructs."""
    sharding = batch_sharding(mesh, stage.shape)
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(stage.shape, x.dtype, sharding=sharding), stage.rows[0])


def device_batches(stage: Stage, mesh: Mesh, step: int) -> Iterator[PackedRows]:
    """Global batches from a step on. Each process reads the rows that its devices compute, and no others."""
    sharding, shape = batch_sharding(mesh, stage.shape), stage.shape
    local = local_rows(sharding, shape)
    read = batches(stage.rows, stage.first + step - stage.start, stage.batch_size, local)
    return (on_devices(rows, local, sharding, shape) for rows in read)


def local_rows(sharding: NamedSharding, shape: tuple[int, ...]) -> list[int]:
    """Which rows of a batch, counted through its parts, this process's devices compute."""
    rows = np.arange(math.prod(shape[:-1])).reshape(shape[:-1])
    indices = sharding.addressable_devices_indices_map(shape).values()
    return sorted({int(row) for index in indices for row in rows[cast(tuple, index)[:-1]].flat})


def on_devices(rows: PackedRows, local: list[int], sharding: NamedSharding, shape: tuple[int, ...]) -> PackedRows:
    """A global batch from this process's rows `[len(local), T]`."""
    number, place = np.arange(math.prod(shape[:-1])).reshape(shape[:-1]), {row: i for i, row in enumerate(local)}

    def put(array: Any) -> jax.Array:
        def part(index: tuple[slice, ...] | None) -> np.ndarray:
            index = cast(tuple[slice, ...], index)
            wanted = number[index[:-1]]
            found = np.asarray(array)[[place[int(row)] for row in wanted.flat]][:, index[-1]]
            return found.reshape(*wanted.shape, -1)

        return jax.make_array_from_callback(shape, sharding, part)

    return jax.tree.map(put, rows)


def evaluation_batches(setup: Setup) -> list[PackedRows]:
    """The first rows held out, in batches of the first stage's shape; what the last batch lacks is padding."""
    stage, run = setup.stages[0], setup.config
    rows = open_rows(run.data, setup.tokenizer, setup.template, stage.context, evaluation=True)
    count, size = min(run.evaluate.rows, rows.rows_per_epoch), stage.batch_size // stage.accumulate
    shape = (size, stage.context)
    sharding = batch_sharding(setup.mesh, shape)
    local, result = local_rows(sharding, shape), []
    for start in range(0, count, size):
        each = [rows[start + row] if start + row < count else jax.tree.map(np.zeros_like, rows[0]) for row in local]
        whole = jax.tree.map(lambda *parts: np.stack(parts), *each)
        result.append(on_devices(whole, local, sharding, shape))
    return result
