"""Where a run's text comes from and how it is cut into rows."""

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class SourceConfig(_Frozen):
    """A file or directory. weight: of its rows among those of all sources."""

    path: str
    weight: float = Field(default=1.0, gt=0)
    format: Literal["auto", "jsonl", "parquet", "arrayrecord", "text", "dataset"] = "auto"


class DataConfig(_Frozen):
    """overlong: what becomes of documents longer than a row."""

    sources: tuple[SourceConfig, ...] = Field(min_length=1)
    eval_sources: tuple[SourceConfig, ...] = ()
    shuffle: bool = True
    seed: int = 0
    packing: Literal["best_fit", "none"] = "best_fit"
    overlong: Literal["split", "truncate", "drop"] = "split"
    chat_template_kwargs: dict[str, bool] = {}
