"""What a step is, for all who count it."""

from dataclasses import dataclass
from typing import Literal, cast, get_args

from exaone_jax.config import ModelConfig
from exaone_jax.config.model import DType
from exaone_jax.config.run import LoraConfig
from exaone_jax.errors import ConfigError
from exaone_jax.model.stack import Remat

Mode = Literal["train", "prefill", "decode"]
POLICIES: tuple[Remat, ...] = (None, "dots", "full", "offload")
_CHUNK = 2048


@dataclass(frozen=True)
class Workload:
    """One step over `batch` rows.

    Attributes:
        mode: train: forward, backward and update over rows of `context` tokens. prefill: the last `chunk` tokens of
            `context`, over a cache of the others. decode: one token a row, the last of `context`.
        batch: rows, over all devices.
        context: tokens a row.
        chunk: tokens a row and step of prefill; 1 in decoding, `context` in training.
        remat: in training, what the backward pass recomputes.
        dtype: that the step computes in; training keeps float32 parameters.
        lora: adapters alone are trained, beside a frozen model; None: all of it is.
    """

    mode: Mode
    batch: int
    context: int
    chunk: int
    remat: Remat
    dtype: DType = "bfloat16"
    lora: LoraConfig | None = None

    @property
    def tokens(self) -> int:
        """That one step computes."""
        return self.batch * self.chunk

    @property
    def itemsize(self) -> int:
        """Bytes of a number in `dtype`."""
        return 4 if self.dtype == "float32" else 2

    @property
    def start(self) -> int:
        """The position of the first token of a row that the step computes."""
        return self.context - self.chunk


def workload(
    config: ModelConfig,
    mode: str,
    batch: int,
    context: int,
    chunk: int | None = None,
    remat: str | None = "full",
    lora: LoraConfig | None = None,
) -> Workload:
    """Raises ConfigError where a figure makes no step of this model."""
    if mode not in get_args(Mode):
        raise ConfigError(f"mode: found {mode!r}, expected one of {', '.join(get_args(Mode))}")
    if remat not in POLICIES:
        raise ConfigError(f"remat: found {remat!r}, expected one of none, {', '.join(map(str, POLICIES[1:]))}")
    limit = config.max_position_embeddings
    if not 1 <= context <= limit:
        raise ConfigError(f"context: found {context:,}, expected 1 to {limit:,}, the longest of this model")
    if batch < 1:
        raise ConfigError(f"batch: found {batch}, expected at least one row")
    if chunk is not None and (mode != "prefill" or not 1 <= chunk <= context):
        raise ConfigError(f"chunk: found {chunk} in mode {mode}, expected 1 to {context:,} in mode prefill")
    if lora is not None and mode != "train":
        raise ConfigError(f"lora: found it in mode {mode}, expected mode train: adapters are served merged")
    step = {"train": context, "decode": 1, "prefill": chunk or min(_CHUNK, context)}[mode]
    kept = cast(Remat, remat) if mode == "train" else None
    return Workload(cast(Mode, mode), batch, context, step, kept, lora=lora)
