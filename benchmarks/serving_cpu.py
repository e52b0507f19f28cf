"""The engine beside transformers' `generate` and its continuous batching on this CPU: same weights and threads, one run.

    python -m benchmarks.serving_cpu [--dtype float32 bfloat16] [--concurrent 1 8]

So many requests, with prompts of 32 to 512 tokens, come at once and want 64 tokens each, greedy. Tokens a second, and the
mean time to a request's first token; above 1, the ratio says that exaone_jax is ahead. `generate` takes them as one batch,
padded on the left; continuous batching tells no first tokens. Each side runs in a process of its own, in turns; figures are
medians.
"""

import argparse
import tempfile
import time
from importlib.metadata import version
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks.machine import describe
from benchmarks.transformers_cpu import SHAPE, save_random
from benchmarks.turns import Run, Side, compare

LENGTHS = (32, 480, 96, 256, 64, 384, 128, 512)
NEW = 64
TURNS = 3


def prompts(concurrent: int) -> list[list[int]]:
    rng = np.random.default_rng(0)
    lengths = LENGTHS if concurrent > 1 else LENGTHS[-1:]
    return [rng.integers(2, SHAPE["vocab_size"], lengths[i % len(lengths)]).tolist() for i in range(concurrent)]


def exaone(directory: str, dtype: str, concurrent: int) -> Run:
    import exaone_jax
    from exaone_jax.inference.engine import Engine, EngineConfig
    from exaone_jax.inference.sampling import SamplingParams

    settings = EngineConfig(max_requests=concurrent, max_length=1024, prefix_caching=False)
    engine = Engine(exaone_jax.load(directory, dtype=dtype), settings)
    params = SamplingParams(max_new_tokens=NEW, ignore_eos=True)

    def run() -> tuple[float, Any]:
        begin = time.perf_counter()
        numbers = [engine.submit(prompt, params) for prompt in prompts(concurrent)]
        tokens: dict[int, list[int]] = {number: [] for number in numbers}
        first: dict[int, float] = {}
        while engine.busy:
            for update in engine.step():
                first.setdefault(update.request, time.perf_counter() - begin)
                tokens[update.request] += update.tokens
        seconds = time.perf_counter() - begin
        return seconds, ([tokens[number] for number in numbers], float(np.mean(list(first.values()))))

    return run


def _model(directory: str, dtype: str) -> Any:
    import torch
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    return transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=getattr(torch, dtype)).eval()


def transformers_generate(directory: str, dtype: str, concurrent: int) -> Run:
    import torch

    model, rows = _model(directory, dtype), prompts(concurrent)
    longest = max(map(len, rows))
    ids = torch.tensor([[0] * (longest - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows])

    def run() -> tuple[float, Any]:
        times: list[float] = []

        def note(ids: torch.Tensor, scores: Any, **_: object) -> torch.Tensor:
            times.append(time.perf_counter())
            return torch.zeros(len(ids), dtype=torch.bool)

        begin = time.perf_counter()
        with torch.no_grad():
            out = model.generate(
                ids, attention_mask=mask, max_new_tokens=NEW, do_sample=False, eos_token_id=None, pad_token_id=0,
                stopping_criteria=[note],
            )  # fmt: skip
        seconds = time.perf_counter() - begin
        return seconds, (out[:, longest:].tolist(), times[0] - begin)

    return run


def transformers_continuous(directory: str, dtype: str, concurrent: int) -> Run:
    import torch
    import transformers

    model, rows = _model(directory, dtype), prompts(concurrent)
    config = transformers.GenerationConfig(max_new_tokens=NEW, do_sample=False, eos_token_id=-1, pad_token_id=0)

    def run() -> tuple[float, Any]:
        begin = time.perf_counter()
        with torch.no_grad():
            out = model.generate_batch(inputs=rows, generation_config=config, progress_bar=False)
        seconds = time.perf_counter() - begin
        made = [each.generated_tokens for each in sorted(out.values(), key=lambda each: rows.index(each.prompt_ids))]
        return seconds, (made, float("nan"))

    return run


PEERS = {"generate": transformers_generate, "continuous batching": transformers_continuous}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--concurrent", nargs="+", type=int, default=[1, 8])
    parser.add_argument("--peers", nargs="+", choices=PEERS, default=list(PEERS))
    args = parser.parse_args()
    console = Console(width=130)
    table = Table(title=describe(transformers=version("transformers"), torch=version("torch")))
    for name in (
        "dtype",
        "requests",
        "transformers'",
        "tokens/s",
        "theirs",
        "ratio",
        "first token, s",
        "theirs",
        "ratio",
    ):
        table.add_column(name, justify="right")
    for dtype in args.dtype:
        with tempfile.TemporaryDirectory() as directory:
            save_random(directory, "hybrid", dtype)
            for concurrent in args.concurrent:
                for peer in args.peers:
                    values = measure(directory, dtype, concurrent, peer, console)
                    table.add_row(dtype, str(concurrent), peer, *values)
    console.print(table)


def measure(directory: str, dtype: str, concurrent: int, peer: str, console: Console) -> list[str]:
    """Tokens a second of both and their ratio, and the same of first tokens."""
    with Side(exaone, directory, dtype, concurrent) as ours, Side(PEERS[peer], directory, dtype, concurrent) as theirs:
        mine, other, (made, first), (expected, their_first) = compare(ours, theirs, TURNS)
    count = concurrent * NEW
    if made != expected:
        same = [np.mean(np.asarray(a) == np.asarray(b)) for a, b in zip(made, expected, strict=True)]
        console.print(f"  {dtype}, {concurrent}, {peer}: tokens agree at {np.mean(same):.1%} of places")
    return [
        *(f"{count / mine:.1f}", f"{count / other:.1f}", f"{other / mine:.2f}"),
        *(f"{first:.2f}", f"{their_first:.2f}", f"{their_first / first:.2f}"),
    ]


if __name__ == "__main__":
    main()
