"""The scheduler without a device: whatever is drawn, kept, cancelled or lacking, everybody ends and no page has two writers."""

import numpy as np
import pytest

from exaone_jax.config.model import ModelConfig
from exaone_jax.inference.engine import written_ahead
from exaone_jax.inference.pools import Holding, KeyChain, PoolRequest, Pools, plan_pools
from exaone_jax.inference.sampling import SamplingParams
from exaone_jax.inference.scheduler import Entry, NoRoomError, Request, Scheduler
from tests.inference.small_models import K_EXAONE, K_EXAONE_2

PAGE, SLOTS, ROWS, LENGTH = 4, 3, 24, 160


class Simulation:
    """Steps whose results are drawn from `rng`, looked at one step late as the engine does."""

    def __init__(self, config: ModelConfig, drafts: int, memory: int, seed: int, fused: int = 1):
        self.rng, self.drafts, self.steps, self.fused = np.random.default_rng(seed), drafts, 0, 0
        ask = PoolRequest(
            page_size=PAGE,
            max_length=LENGTH + 2 * drafts,
            max_sequences=SLOTS,
            rows=ROWS,
            ahead=written_ahead(drafts),
            spare=written_ahead(drafts, fused) - written_ahead(drafts),
            typical_length=LENGTH // 2,
            dtype="float32",
            mtp=drafts > 0,
        )
        planned = plan_pools(config, ask, memory)
        self.pools = Pools(planned, PAGE, SLOTS)
        self.scheduler = Scheduler(self.pools, SLOTS, ROWS, drafts, remember=True, fused=fused)
        self.flight: list[Entry] = []

    def add(self, number: int) -> Request:
        """One of few beginnings, then tokens of its own."""
        common = np.random.default_rng(number % 3).integers(0, 40, 60).tolist()
        tokens = common[: self.rng.integers(1, 60)] + self.rng.integers(0, 40, self.rng.integers(0, 50)).tolist()
        params = SamplingParams(max_new_tokens=int(self.rng.integers(1, 45)))
        chain = KeyChain(PAGE, lookahead=int(self.drafts > 0), salt="")
        holding = Holding(len(self.pools.groups))
        request = Request(number, tokens, params, chain, holding, len(tokens), None)
        self.scheduler.add(request)
        return request

    def step(self) -> None:
        try:
            entries = self.scheduler.plan()
        except NoRoomError:
            self.collect()
            entries = self.scheduler.plan()
        self.check(entries)
        self.scheduler.launched(entries)
        self.collect()
        self.flight = entries
        self.steps += 1

    def collect(self) -> None:
        for entry in self.flight:
            request = entry.request
            if request.done:
                continue
            if entry.first is None:
                kept = self.rng.integers(0, self.drafts + 1, entry.steps).tolist()
                new = max(0, min(sum(kept) + entry.steps, request.limit - request.settled))
            else:
                new = int(entry.draws)
            self.scheduler.collected(entry, self.rng.integers(0, 40, new).tolist())
            if request.num_generated >= request.params.max_new_tokens:
                self.scheduler.end(request)
        self.flight = []

    def check(self, entries: list[Entry]) -> None:
        assert sum(entry.rows for entry in entries) <= ROWS
        assert len({entry.steps for entry in entries}) <= 1
        self.fused += sum(entry.steps > 1 for entry in entries)
        assert len({entry.request.slot for entry in entries}) == len(entries) <= SLOTS
        for entry in entries:
            request = entry.request
            first = request.least() if entry.first is None else entry.first
            last = first + entry.rows
            if entry.first is None:  # whoever is done writes where it stands
                last = min(request.most(self.drafts) + entry.steps * entry.rows, request.limit + entry.rows)
            last += max(0, self.drafts - 1)
            for g, (group, pool) in enumerate(zip(self.pools.groups, self.pools.pools, strict=True)):
                held = request.holding.pages[g]
                seen = 0 if group.window is None else max(0, first - group.window + 1)
                for number in range(seen // PAGE, -(-last // PAGE)):
                    page = held[number]
                    assert self.pools.tables[g][request.slot, number % group.table_width] == page
                    if number >= first // PAGE:  # written
                        assert pool._holders[page] == 1
                        assert page not in pool._key_of


# With `tight` memory, requests are put off; with `ample` memory beginnings are remembered.
TIGHT = {0: 36_000, 1: 60_000, 3: 60_000}


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("drafts", TIGHT)
@pytest.mark.parametrize("config", [K_EXAONE, K_EXAONE_2], ids=["one window", "two windows"])
@pytest.mark.parametrize("tight", [True, False], ids=["tight", "ample"])
def test_everybody_ends_and_no_page_has_two_writers(config: ModelConfig, drafts: int, seed: int, tight: bool):
    fused = 1 + seed % 2 * 3
    simulation = Simulation(config, drafts, TIGHT[drafts] if tight else 400_000, seed, fused)
    scheduler, requests = simulation.scheduler, []
    while len(requests) < 60 or scheduler.running or scheduler.waiting or simulation.flight:
        if len(requests) < 60 and simulation.rng.random() < 0.5:
            requests.append(simulation.add(len(requests)))
        alive = [request for request in requests if not request.done]
        if alive and simulation.rng.random() < 0.02:
            scheduler.end(alive[simulation.rng.integers(len(alive))])
        simulation.step()
        assert simulation.steps < 5000
    assert all(request.done for request in requests)
    assert sorted(scheduler.free_slots) == list(range(SLOTS))
    assert simulation.pools.used() == [0.0] * len(simulation.pools.groups)
    assert (simulation.fused > 0) == (fused > 1)
    if not tight:
        assert scheduler.preemptions == 0
        assert sum(request.cached > 0 for request in requests) > 10


def test_tight_memory_puts_requests_off():
    """Else the test above would not be of it."""
    simulation = Simulation(K_EXAONE, 1, TIGHT[1], 0)
    for number in range(30):
        simulation.add(number)
    while simulation.scheduler.running or simulation.scheduler.waiting:
        simulation.step()
    assert simulation.scheduler.preemptions > 0


def test_first_come_first_served():
    simulation = Simulation(K_EXAONE, 0, 400_000, 0)
    requests = [simulation.add(number) for number in range(5)]
    simulation.step()
    simulation.step()
    running = {request.id for request in requests if request.slot is not None}
    assert running == set(range(len(running))) and running


def test_pages_for_a_request_that_runs_are_taken_from_the_latest():
    simulation = Simulation(K_EXAONE, 1, TIGHT[1], 3)
    requests = [simulation.add(number) for number in range(8)]
    while simulation.scheduler.running or simulation.scheduler.waiting:
        simulation.step()
    assert requests[0].preemptions == 0, "the first one is never put off"
