"""The command line: one typer command a verb. Each parses, calls and prints; jax is imported only where a verb computes.

Exit codes: 0 done, 1 a check failed, 2 wrong input, 3 storage, 70 an error of this program itself (with its traceback),
75 training stopped on request with its step saved, 76 training hung, 130 interrupted, 141 nobody reads the output.
"""

import io
import json
import logging
import os
import sys
import time
import traceback
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

import exaone_jax
from exaone_jax.errors import ExaoneError, InputError

if TYPE_CHECKING:
    from exaone_jax.checkpoints.convert import ConvertReport
    from exaone_jax.model import Transformer
    from exaone_jax.parallel.hosts import Hosts
    from exaone_jax.text.response import Event

_REASONING, _ANSWER = "--- reasoning", "--- answer"
EXIT_CHECK_FAILED, EXIT_INPUT, EXIT_STORAGE, EXIT_INTERNAL, EXIT_INTERRUPTED, EXIT_NO_READER = 1, 2, 3, 70, 130, 141
EXIT_STOPPED = 75  # sysexits' "try again": a run that was asked to stop, and did with its step saved

app = typer.Typer(
    name="exaone-jax",
    help="Every EXAONE language model in JAX.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
data_app = typer.Typer(no_args_is_help=True, help="Make training data ready.")
app.add_typer(data_app, name="data")
bench_app = typer.Typer(no_args_is_help=True, help="Measure what runs.")
app.add_typer(bench_app, name="bench")
convert_app = typer.Typer(no_args_is_help=True, help="Convert checkpoints and compare them.")
app.add_typer(convert_app, name="convert")

Dtype = Literal["float32", "bfloat16", "float16"]
Json = Annotated[bool, typer.Option("--json", help="Print JSON for programs.")]
Checkpoint = Annotated[
    Path, typer.Argument(help="A Hugging Face directory or a native checkpoint.", show_default=False)
]
DtypeOption = Annotated[
    Dtype | None,
    typer.Option(help="Of weights and activations; the checkpoint's own if not given.", show_default=False),
]
MeshOption = Annotated[
    str | None,
    typer.Option(
        metavar="AXIS=SIZE,...",
        help="Spread the model over all devices, as fsdp=4,tensor=2; the default device alone if not given.",
        show_default=False,
    ),
]
MaxNewTokens = Annotated[int, typer.Option(help="Most tokens to generate.")]
Temperature = Annotated[float | None, typer.Option(help="0 is greedy.")]
TopK = Annotated[int | None, typer.Option(help="Draw from the k most likely tokens; 0 is off.")]
TopP = Annotated[float | None, typer.Option(help="Draw from the most likely tokens that hold this much probability.")]
MinP = Annotated[float | None, typer.Option(help="Leave out tokens less likely than this part of the likeliest.")]
PresencePenalty = Annotated[float | None, typer.Option(help="Taken from the logit of every token generated before.")]
FrequencyPenalty = Annotated[float | None, typer.Option(help="The same, times how often it was generated.")]
RepetitionPenalty = Annotated[
    float | None, typer.Option(help="Divides the logits of tokens seen before, prompt included.")
]
Stop = Annotated[
    list[str] | None, typer.Option(help="End before this text; may be given again.", show_default=False, metavar="TEXT")
]
Seed = Annotated[int, typer.Option(help="The same seed gives the same text.")]
Mtp = Annotated[
    bool,
    typer.Option(
        "--mtp/--no-mtp",
        help="Draft with the MTP layer and verify: the same greedy text (in bfloat16, up to near ties), and the same "
        "distribution otherwise.",
    ),
]


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line (without the program's name); returns the exit code and raises nothing a user can cause."""
    arguments = sys.argv[1:] if argv is None else list(argv)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a terminal that cannot show a character shows a question mark
    as_json = "--json" in arguments
    try:
        code = app(arguments, prog_name="exaone-jax", standalone_mode=False)
        sys.stdout.flush()
        return code or 0  # None: the verb ran to its end
    except typer.TyperException as error:
        return _usage(error, as_json)
    except ExaoneError as error:
        return _fail(type(error).__name__, str(error), error.exit_code, as_json)
    except (typer.Abort, KeyboardInterrupt):
        return EXIT_INTERRUPTED
    except SystemExit as error:  # typer turns a broken pipe into exit(1), which here would say that a check failed
        if not isinstance(error.__context__, BrokenPipeError):
            raise
        _discard_stdout()
        return EXIT_NO_READER
    except BrokenPipeError:
        _discard_stdout()
        return EXIT_NO_READER
    except OSError as error:
        return _fail(type(error).__name__, str(error), EXIT_STORAGE, as_json)
    except Exception as error:  # noqa: BLE001 (the last resort: not to be taken for a failed check)
        traceback.print_exc()
        return _fail(type(error).__name__, f"{error} (an error of exaone-jax itself)", EXIT_INTERNAL, as_json)


def _usage(error: typer.TyperException, as_json: bool) -> int:
    message = error.format_message()
    if not message:  # no arguments: the help was shown
        return EXIT_INPUT
    context = getattr(error, "ctx", None)
    hint = f" (see {context.command_path} --help)" if context is not None else ""
    return _fail("UsageError", f"{message.rstrip('.')}{hint}", EXIT_INPUT, as_json)


def _fail(kind: str, message: str, code: int, as_json: bool) -> int:
    try:
        if as_json:
            _print_json({"error": {"type": kind, "message": message, "exit_code": code}})
        sys.stdout.flush()
    except OSError:  # stdout itself may be what failed: then a person still reads it on stderr
        _discard_stdout()
        as_json = False
    if not as_json:
        _say(f"error: {message}")
    return code


def _discard_stdout() -> None:
    """Stdout cannot be written any more: let what is left in its buffer go nowhere when the interpreter exits."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _print_json(value: object) -> None:
    sys.stdout.write(json.dumps(value, ensure_ascii=False, indent=2) + "\n")


def _print(text: str) -> None:
    sys.stdout.write(text + "\n")


def _say(text: str) -> None:
    """To the person, not into the output."""
    sys.stderr.write(text + "\n")


def _show_version(wanted: bool) -> None:
    if wanted:
        _print(exaone_jax.__version__)
        raise typer.Exit


@app.callback()
def _options(
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Log what is chosen and done to stderr.")] = False,
    version: Annotated[bool, typer.Option("--version", callback=_show_version, is_eager=True)] = False,
) -> None:
    if verbose:
        logging.basicConfig(level=logging.WARNING, format="%(name)s: %(message)s")
        for package in ("exaone_jax", "pallas_kernels"):
            logging.getLogger(package).setLevel(logging.INFO)


@app.command()
def inspect(
    model: Annotated[str, typer.Argument(help="A published model's name, a config.json or a checkpoint directory.")],
    mesh: Annotated[
        str | None,
        typer.Option(
            metavar="AXIS=SIZE,...", help="Also show how each parameter is split over a mesh, as fsdp=8,tensor=4."
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Show a model's layers, parameters, tensors, bytes and KV cache; reads no weights.

    Exit code 1: there are weights, and their tensors do not fit config.json.
    """
    from exaone_jax.planning.inspect import inspect_model, render

    inspection, sharded = inspect_model(model), None
    if mesh is not None:
        from exaone_jax.parallel import MeshShape
        from exaone_jax.planning.sharding import shard_model

        sharded = shard_model(inspection.config, MeshShape.parse(mesh))
    if as_json:
        _print_json(inspection.to_dict() | ({} if sharded is None else {"sharding": sharded.to_dict()}))
    else:
        from rich.console import Console

        Console().print(render(inspection), *([] if sharded is None else [sharded.render()]))
    if not inspection.ok:
        raise typer.Exit(EXIT_CHECK_FAILED)


@app.command()
def plan(
    model: Annotated[str, typer.Argument(help="A published model's name, a config.json or a checkpoint directory.")],
    mode: Annotated[str, typer.Option(help="train, prefill or decode.")] = "train",
    topology: Annotated[
        str | None,
        typer.Option(
            metavar="TPU:SHAPE",
            help="Compile the real step for this TPU slice, as v5p:8x8x8, or for several, as 4xv6e:16x16.",
            show_default=False,
        ),
    ] = None,
    chip: Annotated[
        str | None, typer.Option(help="Without a topology: the chip to fit, as h100 or v5p.", show_default=False)
    ] = None,
    devices: Annotated[int | None, typer.Option(help="Without a topology: how many.", show_default=False)] = None,
    mesh: Annotated[
        str | None, typer.Option(metavar="AXIS=SIZE,...", help="As fsdp=8,expert=8,tensor=4.", show_default=False)
    ] = None,
    batch: Annotated[
        int | None, typer.Option(help="Rows over all devices; a row for each part if not given.", show_default=False)
    ] = None,
    context: Annotated[
        int | None,
        typer.Option(help="Tokens a row; training 8192, serving all that the model has.", show_default=False),
    ] = None,
    chunk: Annotated[int | None, typer.Option(help="Tokens a step of prefill.", show_default=False)] = None,
    remat: Annotated[
        str | None, typer.Option(help="What training recomputes: none, dots, full or offload; full if not given.")
    ] = None,
    lora: Annotated[
        str | None,
        typer.Option(
            metavar="BASE",
            help="Train adapters of rank 16 beside a model kept in float32, bfloat16, int8 or nf4.",
            show_default=False,
        ),
    ] = None,
    search: Annotated[
        bool, typer.Option("--search", help="Find the cheapest mesh, batch and remat that fit; what is given stays.")
    ] = False,
    no_compile: Annotated[
        bool, typer.Option("--no-compile", help="Arithmetic alone, also with a topology; needs no libtpu.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Show what a step needs before it runs: memory, FLOPs, collectives. Exit code 1: it does not fit."""
    from exaone_jax.planning.ask import Question, answer, lora_beside

    adapters = None if lora is None else lora_beside(lora)
    question = Question(
        mode, topology, chip, devices, mesh, batch, context, chunk, remat, adapters, search, not no_compile
    )
    found = answer(model, question)
    if as_json:
        _print_json(found.to_dict())
    else:
        from rich.console import Console

        Console().print(found.render())
        for line in found.shortfall:
            _say(line)
    if found.shortfall:
        raise typer.Exit(EXIT_CHECK_FAILED)


@app.command()
def train(
    config: Annotated[Path, typer.Argument(help="A YAML file, as configs/train/tiny.yaml.", show_default=False)],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[KEY=VALUE]...", help="As steps=100 or optimizer.learning_rate=3e-4.", show_default=False
        ),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Compile a step and print the memory it takes; train and write nothing.")
    ] = False,
    strict_resume: Annotated[
        bool, typer.Option("--strict-resume", help="Refuse to go on where the latest saved step is damaged.")
    ] = False,
) -> None:
    """Train, or go on where a run was stopped.

    Exit codes: 1 a loss that is not finite, or devices that disagree; 75 stopped by SIGTERM or SIGINT with the step saved; 76 a
    step that hung.
    """
    from exaone_jax.config.run import read_run

    run = read_run(config, overrides or ())
    from exaone_jax.training import loop

    if dry_run:
        for name, size in loop.dry_run(run).items():
            _print(f"{name:12} {size / 2**30:8.3f} GiB a device")
    elif loop.train(run, strict_resume=strict_resume).stopped:
        raise typer.Exit(EXIT_STOPPED)


Source = Annotated[Path, typer.Argument(help="The checkpoint to read.", show_default=False)]
Destination = Annotated[Path, typer.Argument(help="The directory to make.", show_default=False)]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Check everything that headers tell; write nothing.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace a checkpoint that is there.")]
Workers = Annotated[int | None, typer.Option(min=1, help="Threads.", show_default=False)]


@convert_app.command("from-hf")
def convert_from_hf(
    src: Source,
    dst: Destination,
    dry_run: DryRun = False,
    overwrite: Overwrite = False,
    allow_extra: Annotated[
        str | None,
        typer.Option(metavar="REGEX", help="Carry tensors unknown to the configuration if their whole name matches."),
    ] = None,
    with_code: Annotated[
        bool, typer.Option("--with-code", help="Copy *.py files too; nothing here runs them.")
    ] = False,
    workers: Workers = None,
    as_json: Json = False,
) -> None:
    """Hugging Face directory to native form."""
    from exaone_jax.checkpoints.convert import from_hf

    with _progress("converting", not as_json) as on_progress:
        report = from_hf(
            src,
            dst,
            dry_run=dry_run,
            overwrite=overwrite,
            allow_extra=allow_extra,
            with_code=with_code,
            workers=workers,
            on_progress=on_progress,
        )
    _print_conversion(report, as_json)


@convert_app.command("to-hf")
def convert_to_hf(
    src: Source,
    dst: Destination,
    dry_run: DryRun = False,
    overwrite: Overwrite = False,
    max_shard_bytes: Annotated[
        int | None, typer.Option(min=1, help="Write new shards of at most this size.", show_default=False)
    ] = None,
    workers: Workers = None,
    as_json: Json = False,
) -> None:
    """Native form to Hugging Face directory: the bytes it came from, if it came from one."""
    from exaone_jax.checkpoints.convert import to_hf

    with _progress("converting", not as_json) as on_progress:
        report = to_hf(
            src,
            dst,
            dry_run=dry_run,
            overwrite=overwrite,
            max_shard_bytes=max_shard_bytes,
            workers=workers,
            on_progress=on_progress,
        )
    _print_conversion(report, as_json)


@convert_app.command("verify")
def convert_verify(
    a: Checkpoint,
    b: Checkpoint,
    allow_nonfinite: Annotated[
        bool, typer.Option("--allow-nonfinite", help="NaN and infinity in the weights are no failure.")
    ] = False,
    workers: Workers = None,
    as_json: Json = False,
) -> None:
    """Compare two checkpoints bit by bit, whatever their forms. Exit code 1: they differ, or hold NaN or infinity."""
    from exaone_jax.checkpoints.verify import verify

    with _progress("comparing", not as_json) as on_progress:
        report = verify(a, b, allow_nonfinite=allow_nonfinite, workers=workers, on_progress=on_progress)
    if as_json:
        _print_json(report.to_dict())
    else:
        _print("\n".join(report.lines()))
    if not report.ok:
        raise typer.Exit(EXIT_CHECK_FAILED)


@data_app.command("prepare")
def data_prepare(
    sources: Annotated[list[str], typer.Argument(metavar="SRC...", help="Files, directories or quoted patterns.")],
    out: Annotated[Path, typer.Option(help="The directory to make, or to go on with.", show_default=False)],
    tokenizer: Annotated[
        Path, typer.Option(help="A checkpoint directory: its tokenizer and chat template.", show_default=False)
    ],
    format: Annotated[
        Literal["auto", "jsonl", "parquet", "arrayrecord", "text", "dataset"],
        typer.Option(help="Of the sources; auto goes by their names."),
    ] = "auto",
    text_column: Annotated[str, typer.Option(help="The column of plain documents.")] = "text",
    control_tokens: Annotated[
        bool, typer.Option("--control-tokens", help="Control tokens spelled in plain documents are those tokens.")
    ] = False,
    template_kwarg: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=BOOL", help="For the chat template, as skip_think=false; may be given again."),
    ] = None,
    workers: Annotated[int | None, typer.Option(min=1, help="Processes; all cores if not given.")] = None,
    ray: Annotated[
        str | None,
        typer.Option(metavar="ADDRESS", help="Run on a Ray cluster instead: its address, auto or local."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Tokenise training data once, into ArrayRecord. A run that was killed goes on where it was."""
    from exaone_jax.config.data import SourceConfig
    from exaone_jax.data.prepare import prepare

    if "" in sources:
        raise InputError("SRC: empty; expected a file, a directory or a pattern")
    options = {"format": format, "text_column": text_column, "control_tokens": control_tokens}
    chosen = [SourceConfig.model_validate({"path": path, **options}) for path in sources]
    kwargs = dict(map(_template_kwarg, template_kwarg or ()))
    with _progress("tokenising", not as_json) as on_progress:
        report = prepare(
            chosen, out, tokenizer, chat_template_kwargs=kwargs, workers=workers, ray=ray, on_progress=on_progress
        )
    if as_json:
        _print_json(report.to_dict())
        return
    counts, before = report.counts, f", {report.skipped} of them from an earlier run" if report.skipped else ""
    _print(
        f"{report.out}: {counts.documents:,} documents, {counts.tokens:,} tokens ({counts.learnt_tokens:,} to be learnt) in "
        f"{report.shards} shards{before}"
    )
    if counts.reasoning_dropped:
        _say(f"note: the chat template left the reasoning out of {counts.reasoning_dropped:,} turns")


def _template_kwarg(text: str) -> tuple[str, bool]:
    name, _, value = text.partition("=")
    if value not in ("true", "false"):
        raise InputError(f"--template-kwarg {text!r}: expected NAME=true or NAME=false")
    return name, value == "true"


@contextmanager
def _progress(what: str, shown: bool) -> Generator[Callable[[int, int], None] | None]:
    """A bar in bytes on stderr, for people at a terminal."""
    if not shown or not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    columns = (TextColumn(what), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task(what, total=None)
        yield lambda done, total: progress.update(task, completed=done, total=total)


def _print_conversion(report: "ConvertReport", as_json: bool) -> None:
    for warning in report.warnings:
        _say(f"warning: {warning}")
    if as_json:
        _print_json(report.to_dict())
        return
    for skipped in report.not_copied:
        _say(f"not copied: {skipped.path}: {skipped.reason}")
    what = f"{report.tensors:,} tensors, {report.parameters:,} parameters, {report.bytes:,} bytes"
    if report.dry_run:
        _print(f"{report.src}: {what} would go to {report.dst}; nothing was written")
    else:
        speed = f"{report.seconds:.1f} s, {report.bytes_per_second / 1e9:.2f} GB/s"
        _print(f"{report.src} -> {report.dst}: {what} in {speed}")


@app.command()
def generate(
    checkpoint: Checkpoint,
    prompt: Annotated[
        str | None, typer.Argument(help="The text to go on from; stdin if not given.", show_default=False)
    ] = None,
    prompt_file: Annotated[Path | None, typer.Option(help="Read the prompt from a file.", show_default=False)] = None,
    max_new_tokens: MaxNewTokens = 128,
    temperature: Temperature = 0.0,
    top_k: TopK = 0,
    top_p: TopP = 1.0,
    min_p: MinP = 0.0,
    presence_penalty: PresencePenalty = 0.0,
    frequency_penalty: FrequencyPenalty = 0.0,
    repetition_penalty: RepetitionPenalty = 1.0,
    stop: Stop = None,
    seed: Seed = 0,
    mtp: Mtp = False,
    dtype: DtypeOption = None,
    mesh: MeshOption = None,
    as_json: Json = False,
) -> None:
    """Continue a text."""
    text = _read_prompt(prompt, prompt_file)
    from exaone_jax.inference.sampling import sampling_params
    from exaone_jax.inference.text import complete, stream, tokenizer_of

    params = sampling_params(
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        presence_penalty=presence_penalty,
        frequency_penalty=frequency_penalty,
        repetition_penalty=repetition_penalty,
        stop=tuple(stop or ()),
        seed=seed,
    )
    model = _load(checkpoint, dtype, mesh)
    tokenizer, drafts = tokenizer_of(model), _draft_tokens(model, mtp)
    if not as_json:
        for piece in stream(model, tokenizer, text, params, drafts):
            _show(piece)
        _print("")
        return
    started = time.perf_counter()
    completion = complete(model, tokenizer, [text], params, drafts)[0]
    seconds = time.perf_counter() - started
    _print_json({**completion.to_dict(), "seconds": seconds})


def _read_prompt(prompt: str | None, file: Path | None) -> str:
    if prompt is not None and file is not None:
        raise InputError("prompt: given both as an argument and with --prompt-file; expected one of them")
    if prompt is None and file is None and sys.stdin.isatty():
        raise InputError("prompt: none; give it as an argument, with --prompt-file or on standard input")
    try:
        if file is not None:
            prompt = _decoded(file.read_bytes())
        elif prompt is None:
            prompt = _decoded(sys.stdin.buffer.read())
    except OSError as error:
        raise InputError(f"prompt file {file}: cannot be read: {error.strerror}") from error
    if not prompt:
        raise InputError("prompt: empty; expected at least one character")
    return prompt


def _decoded(text: bytes) -> str:
    try:
        return text.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"prompt: not UTF-8 text: byte {text[error.start]:#04x} at {error.start}") from error


def _load(checkpoint: Path, dtype: Dtype | None, mesh: str | None) -> "Transformer":
    if mesh is None:
        return exaone_jax.load(checkpoint, dtype=dtype)
    from exaone_jax.parallel import MeshShape, make_mesh

    return exaone_jax.load(checkpoint, dtype=dtype, mesh=make_mesh(MeshShape.parse(mesh)))


def _draft_tokens(model: "Transformer", mtp: bool) -> int:
    if not mtp:
        return 0
    if model.config.mtp_layer is None:
        raise InputError(f"--mtp: this {model.config.model_type} checkpoint has no MTP layer to draft with")
    return max(1, model.config.mtp_num_steps)


def _show(text: str, dim: bool = False) -> None:
    """Part of a line, at once."""
    sys.stdout.write(f"\x1b[2m{text}\x1b[0m" if dim and sys.stdout.isatty() else text)
    sys.stdout.flush()


@app.command()
def chat(
    checkpoint: Checkpoint,
    system: Annotated[str | None, typer.Option(help="The system message.", show_default=False)] = None,
    thinking: Annotated[
        bool | None,
        typer.Option(
            "--thinking/--no-thinking", help="Reason first; the model's default if not given.", show_default=False
        ),
    ] = None,
    max_new_tokens: MaxNewTokens = 2048,
    temperature: Temperature = None,
    top_k: TopK = None,
    top_p: TopP = None,
    min_p: MinP = None,
    presence_penalty: PresencePenalty = None,
    frequency_penalty: FrequencyPenalty = None,
    repetition_penalty: RepetitionPenalty = None,
    stop: Stop = None,
    seed: Seed = 0,
    mtp: Mtp = False,
    dtype: DtypeOption = None,
    mesh: MeshOption = None,
    as_json: Json = False,
) -> None:
    """Talk with a model: each line of standard input is a turn, /clear forgets what was said, the end of input ends it.

    How tokens are drawn is as the checkpoint's generation_config.json says, where no option says otherwise. Ctrl-C stops an
    answer. With --json each answer is one line of JSON.
    """
    from exaone_jax.inference.sampling import sampling_params
    from exaone_jax.inference.text import recommended_sampling, stream_chat, tokenizer_of
    from exaone_jax.text import ChatTemplate

    given = {
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
        "min_p": min_p,
        "presence_penalty": presence_penalty,
        "frequency_penalty": frequency_penalty,
        "repetition_penalty": repetition_penalty,
    }
    given = {name: value for name, value in given.items() if value is not None}
    fields = {"max_new_tokens": max_new_tokens, "stop": tuple(stop or ()), "seed": seed}
    sampling_params(**fields, **given)  # what is wrong is said before the weights are read
    model = _load(checkpoint, dtype, mesh)
    params = sampling_params(**fields, **(recommended_sampling(model) | given))
    tokenizer, drafts = tokenizer_of(model), _draft_tokens(model, mtp)
    template = ChatTemplate.for_checkpoint(checkpoint, tokenizer)
    opening = [{"role": "system", "content": system}] if system is not None else []
    messages = list(opening)
    failed = 0
    for line in _turns():
        if line == b"/clear":
            messages = list(opening)
            continue
        try:
            asked = [*messages, {"role": "user", "content": _decoded(line)}]
            events = stream_chat(
                model, tokenizer, template, asked, params, enable_thinking=thinking, draft_tokens=drafts
            )
            answer = _show_answer(events, as_json)
        except InputError as error:  # such as a conversation that has outgrown the context: this turn did not happen
            failed = _fail_turn(error, as_json)
            continue
        messages = [*asked, {"role": "assistant", "content": answer}]
    if failed and not sys.stdin.isatty():
        raise typer.Exit(failed)


@app.command()
def serve(
    model: Annotated[Path, typer.Option(help="A Hugging Face directory or a native checkpoint.", show_default=False)],
    host: Annotated[str, typer.Option(help="The address to listen at; 0.0.0.0 is every one.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes a free one.")] = 8000,
    served_model_name: Annotated[
        list[str] | None,
        typer.Option(help="In requests; the directory's name if not given. May be given again.", show_default=False),
    ] = None,
    dtype: DtypeOption = None,
    mesh: MeshOption = None,
    coordinator_address: Annotated[
        str | None,
        typer.Option(
            help="ADDRESS:PORT of the first of several processes, one a host; `environment` on Cloud TPU, GKE and Slurm.",
            show_default=False,
        ),
    ] = None,
    num_processes: Annotated[int | None, typer.Option(help="Of how many.", show_default=False)] = None,
    process_id: Annotated[int | None, typer.Option(help="Which this is, from 0.", show_default=False)] = None,
    max_model_len: Annotated[
        int | None,
        typer.Option(help="Tokens of the longest request; the model's context if not given.", show_default=False),
    ] = None,
    max_num_seqs: Annotated[int, typer.Option(help="Requests that run at once.")] = 32,
    max_num_batched_tokens: Annotated[int, typer.Option(help="Tokens in one step.")] = 512,
    draft_tokens: Annotated[int, typer.Option(help="That the MTP layer proposes for each request in a step.")] = 0,
    draft_window: Annotated[
        int | None, typer.Option(help="Positions that the MTP layer looks back.", show_default=False)
    ] = None,
    block_size: Annotated[int, typer.Option(help="Tokens of a page of keys and values.")] = 32,
    kv_cache_dtype: Annotated[
        Literal["auto", "int8", "fp8"], typer.Option(help="Of keys and values; auto is the model's.")
    ] = "auto",
    kv_cache_memory_bytes: Annotated[
        int | None, typer.Option(help="For keys and values; what is free if not given.", show_default=False)
    ] = None,
    enable_prefix_caching: Annotated[bool, typer.Option(help="Remember what prompts began with.")] = True,
    max_num_queued_reqs: Annotated[int, typer.Option(min=1, help="Requests that may wait; more get 503.")] = 256,
    max_body_bytes: Annotated[int, typer.Option(min=1024, help="Of a request.")] = 16 << 20,
    request_timeout: Annotated[
        float | None, typer.Option(min=0.001, help="Seconds until a request is ended.", show_default=False)
    ] = None,
    step_timeout: Annotated[
        float, typer.Option(min=0.1, help="Seconds of one step on the device; after that the engine is given up.")
    ] = 300.0,
    shutdown_timeout: Annotated[int, typer.Option(min=0, help="Seconds for open requests after SIGTERM.")] = 30,
    api_key_file: Annotated[
        Path | None, typer.Option(help="Let in who has one of these keys, one a line.", show_default=False)
    ] = None,
    ssl_keyfile: Annotated[Path | None, typer.Option(help="For https.", show_default=False)] = None,
    ssl_certfile: Annotated[Path | None, typer.Option(help="For https.", show_default=False)] = None,
) -> None:
    """Serve a model over HTTP as OpenAI's API, until SIGTERM or Ctrl-C.

    --mesh data=N,… serves N copies of the model, each on its part of this host's devices. On several hosts start it on each, with
    the same options and --mesh, of one copy; the first process listens.

    Exit codes: 0 every open request could end; 1 some were cut off, or the engine was stuck; 3 the port cannot be had.
    """
    _need_serve()
    from exaone_jax.server.serve import ServeConfig, engine_config
    from exaone_jax.server.serve import serve as run

    engine = engine_config(
        max_requests=max_num_seqs,
        max_length=max_model_len,
        rows_per_step=max_num_batched_tokens,
        page_size=block_size,
        draft_tokens=draft_tokens,
        draft_window=draft_window,
        prefix_caching=enable_prefix_caching,
        kv_dtype={"auto": None, "int8": "int8", "fp8": "float8_e4m3fn"}[kv_cache_dtype],
        kv_bytes=kv_cache_memory_bytes,
    )
    config = ServeConfig(
        model=model,
        engine=engine,
        names=tuple(served_model_name or ()),
        dtype=dtype,
        mesh=mesh,
        hosts=_hosts(coordinator_address, num_processes, process_id),
        host=host,
        port=port,
        api_key_file=api_key_file,
        tls_key=ssl_keyfile,
        tls_cert=ssl_certfile,
        max_waiting=max_num_queued_reqs,
        max_body_bytes=max_body_bytes,
        request_seconds=request_timeout,
        step_seconds=step_timeout,
        shutdown_seconds=shutdown_timeout,
    )
    if not run(config):
        raise typer.Exit(EXIT_CHECK_FAILED)


def _hosts(coordinator: str | None, num_processes: int | None, process_id: int | None) -> "Hosts | None":
    """How the processes of several hosts find each other; None: there is one."""
    from exaone_jax.parallel.hosts import ENVIRONMENT, Hosts

    if (coordinator, num_processes, process_id) == (None, None, None):
        return None
    if coordinator == "environment" and (num_processes, process_id) == (None, None):
        return ENVIRONMENT
    return Hosts(coordinator, num_processes, process_id)


@bench_app.command("serve")
def bench_serve(
    url: Annotated[str, typer.Option(help="Of the server, without /v1.")] = "http://127.0.0.1:8000",
    model: Annotated[str | None, typer.Option(help="The server's first if not given.", show_default=False)] = None,
    num_prompts: Annotated[int, typer.Option(min=1, help="Requests.")] = 100,
    input_len: Annotated[int, typer.Option(min=1, help="Tokens of each prompt, drawn at random.")] = 512,
    output_len: Annotated[int, typer.Option(min=1, help="Tokens of each answer.")] = 128,
    dataset: Annotated[
        Path | None,
        typer.Option(help="Instead: a JSON object a line with prompt and perhaps max_tokens.", show_default=False),
    ] = None,
    request_rate: Annotated[
        float | None, typer.Option(min=1e-6, help="Requests a second; all at once if not given.", show_default=False)
    ] = None,
    max_concurrency: Annotated[
        int | None, typer.Option(min=1, help="Most requests that are open.", show_default=False)
    ] = None,
    goodput: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME:MS", help="A limit on ttft, tpot or e2el; may be given again.", show_default=False),
    ] = None,
    temperature: Annotated[float, typer.Option(min=0.0, max=2.0, help="0 is greedy.")] = 0.0,
    seed: Seed = 0,
    api_key: Annotated[
        str | None, typer.Option(envvar="OPENAI_API_KEY", help="Of the server.", show_default=False)
    ] = None,
    as_json: Json = False,
) -> None:
    """Measure a server of OpenAI's API: time to first token, between tokens, to the end; throughput; how drafts fare.

    Exit code 1: requests failed.
    """
    _need_serve()
    from exaone_jax.server import bench

    card = bench.model_card(url, api_key)
    if dataset is not None:
        prompts = bench.read_prompts(dataset, output_len)[:num_prompts]
    else:
        prompts = bench.random_prompts(num_prompts, input_len, output_len, int(card.get("vocab_size", 1024)), seed)
    load = bench.Load(
        url=url,
        prompts=prompts,
        model=model or card["id"],
        rate=request_rate,
        concurrency=max_concurrency,
        goodput=dict(map(_limit, goodput or ())),
        seed=seed,
        api_key=api_key,
        temperature=temperature,
    )
    found = bench.run(load)
    if as_json:
        _print_json(found)
    else:
        _print("\n".join(bench.lines(found)))
    if found["failed"]:
        raise typer.Exit(EXIT_CHECK_FAILED)


def _limit(text: str) -> tuple[str, float]:
    name, _, value = text.partition(":")
    try:
        return name, float(value)
    except ValueError as error:
        raise InputError(f"--goodput {text!r}: expected NAME:MILLISECONDS, as ttft:500") from error


def _need_serve() -> None:
    try:
        import fastapi  # noqa: F401
        import httpx  # noqa: F401
        import prometheus_client  # noqa: F401
        import uvicorn  # noqa: F401
    except ModuleNotFoundError as error:
        raise InputError(f"serving needs {error.name}: pip install 'exaone-jax[serve]'") from error


def _fail_turn(error: InputError, as_json: bool) -> int:
    if as_json:  # one line, as an answer is
        fault = {"type": type(error).__name__, "message": str(error), "exit_code": error.exit_code}
        _show(json.dumps({"error": fault}, ensure_ascii=False) + "\n")
    else:
        _say(f"error: {error} (/clear starts anew)")
    return error.exit_code


def _turns() -> Iterator[bytes]:
    """The lines a person says, empty ones left out."""
    while True:
        if sys.stdin.isatty():
            sys.stderr.write("> ")
            sys.stderr.flush()
        line = sys.stdin.buffer.readline()
        if not line:
            return
        if line.strip():
            yield line.rstrip(b"\r\n")


def _show_answer(events: "Iterator[Event]", as_json: bool) -> str:
    """Print an answer as it comes, reasoning apart (dim at a terminal, else between lines of its own); returns the answer."""
    from exaone_jax.text.response import ReasoningPiece, TextPiece

    reasoning, content, interrupted = "", "", False
    try:
        for event in events:
            if isinstance(event, ReasoningPiece):
                if not as_json:
                    _show(event.text if reasoning else f"{_REASONING}\n{event.text}", dim=True)
                reasoning += event.text
            elif isinstance(event, TextPiece):
                if not as_json:
                    _show(f"\n{_ANSWER}\n{event.text}" if reasoning and not content else event.text)
                content += event.text
    except KeyboardInterrupt:
        interrupted = True
    if as_json:
        answer = {"reasoning": reasoning or None, "content": content, "interrupted": interrupted}
        _show(json.dumps(answer, ensure_ascii=False) + "\n")
    else:
        _show("\n")
    return content


if __name__ == "__main__":
    sys.exit(main())
