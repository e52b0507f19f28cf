"""From text to training batches: sources, documents, packing, mixtures, rows by their index."""

from exaone_jax.data.documents import Counts, Document, Encoder
from exaone_jax.data.packing import PackedRows, pack
from exaone_jax.data.rows import Rows, SourceReport, batches, open_rows
from exaone_jax.data.sources import python_files

__all__ = [
    "Counts",
    "Document",
    "Encoder",
    "PackedRows",
    "Rows",
    "SourceReport",
    "batches",
    "open_rows",
    "pack",
    "python_files",
]
