"""The engine: requests come and go at any time, and one ragged step after the other serves all of them.

The host is one step behind the device: while a step runs, the results of the one before are read and told, and the next is
planned. A request that turns out to be done has one step too many in flight, whose tokens are dropped.
"""

import dataclasses
import itertools
import os
import time
import zlib
from collections.abc import Collection, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding, PartitionSpec
from pydantic import BaseModel, ConfigDict, Field

from exaone_jax.errors import ConfigError, InputError
from exaone_jax.inference.drafting import Drafting
from exaone_jax.inference.generate import check_request
from exaone_jax.inference.grammar import Grammars
from exaone_jax.inference.pools import Holding, KeyChain, PoolRequest, Pools, plan_pools
from exaone_jax.inference.sampling import MAX_STOP_IDS, RowSampling, SamplingParams
from exaone_jax.inference.scheduler import Entry, NoRoomError, Request, Scheduler, TokenLogprobs
from exaone_jax.inference.step import (
    Batch,
    Emitted,
    Scores,
    ServingState,
    Terms,
    admit,
    init_state,
    serving_step,
    serving_steps,
)
from exaone_jax.inference.text import TextRow
from exaone_jax.model import PagedCache, Transformer
from exaone_jax.model.relayout import with_mtp_window
from exaone_jax.text import Tokenizer

_MEMORY_SHARE = 0.9  # of an accelerator's memory; the rest is for what a step computes
FUSED_STEPS = 4  # on an accelerator
_HOST_SHARE = 0.25  # of a CPU's free memory

Reason = Literal["stop", "length", "cancelled", "error"]


class EngineConfig(BaseModel):
    """How the engine is set up.

    max_requests: requests that run at once.
    max_length: tokens of the longest, prompt and answer; None: the model's context.
    rows_per_step: of the flat token axis, so the longest chunk of a prompt.
    draft_tokens: proposed by the MTP layer for each request in every step, at most.
    adaptive_drafts: propose fewer where that is faster, as `drafting` reckons with free_rows: rows that a step computes while it
        reads the weights; None: 256 on an accelerator, 8 on a CPU. They are more programs to compile; None: on an accelerator.
    fused_steps: run as one program while nobody waits and no prompt is read; a request that comes meanwhile waits for them.
        None: 4 on an accelerator; 1 on a CPU, where a step takes longer than what the host adds to it.
    draft_window: positions that the MTP layer looks back, where it was trained with more; None: all. Without a window it
        costs memory as a global layer does. What it drafts is verified either way.
    typical_length: of a request; decides how the memory is shared between windows and global layers.
    kv_dtype: of keys and values; None: the model's. 8 bits hold about twice as many tokens of bfloat16, each rounded on its own.
    kv_bytes: for keys and values; None: what the device has left.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    max_requests: int = Field(default=32, ge=1, le=4096)
    max_length: int | None = Field(default=None, ge=2)
    rows_per_step: int = Field(default=512, ge=1)
    page_size: int = Field(default=32, ge=1)
    draft_tokens: int = Field(default=0, ge=0, le=15)
    adaptive_drafts: bool | None = None
    free_rows: int | None = Field(default=None, ge=1)
    fused_steps: int | None = Field(default=None, ge=1, le=64)
    draft_window: int | None = Field(default=None, ge=1)
    prefix_caching: bool = True
    typical_length: int = Field(default=8192, ge=1)
    kv_dtype: Literal["int8", "float8_e4m3fn"] | None = None
    kv_bytes: int | None = Field(default=None, ge=1)


@dataclasses.dataclass(frozen=True)
class Summary:
    """A request that has ended. cached_tokens: of the prompt, found in the cache and not read.

    arrived, started, first_token, finished: when it was prepared, first ran, had a token and ended; seconds of
    time.monotonic, None for what never was.
    """

    prompt_tokens: int
    cached_tokens: int
    generated_tokens: int
    preemptions: int
    arrived: float
    started: float | None
    first_token: float | None
    finished: float


@dataclasses.dataclass(frozen=True)
class Update:
    """What is new of one request: tokens, their text, and why it ended, if it has.

    A token that ends the text is among the tokens and not in the text. error: what went wrong, with the reason "error":
    the model's logits were not finite, or a grammar could not be followed.
    logprobs: one for each of the tokens, if they were asked for. prompt_logprobs: with the first tokens, if they were asked
    for; one for each token of the prompt, None for the first. summary: with the finish_reason.
    """

    request: int
    tokens: list[int]
    text: str = ""
    finish_reason: Reason | None = None
    logprobs: list[TokenLogprobs] = dataclasses.field(default_factory=list)
    prompt_logprobs: list[TokenLogprobs | None] | None = None
    summary: Summary | None = None
    error: str = ""


@dataclasses.dataclass(frozen=True)
class Load:
    """How busy the engine is. pages: the share that is held of each group's, under the group's window (None: global)."""

    running: int
    waiting: int
    pages: dict[int | None, float]


@dataclasses.dataclass
class Stats:
    """Since the start. steps: at most, as several are one program, which ends early where all texts do; programs: launched.
    drafted: how often each draft of a request was verified; accepted: how often it was kept.
    """

    steps: int = 0
    programs: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    generated_tokens: int = 0
    preemptions: int = 0
    drafted: list[int] = dataclasses.field(default_factory=list)
    accepted: list[int] = dataclasses.field(default_factory=list)


@dataclasses.dataclass(frozen=True)
class _Flight:
    entries: list[Entry]
    drafts: int
    emitted: Emitted


class Engine:
    """Serves requests on the model's devices. Not for several threads at once: `service` is.

    Everything is compiled when this returns, and nothing is afterwards.

    Args:
        model: with its weights.
        settings: see EngineConfig.
        tokenizer: for texts and stop strings; None serves token ids alone.
        sharing: engines of this process, which share a CPU's memory; other devices are one engine's alone.

    Raises ConfigError for settings that the model or the memory cannot serve.
    """

    def __init__(
        self,
        model: Transformer,
        settings: EngineConfig | None = None,
        *,
        tokenizer: Tokenizer | None = None,
        sharing: int = 1,
    ):
        self.settings = settings = settings or EngineConfig()
        self.max_length = _checked(model, settings)
        if settings.draft_window is not None:
            model = with_mtp_window(model, settings.draft_window)
        self.config, self.tokenizer = model.config, tokenizer
        ends = () if tokenizer is None else tokenizer.eos_ids
        self.stop_ids = frozenset((*model.config.eos_token_ids, *ends))
        self._grammars = None if tokenizer is None else Grammars(tokenizer, model.config.vocab_size, self.stop_ids)
        slots, drafts = settings.max_requests, settings.draft_tokens
        cpu = jax.default_backend() == "cpu"
        fused = settings.fused_steps or (1 if cpu else FUSED_STEPS)
        self._adaptive = drafts > 0 and (not cpu if settings.adaptive_drafts is None else settings.adaptive_drafts)
        ask = PoolRequest(
            page_size=settings.page_size,
            max_length=self.max_length + 2 * drafts,  # a request's last drafts may be past its end
            max_sequences=slots,
            rows=settings.rows_per_step,
            ahead=written_ahead(drafts),
            spare=written_ahead(drafts, fused) - written_ahead(drafts),
            typical_length=settings.typical_length,
            dtype=settings.kv_dtype or jnp.dtype(model.dtype).name,
            mtp=drafts > 0,
        )
        devices = jax.tree.leaves(nnx.state(model))[0].sharding.addressable_devices
        free = settings.kv_bytes or _free_memory(devices, slots * model.config.vocab_size * 9, sharing)
        planned = plan_pools(model.config, ask, free)
        self.pools = Pools(planned, settings.page_size, slots)
        remember = settings.prefix_caching
        self.scheduler = Scheduler(self.pools, slots, settings.rows_per_step, drafts, remember=remember, fused=fused)
        sizes = _buckets(settings)
        programs = _programs(settings, sizes, fused, fewer_drafts=self._adaptive)
        self._device = _Device(model, self.pools, settings, programs, max_ends=len(self.stop_ids) + MAX_STOP_IDS)
        free_rows = settings.free_rows or (8 if cpu else 256)
        self._drafting = Drafting(drafts, free_rows=free_rows, draft_cost=_draft_cost(model))
        self.stats = Stats(drafted=[0] * drafts, accepted=[0] * drafts)
        self._ids = itertools.count()
        self._requests: dict[int, Request] = {}
        self._ended: list[Update] = []  # from outside, to be told by the next step
        self.digest = 0  # of all tokens so far: what hosts that run the same steps must agree on
        self._flight: _Flight | None = None

    @property
    def busy(self) -> bool:
        return bool(self._requests or self._ended or self._flight)

    def submit(self, prompt: str | Sequence[int], params: SamplingParams, *, cache_salt: str = "") -> int:
        """Queue a request and return its number; see `prepare`."""
        request = self.prepare(prompt, params, cache_salt=cache_salt)
        self.add(request)
        return request.id

    def prepare(
        self, prompt: str | Sequence[int], params: SamplingParams, *, cache_salt: str = "", number: int | None = None
    ) -> Request:
        """A request for `add`. Any thread may call this at any time.

        prompt: a text, in which spelled control tokens stay text, or token ids. cache_salt: only requests of one salt share
        remembered pages. number: the request's, where another host has given it one.

        Raises InputError for what cannot be served.
        """
        if self.tokenizer is None and (params.stop or params.grammar):
            raise InputError("this engine has no tokenizer, so it takes no stop strings and no grammar")
        ids = self._encode(prompt) if isinstance(prompt, str) else list(prompt)
        check_request(self.config, "the prompt", ids, params, self.max_length)
        ids = list(map(int, ids))
        chain = KeyChain(self.settings.page_size, lookahead=int(self.settings.draft_tokens > 0), salt=cache_salt)
        ends = frozenset(params.stop_token_ids) | (frozenset() if params.ignore_eos else self.stop_ids)
        text = None
        if self.tokenizer is not None:
            text = TextRow(self.tokenizer, params.stop, min_tokens=params.min_tokens, unsaid=ends)
        constraint = None
        if params.grammar is not None and self._grammars is not None:
            constraint = self._grammars.constraint(params.grammar)
        holding = Holding(len(self.pools.groups))
        number = next(self._ids) if number is None else number
        return Request(number, ids, params, chain, holding, len(ids), text, ends, constraint, cache_salt)

    def add(self, request: Request) -> None:
        """Queue a prepared request."""
        self._requests[request.id] = request
        self.stats.prompt_tokens += request.prompt_length
        self.scheduler.add(request)

    def cancel(self, number: int) -> None:
        """End a request; the next step tells so. One that is not known (any more) is left as it is."""
        if number in self._requests:
            request = self._requests.pop(number)
            self.scheduler.end(request)
            self._ended.append(Update(number, [], finish_reason="cancelled", summary=_summary(request)))

    def load(self) -> Load:
        """How busy the engine is. Any thread may call this at any time."""
        windows = [group.window for group in self.pools.groups]
        pages = dict(zip(windows, self.pools.used(), strict=True))
        return Load(len(self.scheduler.running), len(self.scheduler.waiting), pages)

    def step(self) -> list[Update]:
        """Start the next step on the device, and tell what came of the one before."""
        updates, self._ended = self._ended, []
        drafts = self.settings.draft_tokens
        if self._adaptive and self.scheduler.running:
            drafts = self._drafting.choose(len(self.scheduler.running))
        try:
            entries = self.scheduler.plan(drafts)
        except NoRoomError:
            updates += self._collect()
            entries = self.scheduler.plan(drafts)
        flight = self._launch(entries) if entries else None
        updates += self._collect()
        self._flight = flight
        return updates

    def run(
        self, prompts: Sequence[str | Sequence[int]], params: Sequence[SamplingParams]
    ) -> list[tuple[list[int], str, Reason]]:
        """(tokens, text, reason) for every prompt, with whatever else is being served."""
        numbers = [self.submit(prompt, each) for prompt, each in zip(prompts, params, strict=True)]
        tokens: dict[int, list[int]] = {number: [] for number in numbers}
        texts, reasons = dict.fromkeys(numbers, ""), dict[int, Reason]()
        while len(reasons) < len(numbers):
            for update in self.step():
                if update.request in tokens:
                    tokens[update.request] += update.tokens
                    texts[update.request] += update.text
                    if update.finish_reason is not None:
                        reasons[update.request] = update.finish_reason
        return [(tokens[number], texts[number], reasons[number]) for number in numbers]

    def _encode(self, prompt: str) -> list[int]:
        if self.tokenizer is None:
            raise InputError("this engine has no tokenizer, so it takes prompts as token ids")
        return self.tokenizer.encode(prompt)

    def _launch(self, entries: list[Entry]) -> _Flight:
        for entry in entries:
            request = entry.request
            if not request.told:
                self._device.admit(request)
                if not request.preemptions:
                    self.stats.cached_tokens += request.cached
        drafts = self.scheduler.now
        emitted = self._device.run(entries, drafts)
        self.scheduler.launched(entries)
        self.stats.steps += entries[0].steps
        self.stats.programs += 1
        return _Flight(entries, drafts, emitted)

    def _collect(self) -> list[Update]:
        """Read the step in flight, if there is one, and wait for it if need be."""
        flight, self._flight = self._flight, None
        if flight is None:
            return []
        emitted = _read(flight)
        updates, first_row = [], 0
        for i, entry in enumerate(flight.entries):
            request, rows = entry.request, first_row
            first_row += entry.rows
            if request.done:
                continue
            counts = emitted.count[:, i].tolist()
            good = _good_steps(request, emitted.finite[:, i].tolist())
            new = [
                token
                for row, count in zip(emitted.tokens[:good, i], counts, strict=False)
                for token in row[:count].tolist()
            ]
            self.scheduler.collected(entry, new)
            self.digest = zlib.crc32(np.array([request.id, *new]).tobytes(), self.digest)
            if entry.first is None:
                self._count_drafts(counts, [entry.drafted, *[flight.drafts] * (entry.steps - 1)])
            if request.constraint is not None:
                request.drafts = emitted.drafts[-1, i].tolist()
            if request.params.prompt_logprobs is not None:
                _take_prompt_scores(entry, emitted.prompt_scores, rows)
            if new or good < entry.steps:
                told = _drawn_logprobs(emitted, i, counts[:good], new, request.params.logprobs)
                updates.append(self._update(request, new, told, good=good == entry.steps))
        self.stats.preemptions = self.scheduler.preemptions
        return updates

    def _count_drafts(self, counts: Sequence[int], drafted: Sequence[int]) -> None:
        """counts: of tokens that came of each step; drafted: how many drafts it verified."""
        for count, proposed in zip(counts, drafted, strict=True):
            if count:
                self._drafting.saw(proposed, count - 1)
                for j in range(proposed):
                    self.stats.drafted[j] += 1
                    self.stats.accepted[j] += j < count - 1

    def _update(self, request: Request, new: list[int], logprobs: list[TokenLogprobs], *, good: bool) -> Update:
        """Tell the new tokens, up to where the request ends, and end it there."""
        params, before = request.params, request.num_generated - len(new)
        left = params.max_new_tokens - before
        may_end = max(0, params.min_tokens - before)  # the first of the new tokens that may
        stop = next((i + 1 for i in range(may_end, len(new)) if new[i] in request.ends), None)
        end = min(len(new), left, stop or len(new))
        reason: Reason | None = "stop" if stop == end else "length" if end == left else None
        text, error = "", ""
        if request.text is not None:
            text = request.text.feed(new[:end])
            if request.text.stopped:
                end, reason = request.text.used - before, "stop"
        if request.constraint is not None:
            request.constraint.advance(new[:end])
            error = request.constraint.error
        if reason is None and (error or not good):
            reason, error = "error", error or "the model's logits are not finite"
        if reason is not None and request.text is not None:
            text += request.text.flush()
        prompt_logprobs = None
        if new and not before:
            request.first_token = time.monotonic()
            prompt_logprobs = None if params.prompt_logprobs is None else request.prompt_logprobs
        summary = None
        if reason is not None:
            del request.tokens[request.prompt_length + before + end :]
            self.scheduler.end(request, keep=good)  # pages with numbers that are not finite are of no use
            del self._requests[request.id]
            summary = _summary(request)
        self.stats.generated_tokens += end
        return Update(request.id, new[:end], text, reason, logprobs[:end], prompt_logprobs, summary, error)


def _summary(request: Request) -> Summary:
    return Summary(
        prompt_tokens=request.prompt_length,
        cached_tokens=request.cached,
        generated_tokens=request.num_generated,
        preemptions=request.preemptions,
        arrived=request.arrived,
        started=request.started,
        first_token=request.first_token,
        finished=time.monotonic(),
    )


def _read(flight: _Flight) -> Emitted:
    """What a program emitted, as numpy arrays with a first axis of steps; log-probabilities only where somebody asks."""
    emitted, one = flight.emitted, flight.entries[0].steps == 1
    params = [entry.request.params for entry in flight.entries]
    skipped = {
        "scores": all(p.logprobs is None for p in params),
        "prompt_scores": all(p.prompt_logprobs is None for p in params),
    }

    def read(name: str) -> Any:
        found = getattr(emitted, name)
        return (
            found if skipped.get(name) else jax.tree.map(lambda x: np.asarray(x)[None] if one else np.asarray(x), found)
        )

    return Emitted(*map(read, Emitted._fields))


def _good_steps(request: Request, finite: list[bool]) -> int:
    """How many steps came of finite numbers and of a grammar that could be followed."""
    if request.constraint is not None and request.constraint.error:
        return 0
    return len(finite) if all(finite) else finite.index(False)


def _drawn_logprobs(
    emitted: Emitted, index: int, counts: Sequence[int], tokens: Sequence[int], best: int | None
) -> list[TokenLogprobs]:
    """Of the tokens that came of one request's steps, `counts` of each; none where best is None."""
    if best is None:
        return []
    return _logprobs(
        jax.tree.map(lambda x: np.concatenate([x[t, index, :count] for t, count in enumerate(counts)]), emitted.scores),
        tokens,
        best,
    )


def _logprobs(scores: Scores, tokens: Sequence[int], count: int) -> list[TokenLogprobs]:
    """Of the tokens, whose scores these are, and `count` best ones."""
    found = (x.tolist() for x in (scores.own, scores.rank, scores.best_ids[:, :count], scores.best[:, :count]))
    told = zip(tokens, *found, strict=True)
    return [TokenLogprobs(token, own, rank, list(zip(*top, strict=True))) for token, own, rank, *top in told]


def _take_prompt_scores(entry: Entry, scores: Scores, row: int) -> None:
    """Note what is new of a chunk, whose first row is `row`, for a request that wants to know; after it was put off, it reads
    some tokens again."""
    request = entry.request
    if entry.first is None or request.params.prompt_logprobs is None:
        return
    known = len(request.prompt_logprobs)
    new = request.tokens[known : min(entry.first + entry.rows + 1, request.prompt_length)]
    first = row + known - 1 - entry.first  # what follows a position is told by its row
    told = jax.tree.map(lambda x: x[0, first : first + len(new)], scores)
    request.prompt_logprobs += _logprobs(told, new, request.params.prompt_logprobs)


class _Device:
    """The compiled programs, and the state that they pass on."""

    def __init__(
        self,
        model: Transformer,
        pools: Pools,
        settings: EngineConfig,
        programs: Sequence[tuple[int, int, int, int]],
        *,
        max_ends: int,
    ):
        graphdef, params = nnx.split(model)
        windows = tuple(group.window for group in pools.groups)
        pages = {group.window: group.pages for group in pools.groups}
        self.slots, self.vocab = settings.max_requests, model.config.vocab_size
        self.drafts, self.pools, self._params = settings.draft_tokens, pools, params
        self._everywhere = _replicated(params)
        shapes = {"counts": jnp.int32, "in_prompt": bool, "bias": jnp.float32}
        self._zeros = {name: jnp.zeros((1, self.vocab), dtype) for name, dtype in shapes.items()}
        self._zeros = _put(self._zeros, self._everywhere)
        self._max_ends = max_ends
        nobody = self._terms(SamplingParams(), (), [], ())
        state = init_state(model, pages, settings.page_size, self.slots, self.drafts, nobody, settings.kv_dtype)
        cache = state.cache  # laid out by the placement; everything else is whole everywhere
        state = _put(dataclasses.replace(state, cache=PagedCache((), None)), self._everywhere)
        self._state = dataclasses.replace(state, cache=cache)
        self._tables = self._current_tables()
        kept = jax.tree.map(lambda x: x.sharding, self._state)

        def step(
            params: nnx.State,
            state: ServingState,
            tables: tuple[jax.Array, ...],
            batch: Batch[jax.Array],
            drafts: int,
            steps: int,
        ) -> tuple[ServingState, Emitted]:
            model = nnx.merge(graphdef, params)
            if steps == 1:
                return serving_step(model, state, tables, batch, windows, drafts)
            return serving_steps(model, state, tables, batch, windows, drafts, steps)

        step_jit = jax.jit(step, static_argnums=(4, 5), donate_argnums=1, out_shardings=(kept, self._everywhere))
        admit_jit = jax.jit(admit, donate_argnums=0, out_shardings=kept)

        def compiled(key: tuple[int, int, int, int]) -> jax.stages.Compiled:
            steps, drafts, *sizes = key
            return step_jit.lower(self._params, self._state, self._tables, self._empty(*sizes), drafts, steps).compile()

        words = -(-self.vocab // 32)
        self._no_masks = {
            requests: _put(np.zeros((requests, self.drafts + 1, words), np.uint32), self._everywhere)
            for *_, requests in programs
        }
        with ThreadPoolExecutor(os.cpu_count()) as workers:
            self._steps = dict(zip(programs, workers.map(compiled, programs), strict=True))
        self._admit = admit_jit.lower(self._state, np.int32(0), nobody).compile()

    def admit(self, request: Request) -> None:
        """Tell the state whose slot it is."""
        if request.slot is None:
            raise RuntimeError(f"request {request.id} has no slot")
        prompt, generated = request.tokens[: request.prompt_length], request.tokens[request.prompt_length :]
        terms = self._terms(request.params, prompt, generated, request.ends)
        self._state = self._admit(self._state, np.int32(request.slot), terms)
        request.told = True

    def _terms(
        self, params: SamplingParams, prompt: Sequence[int], generated: Sequence[int], ends: Collection[int]
    ) -> Terms:
        """What a request asks for, of one slot."""
        ids = np.full((1, self._max_ends), self.vocab, np.int32)
        ids[0, : len(ends)] = sorted(ends)
        terms: dict[str, Any] = self._zeros | {
            "limits": np.array([len(prompt) + params.max_new_tokens - 1], np.int32),
            "min_lengths": np.array([len(prompt) + params.min_tokens], np.int32),
            "ends": ids,
            "biased": np.array([bool(params.logit_bias)]),
        }
        if params.penalised:
            terms["counts"] = np.bincount(generated, minlength=self.vocab).astype(np.int32)[None]
            terms["in_prompt"] = np.isin(np.arange(self.vocab), prompt)[None]
        if params.logit_bias:
            tokens, bias = zip(*params.logit_bias, strict=True)
            terms["bias"] = np.bincount(tokens, bias, self.vocab).astype(np.float32)[None]
        return Terms(**terms, sampling=RowSampling.of([params]))

    def run(self, entries: list[Entry], drafts: int) -> Emitted:
        """Start a step with so many drafts; what it emits can be waited for."""
        rows, steps = sum(entry.rows for entry in entries), entries[0].steps
        key = next(
            (s, d, n, a) for s, d, n, a in self._steps if (s, d) == (steps, drafts) and n >= rows and a >= len(entries)
        )
        batch, row = self._empty(*key[2:]), 0
        if any(entry.emits and entry.request.constraint for entry in entries):
            batch = batch._replace(masks=np.full(batch.masks.shape, np.iinfo(np.uint32).max, np.uint32))
        for i, entry in enumerate(entries):
            request, params = entry.request, entry.request.params
            batch.slots[i], batch.scored[i] = request.slot, params.logprobs is not None
            if entry.first is None:
                batch.first[i] = -1
            else:
                end = entry.first + entry.rows
                batch.tokens[row : row + entry.rows] = request.tokens[entry.first : end]
                batch.first[i], batch.draws[i] = entry.first, entry.draws
                batch.after[i] = 0 if entry.draws else request.tokens[end]
                batch.prompt_scored[i] = params.prompt_logprobs is not None
            if request.constraint is not None and entry.emits:
                batch.constrained[i] = True
                said = request.drafts[:drafts] if entry.first is None else ()
                request.constraint.masks(said, batch.masks[i, : len(said) + 1])
            row += entry.rows
            batch.starts[i + 1 :] = row
        if self.pools.changed:
            self._tables = self._current_tables()
        self._state, emitted = self._steps[key](self._params, self._state, self._tables, batch)
        return emitted

    def _empty(self, rows: int, requests: int) -> Batch[Any]:
        """Nothing to do. All but the masks, which lie on the device, is to be written."""

        def zeros(count: int, kind: type = np.int32) -> np.ndarray:
            return np.zeros(count, kind)

        return Batch(
            tokens=zeros(rows),
            starts=zeros(requests + 1),
            slots=np.full(requests, self.slots, np.int32),
            first=zeros(requests),
            after=zeros(requests),
            draws=zeros(requests, bool),
            scored=zeros(requests, bool),
            prompt_scored=zeros(requests, bool),
            constrained=zeros(requests, bool),
            masks=self._no_masks[requests],
        )

    def _current_tables(self) -> tuple[jax.Array, ...]:
        self.pools.changed = False
        # Copies: the host goes on writing its tables while the device reads.
        return _put(tuple(table.copy() for table in self.pools.tables), self._everywhere)


def _buckets(settings: EngineConfig) -> list[tuple[int, int]]:
    """(rows, requests) of the compiled steps, the cheapest first: for requests that all decode, and with prompts among them."""
    each, most = settings.draft_tokens + 1, settings.max_requests
    requests = sorted({min(4**i, most) for i in range(7)})
    rows = {max(1, settings.rows_per_step // 8), settings.rows_per_step}
    sizes = {(n, a) for a in requests for n in {*rows, a * each} if n >= a * each or n == settings.rows_per_step}
    return sorted(sizes)


def _programs(
    settings: EngineConfig, sizes: Sequence[tuple[int, int]], fused: int, *, fewer_drafts: bool
) -> list[tuple[int, int, int, int]]:
    """(steps, drafts, rows, requests) of the compiled programs, of those alike the cheapest first: steps with prompts have all
    drafts, those that only decode fewer too."""
    most = settings.draft_tokens
    keys = {(1, most, *size) for size in sizes}
    fewest = {requests: rows for rows, requests in sorted(sizes, reverse=True)}
    for requests, rows in fewest.items():
        for drafts in range(0 if fewer_drafts else most, most + 1):
            one = set() if drafts == most else {1}
            for steps in one | ({fused} - {1}):
                keys.add((steps, drafts, min(rows, requests * (drafts + 1)), requests))
    return sorted(keys)


def _draft_cost(model: Transformer) -> float:
    """The share of the weights that a draft reads: the MTP layer and the output head."""
    if model.config.mtp_layer is None:
        return 0.0
    layer = sum(x.size for x in jax.tree.leaves(nnx.state(model.mtp)))
    return (layer + model.head_weight().size) / sum(x.size for x in jax.tree.leaves(nnx.state(model)))


def written_ahead(drafts: int, steps: int = 1) -> int:
    """Positions that two programs in flight, of so many steps, and the drafts after them may write beyond what is settled."""
    return 2 * steps * (drafts + 1) + max(0, drafts - 1)


def _checked(model: Transformer, settings: EngineConfig) -> int:
    """The greatest length of a request."""
    config = model.config
    if settings.draft_tokens and config.mtp_layer is None:
        raise ConfigError(
            f"draft_tokens: this {config.model_type} model has no MTP layer to draft with; found {settings.draft_tokens}, "
            "expected 0"
        )
    if settings.draft_window is not None and not settings.draft_tokens:
        raise ConfigError(f"draft_window: found {settings.draft_window} without draft_tokens, expected None")
    least = settings.max_requests * (settings.draft_tokens + 1)
    if settings.rows_per_step < least:
        raise ConfigError(
            f"rows_per_step: {settings.max_requests} requests with {settings.draft_tokens} drafts decode in {least} rows; "
            f"found {settings.rows_per_step}"
        )
    length = settings.max_length or config.max_position_embeddings
    if length > config.max_position_embeddings:
        raise ConfigError(
            f"max_length: found {length}, and the model's context is {config.max_position_embeddings} tokens"
        )
    return length


def _free_memory(devices: Iterable[jax.Device], reserved: int, sharing: int) -> int:
    """Bytes for keys and values on each of these devices, beside `reserved` bytes of other state: what the fullest has, and of
    several hosts the least. sharing: as Engine has it."""
    stats = [device.memory_stats() or {} for device in devices]
    if all("bytes_limit" in each for each in stats):
        free = min(int(each["bytes_limit"] * _MEMORY_SHARE) - each["bytes_in_use"] for each in stats)
    else:
        free = int(os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") * _HOST_SHARE / sharing)
    if jax.process_count() > 1:
        free = int(multihost_utils.process_allgather(np.int32(free >> 20)).min()) << 20
    return max(0, free - reserved)


def _put(values: Any, sharding: jax.sharding.Sharding) -> Any:
    """The arrays whole on every device of the sharding; of several processes each has the same ones."""
    if sharding.is_fully_addressable:
        return jax.device_put(values, sharding)
    # device_put would have all processes compare them, at every step.
    return jax.tree.map(lambda x: jax.make_array_from_callback(x.shape, sharding, np.asarray(x).__getitem__), values)


def _replicated(params: nnx.State) -> jax.sharding.Sharding:
    """Where the weights are, whole on every device."""
    found = jax.tree.leaves(params)[0].sharding
    return NamedSharding(found.mesh, PartitionSpec()) if isinstance(found, NamedSharding) else found
