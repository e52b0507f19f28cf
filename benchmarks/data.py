"""How fast rows come: packing at the start, rows read in order, batches made ahead, and their share of a training step.

`python -m benchmarks.data` prepares documents of random tokens with lengths as the web's (log-normal, median 400 tokens) in a
temporary directory, then times each part alone, best of three. A step of S seconds waits for data only where a batch takes
longer than S; the share printed is the processor time of a batch over the step's, for steps of 0.1 s and 1 s.
"""

import hashlib
import json
import sys
import tempfile
import time
from itertools import islice
from pathlib import Path

import numpy as np

from benchmarks.machine import describe
from exaone_jax.config.data import DataConfig
from exaone_jax.data.documents import Counts, Document
from exaone_jax.data.rows import PackedSource, Rows, batches
from exaone_jax.data.store import LAYOUT, PreparedStore, pack_document

DOCUMENTS, VOCABULARY = 100_000, 153_600
CASES = ((2048, 8), (8192, 8), (32768, 8))  # tokens a row, rows a batch
BATCHES = 32
RUNS = 3
STEPS = (0.1, 1.0)


def write(directory: Path) -> None:
    """A prepared directory, as `exaone-jax data prepare` makes it."""
    from array_record.python.array_record_module import ArrayRecordWriter

    rng = np.random.default_rng(0)
    lengths = np.clip(rng.lognormal(np.log(400), 1.2, DOCUMENTS), 1, 200_000).astype(np.int32)
    file = directory / "shard-00000.array_record"
    writer = ArrayRecordWriter(str(file), "group_size:1,zstd:1")
    for length in lengths:
        writer.write(pack_document(Document(rng.integers(0, VOCABULARY, length, np.int32), None)))
    writer.close()
    np.save(directory / "shard-00000.lengths.npy", lengths)
    counts = Counts(len(lengths), int(lengths.sum()), int(lengths.sum()), 0)
    shard = {
        "name": "shard-00000",
        "documents": counts.documents,
        "tokens": counts.tokens,
        "bytes": file.stat().st_size,
        "sha256": hashlib.sha256(file.read_bytes()).hexdigest(),
    }
    manifest = {"layout": LAYOUT, "tokenizer": "none", "has_masks": False, "counts": vars(counts), "shards": [shard]}
    (directory / "manifest.json").write_text(json.dumps(manifest))


def best(work) -> tuple[float, float]:
    """Wall and processor seconds of the quickest of several runs."""
    times = []
    for _ in range(RUNS):
        wall, cpu = time.perf_counter(), time.process_time()
        work()
        times.append((time.perf_counter() - wall, time.process_time() - cpu))
    return min(times)


def main() -> int:
    print(describe())
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        write(directory)
        store = PreparedStore(directory, "none")
        config = DataConfig.model_validate({"sources": [{"path": name}]})
        print(f"{DOCUMENTS:,} documents, {int(store.lengths.sum()):,} tokens")
        shares = "".join(f"  of a {step:g} s step" for step in STEPS)
        print(f"{'T':>6} {'B':>3}  {'start':>7}  {'padding':>7}  {'rows/s':>8}  {'tokens/s':>12}  {'batch':>9}{shares}")
        for length, batch_size in CASES:
            start, _ = best(lambda length=length: PackedSource(store, config, length, 0, (0, 0)))
            source = PackedSource(store, config, length, 0, (0, 0))
            rows = Rows([source], [1.0], [], length, 0, False, "")

            def read(rows: Rows = rows, batch_size: int = batch_size) -> None:
                for _ in islice(batches(rows, 0, batch_size, threads=1), BATCHES):
                    pass

            wall, cpu = best(read)
            speed = BATCHES * batch_size / wall
            padding = 1 - source.tokens / (source.rows * length)
            shares = "".join(f"  {cpu / BATCHES / step:>14.2%}" for step in STEPS)
            print(
                f"{length:>6} {batch_size:>3}  {start:>5.2f} s  {padding:>7.3%}  {speed:>8,.0f}  {speed * length:>12,.0f}  "
                f"{wall / BATCHES * 1e3:>6.2f} ms{shares}"
            )
    return 0


if __name__ == "__main__":
    sys.exit(main())
