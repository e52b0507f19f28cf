"""Conversion speed and memory: GB/s of `from_hf` and `to_hf` beside `cp` of the same bytes, with peak anonymous memory.

    python -m benchmarks.convert [--gigabytes 4] [--workers 4] [--directory DIR] [--rounds 3]

Each is timed until its bytes are on the disk: `cp` is followed by fsync of every file, as the conversions end with it. The
source is read through before each, so that all find it in the page cache (or none, when it does not fit). A round runs them
one after another; the printed ratio is of the medians. CPU seconds say what an idle machine would give: `cp` is one thread,
the conversions share their CPU time among the workers.
"""

import argparse
import json
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from exaone_jax.checkpoints import convert
from exaone_jax.checkpoints.atomic import sync_tree
from exaone_jax.checkpoints.hf_writer import HFWriter, plan_layout
from exaone_jax.checkpoints.load import read_params
from exaone_jax.checkpoints.names import SAFETENSORS_DTYPE, tensor_map
from exaone_jax.checkpoints.safetensors import TensorInfo
from exaone_jax.checkpoints.verify import verify
from exaone_jax.config.hf import to_hf
from exaone_jax.config.model import LayerSpec, ModelConfig, MoEConfig


def model(gigabytes: float) -> ModelConfig:
    """K-EXAONE with its own hidden and expert sizes, with fewer layers, experts and words."""
    moe = MoEConfig(num_experts=16, num_experts_per_tok=2, num_shared_experts=1, intermediate_size=2048)
    count = max(2, round((gigabytes - 1.0) / 1.47))  # an MoE layer of these sizes has 1.47 GB

    def layer(index: int) -> LayerSpec:
        hybrid = index % 4 == 3
        return LayerSpec(window=None if hybrid else 128, rope=not hybrid, moe=index > 0)

    return ModelConfig(
        model_type="exaone_moe",
        vocab_size=25_600,
        hidden_size=6144,
        intermediate_size=6144,
        num_heads=64,
        num_kv_heads=8,
        head_dim=128,
        layers=tuple(layer(index) for index in range(count)),
        moe=moe,
        max_position_embeddings=4096,
    )


def write_source(path: Path, config: ModelConfig) -> int:
    """Random bits under the names of `config`; returns their bytes."""
    path.mkdir()
    dtype = SAFETENSORS_DTYPE[config.dtype]
    infos = {t.name: TensorInfo("F32" if t.keep_float32 else dtype, t.shape) for t in tensor_map(config)}
    writer, noise = HFWriter(path, plan_layout(infos)), np.random.default_rng(0).bytes(1 << 29)
    for name, info in infos.items():
        width = 4 if info.dtype == "F32" else 2
        data = np.frombuffer(noise, np.uint8, info.nbytes).view(f"u{width}").reshape(info.shape)
        writer.write_rows(name, 0, info.shape[0], data)
    writer.finish()
    (path / "config.json").write_text(json.dumps(to_hf(config, {}), indent=2))
    sync_tree(path)
    return sum(info.nbytes for info in infos.values())


def copy(source: Path, target: Path) -> None:
    """`cp -r`, then fsync of every file."""
    subprocess.run(["cp", "-r", str(source), str(target)], check=True)
    sync_tree(target)


def anonymous_memory() -> int:
    """RssAnon of this process in bytes: what it holds and could not drop, page cache not counted."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("/proc/self/status has no RssAnon")


def cpu_seconds() -> float:
    """User and system time of this process and of the children it waited for."""
    who = (resource.getrusage(kind) for kind in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(usage.ru_utime + usage.ru_stime for usage in who)


def measure(action: str, source: Path, target: Path, workers: int) -> tuple[float, float, int]:
    """Run one action in a process of its own: (seconds, CPU seconds, peak anonymous bytes)."""
    command = [sys.executable, "-m", "benchmarks.convert", "--run", action, str(source), str(target), str(workers)]
    out = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()
    return float(out[-3]), float(out[-2]), int(out[-1])


def run_one(action: str, source: Path, target: Path, workers: int) -> None:
    """The child of `measure`."""
    actions: dict[str, Callable[[], object]] = {
        "cp": lambda: copy(source, target),
        "from_hf": lambda: convert.from_hf(source, target, workers=workers),
        "to_hf": lambda: convert.to_hf(source, target, workers=workers),
        "verify": lambda: verify(source, target, allow_nonfinite=True, workers=workers),
        "load": lambda: read_params(source),
    }
    peak, stop = [anonymous_memory()], threading.Event()

    def watch() -> None:
        while not stop.wait(0.005):
            peak[0] = max(peak[0], anonymous_memory())

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    start, cpu_start = time.perf_counter(), cpu_seconds()
    actions[action]()
    seconds, cpu = time.perf_counter() - start, cpu_seconds() - cpu_start
    stop.set()
    watcher.join()
    print(seconds, cpu, peak[0])


def warm_memory(scratch: Path, size: int) -> None:
    """Write a file of `size` bytes and remove it: what runs next finds pages that the machine has touched before.

    A virtual machine may get its memory from the host page by page; the first use of a page then costs ten times the copy
    that is measured, and whichever action comes to it first pays.
    """
    block = bytes(1 << 24)
    with scratch.open("wb") as file:
        for _ in range(size // len(block)):
            file.write(block)
    scratch.unlink()


def read_through(path: Path) -> None:
    for file in path.rglob("*"):
        if file.is_file():
            with file.open("rb") as reader:
                while reader.read(1 << 24):
                    pass


def benchmark(root: Path, gigabytes: float, workers: int, rounds: int) -> None:
    source, native, back, copied = (root / name for name in ("hf", "native", "back", "copy"))
    config = model(gigabytes)
    size = write_source(source, config)
    largest = max(t.size * 2 for t in tensor_map(config))
    print(
        f"{size / 1e9:.2f} GB in {len(tensor_map(config))} tensors, the largest {largest / 1e6:.0f} MB, {workers} workers"
    )
    seconds: dict[str, list[float]] = {}
    cpus: dict[str, list[float]] = {}
    memory: dict[str, int] = {}
    steps = (("cp", source, copied), ("from_hf", source, native), ("to_hf", native, back), ("verify", source, native))
    for _ in range(rounds):
        for target in (copied, native, back):
            shutil.rmtree(target, ignore_errors=True)
        for action, one, other in (*steps, ("load", source, back), ("load native", native, back)):
            warm_memory(root / "scratch", 2 * size)
            read_through(one)
            took, cpu, peak = measure(action.split()[0], one, other, workers)
            seconds.setdefault(action, []).append(took)
            cpus.setdefault(action, []).append(cpu)
            memory[action] = max(peak, memory.get(action, 0))
    if any(a.read_bytes() != (back / a.name).read_bytes() for a in source.iterdir()):
        raise RuntimeError("the bytes did not come back")
    cp = statistics.median(seconds["cp"])
    print(f"{'':12} {'seconds':>8} {'GB/s':>6} {'of cp':>6} {'CPU s/GB':>9} {'peak RssAnon':>13}")
    for action, times in seconds.items():
        took = statistics.median(times)
        cpu = statistics.median(cpus[action]) / size * 1e9
        rate, peak = size / 1e9 / took, memory[action] / 1e6
        print(f"{action:12} {took:8.2f} {rate:6.2f} {cp / took:6.0%} {cpu:9.2f} {peak:10.0f} MB")
    print(
        f"bound: 2 x largest x workers + 1 GB = {(2 * largest * workers + 10**9) / 1e6:.0f} MB (load holds the model)"
    )


def main() -> None:
    if sys.argv[1:2] == ["--run"]:
        run_one(sys.argv[2], Path(sys.argv[3]), Path(sys.argv[4]), int(sys.argv[5]))
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=4.0)
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--directory", type=Path, help="where to write: the file system to measure")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.directory) as root:
        benchmark(Path(root), arguments.gigabytes, arguments.workers, arguments.rounds)


if __name__ == "__main__":
    main()
