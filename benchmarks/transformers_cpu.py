"""exaone_jax beside transformers + torch on this machine's CPU: same weights, dtype and threads, one run.

    python benchmarks/transformers_cpu.py [--dtype float32 bfloat16] [--model hybrid global moe] [--rows train prefill decode]

Each row gives both times and their ratio, transformers / exaone_jax: above 1, exaone_jax is ahead. A time is the median of
interleaved repeats after a warm-up, so that a slow moment of the machine falls on both, with a pause before each, so that
neither meets the other's threads while they still spin. transformers runs SDPA attention, its
`DynamicCache` and a plain greedy loop over `model(...)`, which is quicker than its `generate`. Where
the greedy tokens of the two part, at near ties of a random model, the script says how many agree.
"""

import argparse
import gc
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
import transformers
from flax import nnx
from rich.console import Console
from rich.table import Table

import exaone_jax
from benchmarks.machine import describe
from exaone_jax.data.packing import PackedRows
from exaone_jax.inference.generate import Decoding
from exaone_jax.inference.sampling import SamplingParams
from exaone_jax.model import Transformer
from exaone_jax.model.relayout import with_layers
from exaone_jax.training import LossConfig, adamw, init_state, train_step

LAYERS = 12
DECODED = 48
PROMPT = 512
PAUSE = 0.2  # seconds
SHAPE = dict(
    vocab_size=32768, hidden_size=1024, intermediate_size=3584, num_hidden_layers=LAYERS, num_attention_heads=16,
    num_key_value_heads=4, head_dim=64, max_position_embeddings=8192, rms_norm_eps=1e-5, tie_word_embeddings=True,
    bos_token_id=1, eos_token_id=None, pad_token_id=0,
)  # fmt: skip
EXPERTS = dict(
    num_experts=32, num_experts_per_tok=4, num_shared_experts=1, moe_intermediate_size=512, first_k_dense_replace=1,
    mlp_layer_types=["dense"] + ["sparse"] * (LAYERS - 1), routed_scaling_factor=2.5,
)  # fmt: skip
HYBRID = ["sliding_attention"] * 3 + ["full_attention"]

Step = Callable[[], Any]


def hf_model(kind: str, dtype: str) -> transformers.PreTrainedModel:
    """A random model: `hybrid` (EXAONE 4.0, window 128, 3 local : 1 global), `global` (no window), `moe` (K-EXAONE)."""
    torch.manual_seed(0)
    types = ["full_attention"] * LAYERS if kind == "global" else HYBRID * (LAYERS // 4)
    window = dict(sliding_window=None if kind == "global" else 128, layer_types=types)
    if kind == "moe":
        config = transformers.ExaoneMoeConfig(**SHAPE, **window, **EXPERTS)
        model = transformers.ExaoneMoeForCausalLM(config)
    else:
        model = transformers.Exaone4ForCausalLM(transformers.Exaone4Config(**SHAPE, **window))
    return model.to(getattr(torch, dtype))


def jax_model(hf: transformers.PreTrainedModel, dtype: str) -> Transformer:
    with tempfile.TemporaryDirectory() as directory:
        hf.save_pretrained(directory)
        return exaone_jax.load(directory, dtype=dtype)


def compare(ours: Step, theirs: Step, repeats: int) -> tuple[float, float]:
    """Median seconds of both, interleaved after one warm-up each."""
    times: tuple[list[float], list[float]] = ([], [])
    for repeat in range(repeats + 1):
        for step, kept in zip((ours, theirs), times, strict=True):
            time.sleep(PAUSE)
            begin = time.perf_counter()
            step()
            if repeat:
                kept.append(time.perf_counter() - begin)
    return statistics.median(times[0]), statistics.median(times[1])


def train_rows(hf: transformers.PreTrainedModel, model: Transformer) -> Iterator[tuple[str, Step, Step, int]]:
    """Forward, backward and an AdamW step."""
    scanned = with_layers(model, scan=True)
    optimizer = adamw(lambda _: 1e-5, weight_decay=0.1, clip_norm=1.0)
    torch_optimizer = torch.optim.AdamW(hf.parameters(), lr=1e-5, betas=(0.9, 0.95), weight_decay=0.1)
    hf.train()
    for batch, length in ((4, 512), (1, 2048)):
        tokens = np.random.default_rng(0).integers(2, SHAPE["vocab_size"], (batch, length))
        graphdef, params = nnx.split(scanned)
        graphdef, state = init_state(nnx.merge(graphdef, jax.tree.map(jnp.copy, params)), optimizer)
        rows = PackedRows(jnp.asarray(tokens, jnp.int32), jnp.ones((batch, length), jnp.int32))
        kept, ids = [state], torch.tensor(tokens)
        del state, params

        def ours(graphdef=graphdef, kept=kept, rows=rows) -> None:
            kept[0], metrics = train_step(graphdef, kept[0], rows, optimizer=optimizer, loss=LossConfig())
            jax.block_until_ready((kept[0].params, metrics))

        def theirs(ids=ids) -> None:
            hf(input_ids=ids, labels=ids, use_cache=False).loss.backward()
            torch.nn.utils.clip_grad_norm_(hf.parameters(), 1.0)
            torch_optimizer.step()
            torch_optimizer.zero_grad()

        yield f"train {batch} x {length}", ours, theirs, 3
        kept.clear()
    hf.eval()


def prefill_rows(hf: transformers.PreTrainedModel, model: Transformer) -> Iterator[tuple[str, Step, Step, int]]:
    """A prompt into a fresh cache, and the first token."""
    for length, repeats in ((512, 7), (4096, 3)):
        prompt = np.random.default_rng(1).integers(2, SHAPE["vocab_size"], length).tolist()
        ids = torch.tensor([prompt])
        params = [SamplingParams(max_new_tokens=1, ignore_eos=True)]

        def ours() -> list[int]:
            return Decoding(model, [prompt], params).tokens()[0]

        def theirs() -> list[int]:
            with torch.no_grad():
                logits = hf(input_ids=ids, use_cache=True, logits_to_keep=1).logits
            return logits[:, -1].argmax(-1).tolist()

        check_same(ours(), theirs())
        yield f"prefill {length}", ours, theirs, repeats


def decode_rows(hf: transformers.PreTrainedModel, model: Transformer) -> Iterator[tuple[str, Step, Step, int]]:
    """Greedy tokens after a prompt of 512: the prompt is outside the clock on both sides."""
    for batch in (1, 16):
        prompts = np.random.default_rng(2).integers(2, SHAPE["vocab_size"], (batch, PROMPT))
        params = [SamplingParams(max_new_tokens=DECODED + 1, ignore_eos=True)] * batch
        made: dict[str, list[list[int]]] = {}

        def ours() -> float:
            decoding = Decoding(model, prompts.tolist(), params)
            jax.block_until_ready(decoding.state)
            begin = time.perf_counter()
            decoding.advance(DECODED)
            made["ours"] = decoding.tokens()
            return time.perf_counter() - begin

        def theirs() -> float:
            cache = transformers.DynamicCache(config=hf.config)
            with torch.no_grad():
                token = hf(torch.tensor(prompts), past_key_values=cache, logits_to_keep=1).logits[:, -1:].argmax(-1)
                tokens = [token]
                begin = time.perf_counter()
                for _ in range(DECODED):
                    token = hf(token, past_key_values=cache).logits[:, -1:].argmax(-1)
                    tokens.append(token)
            seconds = time.perf_counter() - begin
            made["theirs"] = torch.cat(tokens, 1).tolist()
            return seconds

        yield f"decode {DECODED} tokens, batch {batch}", ours, theirs, 3
        check_same(made["ours"], made["theirs"])


def compare_reported(ours: Callable[[], float], theirs: Callable[[], float], repeats: int) -> tuple[float, float]:
    """As `compare`, for steps that time themselves."""
    times = [(paused(ours), paused(theirs)) for _ in range(repeats + 1)][1:]
    first, second = zip(*times, strict=True)
    return statistics.median(first), statistics.median(second)


def paused(step: Callable[[], float]) -> float:
    time.sleep(PAUSE)
    return step()


def check_same(ours: list[Any], theirs: list[Any]) -> None:
    """Say how many of the greedy tokens agree, where not all do."""
    if ours != theirs:
        agree = np.mean(np.asarray(ours) == np.asarray(theirs))
        print(f"  greedy tokens agree at {agree:.1%} of places")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--model", nargs="+", default=["hybrid", "global", "moe"])
    parser.add_argument("--rows", nargs="+", default=["prefill", "decode", "train"])
    args = parser.parse_args()
    transformers.logging.set_verbosity_error()
    console = Console(width=110)
    table = Table(title=describe(transformers=transformers.__version__, torch=torch.__version__))
    for name in ("dtype", "model", "row", "exaone_jax ms", "transformers ms", "ratio"):
        table.add_column(name, justify="left" if name in ("dtype", "model", "row") else "right")
    for dtype in args.dtype:
        for kind in args.model:
            hf = hf_model(kind, dtype).eval()
            model = jax_model(hf, dtype)
            for family in args.rows:
                rows = {"prefill": prefill_rows, "decode": decode_rows, "train": train_rows}[family]
                timer = compare_reported if family == "decode" else compare
                for row, ours, theirs, repeats in rows(hf, model):
                    mine, other = timer(ours, theirs, repeats)
                    values = (f"{mine * 1e3:.1f}", f"{other * 1e3:.1f}", f"{other / mine:.2f}")
                    table.add_row(dtype, kind, row, *values)
                    console.print(dtype, kind, row, *values)
            del hf, model
            jax.clear_caches()
            gc.collect()
    console.print(table)


if __name__ == "__main__":
    main()
