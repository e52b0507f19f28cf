"""exaone_jax beside transformers + torch on this machine's CPU: same weights, dtype and threads, one run.

    python -m benchmarks.transformers_cpu [--dtype float32 bfloat16] [--model hybrid global moe] [--rows train prefill decode]

Each row gives both times and their ratio, transformers / exaone_jax: above 1, exaone_jax is ahead. The two run in processes
of their own that take turns, so that a slow moment of the machine falls on both; a time is the median of the turns.
transformers runs SDPA attention, its `DynamicCache` and a plain greedy loop over `model(...)`, which is quicker than its
`generate`. Where the greedy tokens of the two part, at near ties of a random model, the script says how many agree.
"""

import argparse
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from typing import Any, NamedTuple

import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks.machine import describe
from benchmarks.turns import Run, Side, compare

LAYERS = 12
PROMPT = 512
SHAPE = dict(
    vocab_size=32768, hidden_size=1024, intermediate_size=3584, num_hidden_layers=LAYERS, num_attention_heads=16,
    num_key_value_heads=4, head_dim=64, max_position_embeddings=8192, rms_norm_eps=1e-5, tie_word_embeddings=True,
    bos_token_id=1, eos_token_id=None, pad_token_id=0,
)  # fmt: skip
EXPERTS = dict(
    num_experts=32, num_experts_per_tok=4, num_shared_experts=1, moe_intermediate_size=512, first_k_dense_replace=1,
    routed_scaling_factor=2.5,
)  # fmt: skip
HYBRID = ["sliding_attention"] * 3 + ["full_attention"]


class Row(NamedTuple):
    """`prefill`: a prompt into a fresh cache and its first token. `decode`: greedy tokens after a prompt of 512, which is
    outside the clock. `train`: forward, backward and an AdamW step."""

    family: str
    batch: int
    length: int
    repeats: int

    @property
    def name(self) -> str:
        if self.family == "decode":
            return f"decode {self.length} tokens, batch {self.batch}"
        return f"{self.family} {self.batch} x {self.length}"

    def tokens(self) -> np.ndarray:
        length = PROMPT if self.family == "decode" else self.length
        return np.random.default_rng(0).integers(2, SHAPE["vocab_size"], (self.batch, length))


ROWS = [
    Row("prefill", 1, 512, 7), Row("prefill", 1, 4096, 3), Row("decode", 1, 48, 5), Row("decode", 16, 48, 3),
    Row("train", 4, 512, 3), Row("train", 1, 2048, 3),
]  # fmt: skip


def save_random(directory: str, kind: str, dtype: str, **changes: Any) -> None:
    """A random model: `hybrid` (EXAONE 4.0, window 128, 3 local : 1 global), `global` (no window), `moe` (K-EXAONE).

    changes: of SHAPE.
    """
    import torch
    import transformers

    torch.manual_seed(0)
    shape = SHAPE | changes
    layers = shape["num_hidden_layers"]
    types = ["full_attention"] * layers if kind == "global" else HYBRID * (layers // 4)
    window = dict(sliding_window=None if kind == "global" else 128, layer_types=types)
    if kind == "moe":
        mlps = dict(mlp_layer_types=["dense"] + ["sparse"] * (layers - 1))
        model = transformers.ExaoneMoeForCausalLM(transformers.ExaoneMoeConfig(**shape, **window, **EXPERTS, **mlps))
    else:
        model = transformers.Exaone4ForCausalLM(transformers.Exaone4Config(**shape, **window))
    transformers.logging.disable_progress_bar()
    model.to(getattr(torch, dtype)).save_pretrained(directory)


def timed(step: Callable[[], Any]) -> Run:
    def run() -> tuple[float, Any]:
        begin = time.perf_counter()
        out = step()
        return time.perf_counter() - begin, out

    return run


def exaone(directory: str, dtype: str, row: Row) -> Run:
    import jax
    import jax.numpy as jnp

    import exaone_jax
    from exaone_jax.data.packing import PackedRows
    from exaone_jax.inference.generate import Decoding
    from exaone_jax.inference.sampling import SamplingParams
    from exaone_jax.model.relayout import with_layers
    from exaone_jax.training import LossConfig, adamw, init_state, train_step

    model, tokens = exaone_jax.load(directory, dtype=dtype), row.tokens()
    if row.family == "train":
        optimizer = adamw(lambda _: 1e-5, weight_decay=0.1, clip_norm=1.0)
        graphdef, state = init_state(with_layers(model, scan=True), optimizer)
        rows = PackedRows(jnp.asarray(tokens, jnp.int32), jnp.ones(tokens.shape, jnp.int32))
        kept = [state]
        del model, state

        def train() -> None:
            kept[0], metrics = train_step(graphdef, kept[0], rows, optimizer=optimizer, loss=LossConfig())
            jax.block_until_ready((kept[0].params, metrics))

        return timed(train)
    if row.family == "prefill":
        params = [SamplingParams(max_new_tokens=1, ignore_eos=True)]
        return timed(lambda: Decoding(model, tokens.tolist(), params).tokens())
    params = [SamplingParams(max_new_tokens=row.length + 1, ignore_eos=True)] * row.batch

    def decode() -> tuple[float, list[list[int]]]:
        decoding = Decoding(model, tokens.tolist(), params)
        jax.block_until_ready(decoding.state)
        begin = time.perf_counter()
        decoding.advance(row.length)
        made = decoding.tokens()
        return time.perf_counter() - begin, made

    return decode


def transformers_torch(directory: str, dtype: str, row: Row) -> Run:
    import torch
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    model = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=getattr(torch, dtype))
    ids = torch.tensor(row.tokens())
    if row.family == "train":
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, betas=(0.9, 0.95), weight_decay=0.1)
        model.train()

        def train() -> None:
            model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()

        return timed(train)
    model.eval()

    @torch.no_grad()
    def prefill() -> list[list[int]]:
        logits = model(input_ids=ids, use_cache=True, logits_to_keep=1).logits
        return logits[:, -1:].argmax(-1).tolist()

    @torch.no_grad()
    def decode() -> tuple[float, list[list[int]]]:
        cache = transformers.DynamicCache(config=model.config)
        token = model(ids, past_key_values=cache, logits_to_keep=1).logits[:, -1:].argmax(-1)
        made = [token]
        begin = time.perf_counter()
        for _ in range(row.length):
            token = model(token, past_key_values=cache).logits[:, -1:].argmax(-1)
            made.append(token)
        return time.perf_counter() - begin, torch.cat(made, 1).tolist()

    return decode if row.family == "decode" else timed(prefill)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--model", nargs="+", default=["hybrid", "global", "moe"])
    parser.add_argument("--rows", nargs="+", default=["prefill", "decode", "train"])
    args = parser.parse_args()
    console = Console(width=110)
    table = Table(title=describe(transformers=version("transformers"), torch=version("torch")))
    for name in ("dtype", "model", "row", "exaone_jax ms", "transformers ms", "ratio"):
        table.add_column(name, justify="left" if name in ("dtype", "model", "row") else "right")
    for dtype in args.dtype:
        for kind in args.model:
            with tempfile.TemporaryDirectory() as directory:
                save_random(directory, kind, dtype)
                for row in (row for row in ROWS if row.family in args.rows):
                    values = measure(directory, dtype, row, console)
                    table.add_row(dtype, kind, row.name, *values)
                    console.print(dtype, kind, row.name, *values)
    console.print(table)


def measure(directory: str, dtype: str, row: Row, console: Console) -> tuple[str, str, str]:
    """Milliseconds of both sides, and their ratio."""
    with Side(exaone, directory, dtype, row) as ours, Side(transformers_torch, directory, dtype, row) as theirs:
        mine, other, made, expected = compare(ours, theirs, row.repeats)
    if made != expected:
        console.print(f"  greedy tokens agree at {np.mean(np.asarray(made) == np.asarray(expected)):.1%} of places")
    return f"{mine * 1e3:.1f}", f"{other * 1e3:.1f}", f"{other / mine:.2f}"


if __name__ == "__main__":
    main()
