"""The main job end to end on this machine, in a few minutes: `make demo`.

Trains a tokenizer and a small K-EXAONE on the source of Python's standard library, writes a Hugging Face checkpoint, loads
it back and completes a function that it has never seen, with and without speculation by its multi-token-prediction layer.
Downloads nothing. Writes under demo-output/. Exit code 1 where something did not come out as it must.
"""

import argparse
import dataclasses
import json
import math
import os
import random
import shutil
import sys
import sysconfig
import time
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import matplotlib as mpl
import numpy as np
from flax import nnx
from matplotlib import pyplot
from rich.console import Console
from rich.syntax import Syntax

import exaone_jax
from exaone_jax.checkpoints.convert import save_hf
from exaone_jax.config import LayerSpec, ModelConfig, MoEConfig
from exaone_jax.config.data import DataConfig, SourceConfig
from exaone_jax.data import PackedRows, Rows, batches, open_rows, python_files
from exaone_jax.errors import ExaoneError
from exaone_jax.inference.sampling import SamplingParams
from exaone_jax.inference.text import Completion, complete
from exaone_jax.model import Transformer
from exaone_jax.text import Tokenizer, train_bpe
from exaone_jax.training import Evaluation, LossConfig, TrainState, evaluate, init_state, muon, train_step, wsd
from exaone_jax.training.step import Graph, trained_model

SEED = 0
HELD_OUT_EVERY = 25  # of the library's files, one in so many is never trained on
PROMPT_FILE, PROMPT_FUNCTION = "bisect.py", "insort_left"  # held out as well
WINDOW = 128
MTP_WEIGHT = 0.3  # K-EXAONE's 0.05 is for trillions of tokens: here the layer has minutes to become a good guesser
ROUTER_BIAS_RATE = 1e-2  # and 1e-4 for millions of steps: here the routers have hundreds to even their experts' load
DRAFT_TOKENS = 1
TARGET = 0.5  # held-out loss must fall below this part of its start
LOGITS_TOLERANCE = 1e-3  # float32 logits of order 10, from the layers in one scan and one by one


@dataclasses.dataclass(frozen=True)
class Size:
    """How much to do. characters bounds the text; rows of row_length tokens, batch_size of them a step."""

    characters: int
    vocab_size: int
    hidden_size: int
    num_heads: int
    num_experts: int
    expert_size: int
    row_length: int
    batch_size: int
    held_out_rows: int
    steps: int
    peak_learning_rate: float
    new_tokens: int


FULL = Size(
    characters=6_000_000,
    vocab_size=2048,
    hidden_size=256,
    num_heads=4,
    num_experts=8,
    expert_size=128,
    row_length=512,
    batch_size=4,
    held_out_rows=64,
    steps=240,
    peak_learning_rate=8e-3,
    new_tokens=128,
)
QUICK = Size(
    characters=400_000,
    vocab_size=700,
    hidden_size=64,
    num_heads=1,
    num_experts=4,
    expert_size=32,
    row_length=160,
    batch_size=4,
    held_out_rows=8,
    steps=40,
    peak_learning_rate=1e-2,
    new_tokens=24,
)


class Corpus(NamedTuple):
    """Texts to train on, texts held out, and the beginning of a held-out function."""

    train: list[str]
    held_out: list[str]
    prompt: str


class Curve(NamedTuple):
    """Training loss of each step, nats a token, and held-out loss before and after."""

    train: list[float]
    before: Evaluation
    after: Evaluation


class DemoError(Exception):
    """The demo ran, but something did not come out as it must."""


class Report:
    """Prints the steps of the demo as they go, each with its time."""

    def __init__(self, console: Console):
        self.console, self._started, self._count = console, time.perf_counter(), 0

    @contextmanager
    def step(self, title: str) -> Generator[None]:
        self._count += 1
        self.console.print(f"[bold cyan]{self._count}. {title}")
        started = time.perf_counter()
        yield
        self.console.print(f"   [dim]{time.perf_counter() - started:.1f} s")

    def say(self, text: str) -> None:
        self.console.print(f"   {text}", highlight=False, soft_wrap=True)

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self._started


def gather(characters: int) -> Corpus:
    """The standard library's source: every HELD_OUT_EVERY-th file held out, the rest shuffled and cut to a budget."""
    root = Path(sysconfig.get_path("stdlib"))
    files = python_files(root)
    held_out = set(files[::HELD_OUT_EVERY]) | {root / PROMPT_FILE}
    train = [path for path in files if path not in held_out]
    random.Random(SEED).shuffle(train)
    texts, total = [], 0
    for path in train:
        if total < characters:
            texts.append(path.read_text(encoding="utf-8", errors="replace"))
            total += len(texts[-1])
    held = [path.read_text(encoding="utf-8", errors="replace") for path in files if path in held_out]
    source = (root / PROMPT_FILE).read_text(encoding="utf-8")
    start = source.index(f"def {PROMPT_FUNCTION}(")
    return Corpus(texts, held, source[: source.index("\n", start) + 1])


def small_k_exaone(size: Size, tokenizer: Tokenizer) -> ModelConfig:
    """K-EXAONE's shape: LLLG with window 128, a dense first layer and then experts, an MTP layer."""
    local, everywhere = LayerSpec(window=WINDOW), LayerSpec(rope=False)
    layers = (local, *(spec.model_copy(update={"moe": True}) for spec in (local, local, everywhere)))
    return ModelConfig(
        model_type="exaone_moe",
        vocab_size=tokenizer.vocab_size,
        hidden_size=size.hidden_size,
        intermediate_size=3 * size.hidden_size,
        num_heads=size.num_heads,
        num_kv_heads=max(1, size.num_heads // 2),
        head_dim=64,
        layers=layers,
        moe=MoEConfig(
            num_experts=size.num_experts,
            num_experts_per_tok=2,
            num_shared_experts=1,
            intermediate_size=size.expert_size,
            routed_scaling_factor=2.5,
        ),
        mtp_layer=LayerSpec(),
        rope_theta=1e4,
        max_position_embeddings=4096,
        bos_token_id=tokenizer.bos_id,
        eos_token_ids=tokenizer.eos_ids,
        pad_token_id=tokenizer.pad_id,
        dtype="float32",
    )


def new_model(config: ModelConfig) -> Transformer:
    """Random weights. Embeddings start at a root mean square of 1, so that what layers add does not drown them at first."""
    model = Transformer(config, rngs=nnx.Rngs(SEED))
    model.embed.embedding[...] = model.embed.embedding[...] / config.initializer_range
    return model


def write_text(corpus: Corpus, folder: Path) -> DataConfig:
    """The corpus as JSONL, as a run reads it."""
    folder.mkdir(exist_ok=True)
    files = {"train": corpus.train, "held-out": corpus.held_out}
    for name, texts in files.items():
        lines = "".join(json.dumps({"text": text}) + "\n" for text in texts)
        (folder / f"{name}.jsonl").write_text(lines, encoding="utf-8")
    train, held_out = (SourceConfig(path=str(folder / f"{name}.jsonl")) for name in files)
    return DataConfig(sources=(train,), eval_sources=(held_out,), seed=SEED)


def batches_of(rows: Rows, batch_size: int, count: int) -> list[PackedRows]:
    """`count` of the rows, evenly spread over all, in batches."""
    chosen = [rows[i * rows.rows_per_epoch // count] for i in range(count)]
    batched = (chosen[start : start + batch_size] for start in range(0, count, batch_size))
    return [PackedRows(*(np.stack([row[i] for row in batch]) for i in range(2))) for batch in batched]


def train(
    size: Size, model: Transformer, rows: Rows, held_out: list[PackedRows], report: Report
) -> tuple[Graph, TrainState, Curve]:
    """Pre-train `model`, which is used up, and evaluate before and after."""
    optimizer = muon(wsd(size.peak_learning_rate, size.steps, warmup=size.steps // 20, decay=size.steps // 3))
    graphdef, state = init_state(model, optimizer)
    before = evaluate(graphdef, state, held_out)
    report.say(f"held-out loss before: {before.loss:.3f} nats a token (ln V = {math.log(model.config.vocab_size):.3f})")
    stream, loss, losses = batches(rows, 0, size.batch_size), LossConfig(mtp_weight=MTP_WEIGHT), []
    started = time.perf_counter()
    for step in range(size.steps):
        state, metrics = train_step(
            graphdef, state, next(stream), optimizer=optimizer, loss=loss, router_bias_rate=ROUTER_BIAS_RATE
        )
        losses.append(float(metrics.loss.loss))
        if step == 0:
            report.say(f"compiled in {time.perf_counter() - started:.1f} s")
            started = time.perf_counter()
        elif step % (size.steps // 10) == 0 or step == size.steps - 1:
            speed = step * size.batch_size * size.row_length / (time.perf_counter() - started)
            load = metrics.loss.expert_load / metrics.loss.expert_load.mean()
            report.say(
                f"step {step:4}  loss {losses[-1]:.3f}  MTP loss {metrics.loss.mtp_loss:.3f}  {speed:,.0f} tokens/s  "
                f"expert load {load.min():.2f} to {load.max():.2f} of the mean"
            )
    after = evaluate(graphdef, state, held_out)
    report.say(f"held-out loss after: {after.loss:.3f} (the token after next, by the MTP layer: {after.mtp_loss:.3f})")
    return graphdef, state, Curve(losses, before, after)


def write_checkpoint(model: Transformer, tokenizer: Tokenizer, output: Path) -> Path:
    """A Hugging Face directory: weights in shards, index, config, tokenizer files, generation config."""
    small_files, checkpoint = output / "small-files", output / "hf"
    tokenizer.save(small_files)
    generation = {
        "bos_token_id": tokenizer.bos_id,
        "eos_token_id": list(tokenizer.eos_ids),
        "pad_token_id": tokenizer.pad_id,
        "do_sample": False,
    }
    (small_files / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n")
    save_hf(nnx.state(model), model.config, checkpoint, extra_files_from=small_files, overwrite=True)
    shutil.rmtree(small_files)
    return checkpoint


def check_same_logits(written: Transformer, loaded: Transformer, tokens: np.ndarray | jax.Array) -> float:
    """The largest difference between the logits `[1, T, V]` of both; raises DemoError where it is more than rounding."""
    difference = float(jnp.abs(written(tokens) - loaded(tokens)).max())
    if not difference <= LOGITS_TOLERANCE:
        raise DemoError(f"the loaded model's logits differ by {difference:.2e} from those before saving")
    return difference


def timed_completion(
    model: Transformer, tokenizer: Tokenizer, prompt: str, new_tokens: int, draft_tokens: int
) -> tuple[Completion, float]:
    """A greedy completion and its tokens/s, compilation not counted."""
    params = SamplingParams(max_new_tokens=new_tokens, ignore_eos=True)
    complete(model, tokenizer, [prompt], params, draft_tokens)
    started = time.perf_counter()
    completion = complete(model, tokenizer, [prompt], params, draft_tokens)[0]
    return completion, len(completion.tokens) / (time.perf_counter() - started)


def complete_function(model: Transformer, tokenizer: Tokenizer, prompt: str, size: Size, report: Report) -> None:
    """Print a completion, and its speed with and without speculation. Raises DemoError where their texts differ."""
    plain, plain_speed = timed_completion(model, tokenizer, prompt, size.new_tokens, 0)
    drafted, drafted_speed = timed_completion(model, tokenizer, prompt, size.new_tokens, DRAFT_TOKENS)
    if plain.tokens != drafted.tokens:
        raise DemoError("greedy decoding with speculation gave other tokens than without")
    shown = prompt[prompt.index(f"def {PROMPT_FUNCTION}(") :] + plain.text
    report.console.print(Syntax(shown, "python", theme="ansi_light", background_color="default", padding=(0, 3)))
    acceptance = drafted.accepted[0] / drafted.drafted
    report.say(f"plain: {plain_speed:,.0f} tokens/s")
    report.say(
        f"MTP self-speculation: {drafted_speed:,.0f} tokens/s, the same tokens; "
        f"acceptance {acceptance:.0%} ({drafted.accepted[0]} of {drafted.drafted} drafts)"
    )


def draw_curve(curve: Curve, vocab_size: int, path: Path) -> None:
    """The loss curve as a PNG."""
    mpl.use("agg")
    figure, axes = pyplot.subplots(figsize=(7, 4), layout="constrained")
    axes.plot(curve.train, color="tab:blue", linewidth=1, label="training")
    last = len(curve.train)
    axes.plot([0, last], [curve.before.loss, curve.after.loss], "o", color="tab:red", label="held out")
    for value, name in ((math.log(vocab_size), "ln V"), (TARGET * curve.before.loss, "target")):
        axes.axhline(value, color="grey", linestyle=":", linewidth=1)
        axes.annotate(name, (last, value), ha="right", va="bottom", color="grey")
    axes.set(xlabel="step", ylabel="loss, nats a token", title="A small K-EXAONE on Python's standard library")
    axes.legend(loc="upper right", bbox_to_anchor=(1, 0.9))
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def summarise(curve: Curve, output: Path, report: Report) -> None:
    """What came out, where it lies, and what to try next."""
    ratio = curve.after.loss / curve.before.loss
    lines = {
        "held-out loss": f"{curve.before.loss:.3f} before, {curve.after.loss:.3f} after ({ratio:.0%})",
        "checkpoint": f"{output / 'hf'}",
        "loss curve": f"{output / 'loss.png'}",
        "time": f"{report.seconds:.0f} s on {len(os.sched_getaffinity(0))} cores",
    }
    report.console.print()
    for name, value in lines.items():
        report.console.print(f"[bold]{name:14}[/] {value}", highlight=False, soft_wrap=True)
    command = Path(sys.executable).with_name("exaone-jax")
    command = command.relative_to(Path.cwd()) if command.is_relative_to(Path.cwd()) else command
    report.console.print("\nNext, try:", highlight=False)
    for arguments in (
        f"inspect {output / 'hf'}",
        f"generate {output / 'hf'} 'class Stack:' --temperature 0.7",
        f"convert from-hf {output / 'hf'} {output / 'native'}",
        f"convert verify {output / 'hf'} {output / 'native'}",
    ):
        report.console.print(f"  {command} {arguments}", highlight=False, soft_wrap=True)


def check_target(curve: Curve, target: float) -> None:
    if not curve.after.loss < target * curve.before.loss:
        raise DemoError(
            f"held-out loss fell from {curve.before.loss:.3f} to {curve.after.loss:.3f}; "
            f"it must fall below {target * curve.before.loss:.3f}"
        )


def run(size: Size, output: Path, target: float, report: Report) -> None:
    output.mkdir(parents=True, exist_ok=True)
    with report.step("Gather the standard library's source"):
        corpus = gather(size.characters)
        count = sum(map(len, corpus.train))
        report.say(f"{len(corpus.train)} files, {count:,} characters; {len(corpus.held_out)} files held out")
    with report.step("Train a byte-level BPE tokenizer with EXAONE's special tokens"):
        tokenizer = train_bpe(corpus.train, size.vocab_size)
        report.say(f"{tokenizer.vocab_size:,} tokens")
    with report.step("Tokenise and pack"):
        data = write_text(corpus, output / "text")
        rows, held_out = (
            open_rows(data, tokenizer, None, size.row_length, evaluation=held_out) for held_out in (False, True)
        )
        report.say(f"{rows.rows_per_epoch:,} rows of {size.row_length} tokens; {rows.report[0].padding:.2%} padding")
    with report.step("Pre-train"):
        config = small_k_exaone(size, tokenizer)
        model = new_model(config)
        parameters = sum(leaf.size for leaf in jax.tree.leaves(nnx.state(model)))
        report.say(f"{parameters:,} parameters: 3 local layers (window {WINDOW}) to 1 global; the first dense, then")
        report.say(
            f"{size.num_experts} experts, 2 a token, and a shared one; an MTP layer, its loss weighted {MTP_WEIGHT}"
        )
        evaluated = batches_of(held_out, size.batch_size, size.held_out_rows)
        graphdef, state, curve = train(size, model, rows, evaluated, report)
        draw_curve(curve, config.vocab_size, output / "loss.png")
    with report.step("Write a Hugging Face checkpoint and load it back"):
        trained = trained_model(graphdef, state)
        checkpoint = write_checkpoint(trained, tokenizer, output)
        loaded = exaone_jax.load(checkpoint)
        difference = check_same_logits(trained, loaded, evaluated[0].tokens[:1])
        report.say(
            f"{checkpoint}: the loaded model's logits are those before saving (largest difference {difference:.1e})"
        )
    with report.step(f"Complete {PROMPT_FILE}'s {PROMPT_FUNCTION}, which was held out"):
        complete_function(loaded, Tokenizer.from_directory(checkpoint), corpus.prompt, size, report)
    summarise(curve, output, report)
    check_target(curve, target)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("demo-output"), help="directory to write to")
    parser.add_argument("--quick", action="store_true", help="a much smaller run that only shows that all of it works")
    arguments = parser.parse_args(argv)
    report = Report(Console())
    size, target = (QUICK, 0.85) if arguments.quick else (FULL, TARGET)
    try:
        run(size, arguments.output, target, report)
    except (DemoError, ExaoneError, OSError) as error:
        report.console.print(f"[bold red]demo failed:[/] {error}", soft_wrap=True)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
