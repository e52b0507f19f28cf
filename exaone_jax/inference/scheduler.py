"""Which rows the next step has: first come, first served; new tokens before prompts, prompts in chunks.

Work is planned one step ahead of what is known: while a step runs, a request has settled between one and k + 1 tokens more.
Pages are reserved for the most and let go of for the least.
"""

import dataclasses
import time
from collections import deque
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from exaone_jax.inference.grammar import Constraint
from exaone_jax.inference.pools import Holding, KeyChain, Pools
from exaone_jax.inference.sampling import SamplingParams
from exaone_jax.inference.text import TextRow


class NoRoomError(Exception):
    """Pages lack, and whoever should give some has work in flight: collect it and plan again."""


class TokenLogprobs(NamedTuple):
    """A token's log-probability under the model's own distribution, and the best tokens' (id, log-probability), best first.

    rank: how many tokens are as likely or likelier, itself included: 1 for the likeliest.
    """

    token: int
    logprob: float
    rank: int
    top: list[tuple[int, float]]


@dataclasses.dataclass(eq=False)
class Request:
    """One sequence.

    tokens: the prompt, of `prompt_length`, and what was generated. to_read: how many of them are read as a prompt, those
    that are known at admission. settled: positions in the cache for sure, in the steps launched so far.
    pending: launched steps that decode, flights: launched programs, whose results were not looked at.
    arrived, started, first_token: when it was made, first had a slot, and had a token; seconds of time.monotonic.
    ends: tokens that end it. constraint: what may follow; with one it takes no step before the one before was looked at.
    cache_salt: of `chain`, which finds only pages of the same.
    drafted: tokens that its newest step proposes; drafts: what they are, known where it has a constraint.
    prompt_logprobs: of the prompt's tokens, as far as they were read; the first has none.
    """

    id: int
    tokens: list[int]
    params: SamplingParams
    chain: KeyChain
    holding: Holding
    prompt_length: int
    text: TextRow | None  # what the tokens say, where there is a tokenizer
    ends: frozenset[int] = frozenset()
    constraint: Constraint | None = None
    cache_salt: str = ""
    prompt_logprobs: list[TokenLogprobs | None] = dataclasses.field(default_factory=lambda: [None])
    drafts: Sequence[int] = ()
    drafted: int = 0
    slot: int | None = None
    to_read: int = 0
    settled: int = 0
    pending: int = 0
    flights: int = 0
    told: bool = False  # whether the state on the device knows whose slot it is
    cached: int = 0  # tokens of the prompt that were found in the cache, at the first admission
    preemptions: int = 0
    done: bool = False
    arrived: float = dataclasses.field(default_factory=time.monotonic)
    started: float | None = None
    first_token: float | None = None

    @property
    def num_generated(self) -> int:
        return len(self.tokens) - self.prompt_length

    @property
    def limit(self) -> int:
        """Positions that are ever settled: the last token is never read."""
        return self.prompt_length + self.params.max_new_tokens - 1

    @property
    def reading(self) -> bool:
        return self.settled < self.to_read

    @property
    def first_needed(self) -> int:
        """The first position that must be computed though it may be remembered: what follows it is not known."""
        if self.params.prompt_logprobs is not None and len(self.prompt_logprobs) < self.prompt_length:
            return len(self.prompt_logprobs) - 1
        return len(self.tokens) - 1

    def least(self) -> int:
        """Positions settled when everything in flight has been."""
        return min(self.settled + self.pending, self.limit)

    def most(self, drafts: int) -> int:
        return min(self.settled + self.pending * (drafts + 1), self.limit)


@dataclasses.dataclass(frozen=True)
class Entry:
    """One request's part of a step: rows from position `first` on that read its prompt, or rows that decode (None).

    steps: how often it is run; more than once only where every entry decodes. drafted: of the drafts that rows verify, those
    that the step before made.
    """

    request: Request
    first: int | None
    rows: int
    steps: int = 1
    drafted: int = 0

    @property
    def draws(self) -> bool:
        """Whether a chunk is the last one of what is to be read."""
        return self.first is not None and self.first + self.rows == self.request.to_read

    @property
    def emits(self) -> bool:
        """Whether tokens come of it."""
        return self.first is None or self.draws


class Scheduler:
    """Requests that wait and run, and the pages they hold.

    Args:
        pools: of pages; one request of the greatest length fits into them.
        slots: how many requests run at once.
        rows: of a step; at least slots * (drafts + 1).
        drafts: tokens proposed for each request in a step at most.
        remember: whether prompts that begin alike share pages.
        fused: steps that are one program while there is nothing to do but decode.
    """

    def __init__(self, pools: Pools, slots: int, rows: int, drafts: int, *, remember: bool, fused: int = 1):
        self.pools, self.rows, self.drafts, self.remember, self.fused = pools, rows, drafts, remember, fused
        self.now = drafts  # proposed in the step that is planned
        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []
        self.free_slots = list(range(slots))
        self.preemptions = 0

    def add(self, request: Request) -> None:
        self.waiting.append(request)

    def plan(self, drafts: int | None = None) -> list[Entry]:
        """The next step; empty where there is nothing to do. Nothing is in flight because of it until `launched`.

        drafts: that each request verifies and has made, where no prompt is read; None, and where one is: the most.

        Raises NoRoomError.
        """
        entries: list[Entry] = []
        reading = any(r.reading for r in self.running) or (self.waiting and self.free_slots)
        self.now = self.drafts if drafts is None or reading else drafts
        put_off = self.preemptions
        decoding = [
            r for r in self.running if not r.reading and r.least() < r.limit and not (r.constraint and r.flights)
        ]
        steps = self._steps(decoding)
        for request in decoding:
            if request.slot is not None:  # it may have been put off for one before it
                self._plan(entries, request, None, self.now + 1, steps)
        left = self.rows - (self.now + 1) * len(decoding)
        for request in [r for r in self.running if r.reading]:
            if left > 0 and request.slot is not None:
                left -= self._plan(entries, request, request.settled, min(left, request.to_read - request.settled))
        while self.waiting and self.free_slots and left > 0 and put_off == self.preemptions:
            request = self.waiting[0]
            if not self._admit(request):
                break
            self.waiting.popleft()
            left -= self._plan(entries, request, request.settled, min(left, request.to_read - request.settled))
        return [entry for entry in entries if entry.request.slot is not None]

    def launched(self, entries: Iterable[Entry]) -> None:
        """Take note that a planned step runs."""
        for entry in entries:
            request = entry.request
            request.flights += 1
            request.drafted = self.now
            if entry.first is None:
                request.pending += entry.steps
            else:
                request.settled = entry.first + entry.rows
                self._publish(request)

    def collected(self, entry: Entry, new: list[int]) -> None:
        """Take note of a step's new tokens, for a request that is not done."""
        request = entry.request
        request.tokens.extend(new)
        request.flights -= 1
        if entry.first is None:
            request.pending -= entry.steps
            request.settled += len(new)
        if new:
            self._publish(request)

    def end(self, request: Request, *, keep: bool = True) -> None:
        """The request is done; what it held can be found again if `keep`."""
        request.done = True
        if request.slot is None:
            self.waiting.remove(request)
        else:
            self._leave(request, keep=keep)

    def _steps(self, decoding: Sequence[Request]) -> int:
        """How many steps are one program: a few if nobody waits or reads, nor must be looked at after each, and all have
        room."""
        alone = decoding and not self.waiting and len(decoding) == sum(r.least() < r.limit for r in self.running)
        if self.fused == 1 or not alone or any(r.constraint for r in decoding):
            return 1
        wishes = [(r.holding, *self._decoded(r, self.fused)) for r in decoding]
        return self.fused if self.pools.fits(wishes) else 1

    def _decoded(self, request: Request, steps: int) -> tuple[int, int]:
        """The positions that steps may write: first, and last plus one. A request that is done writes where it stands."""
        rows = self.now + 1
        end = min(request.most(self.drafts) + steps * rows, request.limit + rows)
        return request.least(), end + self._drafting

    @property
    def _drafting(self) -> int:
        """Positions that drafting writes on its own, past what is read."""
        return max(0, self.now - 1)

    def _plan(self, entries: list[Entry], request: Request, first: int | None, rows: int, steps: int = 1) -> int:
        """Add an entry and reserve its pages, at the cost of requests that came later; the rows it takes."""
        start, end = self._decoded(request, steps) if first is None else (first, first + rows + self._drafting)
        self.pools.pass_by(request.holding, start)
        while request.slot is not None:
            if self.pools.reserve(request.slot, request.holding, start, end):
                entries.append(Entry(request, first, rows, steps, min(request.drafted, self.now)))
                return rows
            latest = max(self.running, key=lambda r: r.id)
            if latest.flights:
                raise NoRoomError
            self._put_off(latest)
        return 0

    def _admit(self, request: Request) -> bool:
        """Give the request a slot and what it needs of remembered pages, if all of its tokens have room."""
        slot, holding = self.free_slots[-1], request.holding
        keys = request.chain.extend(request.tokens) if self.remember else []
        count, known = self.pools.match(keys, request.first_needed // self.pools.page_size)
        self.pools.attach(slot, holding, keys, count)
        spare = len(self.running)  # a page for each request that runs, so that none is put off at once
        missing = self.pools.missing(holding, len(request.tokens))
        if self.running and any(n + spare > pool.free for n, pool in zip(missing, self.pools.pools, strict=True)):
            self.pools.release(holding)
            return False
        # Windows are kept where prompts were seen to part, and at the end of each.
        holding.checkpoints = {known, min((len(request.tokens) - 1) // self.pools.page_size, len(keys))}
        request.slot = self.free_slots.pop()
        request.to_read, request.settled = len(request.tokens), count * self.pools.page_size
        if not request.preemptions:
            request.cached, request.started = request.settled, time.monotonic()
        self.running.append(request)
        return True

    def _put_off(self, request: Request) -> None:
        """Take everything from a request; it is computed again when there is room."""
        self._leave(request, keep=True)
        request.preemptions += 1
        self.preemptions += 1
        self.waiting.appendleft(request)

    def _leave(self, request: Request, *, keep: bool) -> None:
        if request.slot is None:
            raise RuntimeError(f"request {request.id} does not run")
        self.running.remove(request)
        self.pools.release(request.holding, keep=keep)
        self.free_slots.append(request.slot)
        request.slot, request.told = None, False
        request.to_read = request.settled = request.pending = request.flights = 0

    def _publish(self, request: Request) -> None:
        if self.remember:
            self.pools.publish(request.holding, request.chain.extend(request.tokens), request.settled)
