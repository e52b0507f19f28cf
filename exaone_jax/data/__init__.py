"""From text to training batches: sources, tokenising, packing, the pipeline."""

from exaone_jax.data.packing import PackedRows, pack
from exaone_jax.data.pipeline import pipeline
from exaone_jax.data.sources import python_files
from exaone_jax.data.tokenising import tokenise

__all__ = ["PackedRows", "pack", "pipeline", "python_files", "tokenise"]
