"""Rows of packed documents, each a pure function of the files, the configuration, the length and its index."""

import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from exaone_jax.config.data import DataConfig, SourceConfig
from exaone_jax.data.packing import PackedRows, pack
from exaone_jax.data.tokenising import tokenise
from exaone_jax.errors import InputError
from exaone_jax.text import ChatTemplate, Tokenizer


class Rows:
    """Endless: `rows[i]` is row i `[T]`, in another order each epoch."""

    def __init__(self, packed: PackedRows, config: DataConfig, fingerprint: str, shuffle: bool):
        self._packed, self._config, self._shuffle, self.fingerprint = packed, config, shuffle, fingerprint
        self.rows_per_epoch = len(packed.tokens)
        self.tokens_per_epoch = int((np.asarray(packed.segment_ids) != 0).sum())

    def __getitem__(self, index: int) -> PackedRows:
        epoch, place = divmod(index, self.rows_per_epoch)
        if self._shuffle:
            place = np.random.default_rng((self._config.seed, epoch)).permutation(self.rows_per_epoch)[place]
        return PackedRows(self._packed.tokens[place], self._packed.segment_ids[place])


def open_rows(
    config: DataConfig,
    tokenizer: Tokenizer,
    template: ChatTemplate | None,
    length: int,
    *,
    evaluation: bool = False,
) -> Rows:
    del template
    texts: list[str] = []
    digest = hashlib.sha256(config.model_dump_json().encode() + str(length).encode())
    for source in config.eval_sources if evaluation else config.sources:
        for text in _texts(source):
            digest.update(text.encode())
            texts.append(text)
    packed = pack(tokenise(tokenizer, texts), length, tokenizer.pad_id or 0)
    return Rows(packed, config, digest.hexdigest(), config.shuffle and not evaluation)


def batches(rows: Rows, start: int, batch_size: int, local: Sequence[int], prefetch: int = 2) -> Iterator[PackedRows]:
    """From batch `start` on, of each batch the rows `local`: `[len(local), T]`."""
    del prefetch
    while True:
        each = [rows[start * batch_size + row] for row in local]
        yield PackedRows(np.stack([row.tokens for row in each]), np.stack([row.segment_ids for row in each]))
        start += 1


def _texts(source: SourceConfig) -> Iterator[str]:
    path = Path(source.path)
    if not path.exists():
        raise InputError(f"{path}: not found")
    files = sorted(path.rglob("*.py")) if path.is_dir() else [path]
    for file in files:
        if file.suffix == ".jsonl":
            for line in file.read_text().splitlines():
                yield json.loads(line)["text"]
        else:
            yield file.read_text(encoding="utf-8")
