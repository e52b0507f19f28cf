"""Where a run's text comes from and how it is cut into rows. Importing it does not import jax."""

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, PositiveFloat

Format = Literal["auto", "jsonl", "parquet", "arrayrecord", "text", "dataset"]


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class SourceConfig(_Frozen):
    """A file, a directory, a glob pattern, or what `exaone-jax data prepare` wrote.

    weight: of its rows among those of all sources.
    format: "auto" goes by the names of the files; "dataset" is what `datasets` saves to disk.
    text_column: the column of plain documents.
    control_tokens: a control token spelled in `text`, or in a `prompt` or `completion` that is a string, becomes that token.
        For text that was rendered by a chat template before; otherwise such a spelling stays text.
    """

    path: str = Field(min_length=1)
    weight: float = Field(default=1.0, gt=0)
    format: Format = "auto"
    text_column: str = "text"
    control_tokens: bool = False


class DataConfig(_Frozen):
    """overlong: what becomes of a document longer than a row. packing "none": a row for each document, or piece of one.

    epochs: how often a schedule may read the data through, or a part of it: one that needs more is refused. None: any number.
    chat_template_kwargs: what every conversation's template is told; a row's own column of that name goes before it.
    """

    sources: tuple[SourceConfig, ...] = Field(min_length=1)
    eval_sources: tuple[SourceConfig, ...] = ()
    shuffle: bool = True
    seed: int = Field(default=0, ge=0)
    packing: Literal["best_fit", "none"] = "best_fit"
    overlong: Literal["split", "truncate", "drop"] = "split"
    epochs: PositiveFloat | None = 1.0
    chat_template_kwargs: dict[str, bool] = {}
