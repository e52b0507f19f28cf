"""Pages: planned from memory, held, shared, remembered, and what a hybrid model saves."""

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.kv_residency import ratio
from exaone_jax.config.hf import published, read_config
from exaone_jax.errors import ConfigError
from exaone_jax.inference.pools import Group, Holding, KeyChain, PagePool, PoolRequest, Pools, plan_pools
from tests.inference.small_models import K_EXAONE, K_EXAONE_2

PAGE = 4
ASK = PoolRequest(
    page_size=PAGE, max_length=64, max_sequences=4, rows=16, ahead=2, typical_length=32, dtype="float32", mtp=True
)
LAYER_PAGE = 2 * 2 * 8 * 4 * PAGE  # bytes: keys and values, 2 heads of 8, float32


# Planning


@pytest.mark.parametrize("memory", [40_000, 60_000, 100_000, 10**9])
@pytest.mark.parametrize("config", [K_EXAONE, K_EXAONE_2], ids=["one window", "two windows"])
def test_what_is_planned_fits_and_serves_one_sequence(config, memory: int):
    planned = plan_pools(config, ASK, memory)
    assert sum(group.bytes for group in planned) <= memory
    for group in planned:
        assert group.table_width <= group.pages <= 2 * ASK.max_sequences * group.table_width
        assert group.page_bytes == group.layers * LAYER_PAGE


def test_groups_run_out_together():
    """With memory for about two of the four, a typical sequence's share is the same in each pool."""
    ask = ASK.__class__(**{**vars(ASK), "max_length": 256, "typical_length": 128, "max_sequences": 8})
    planned = plan_pools(K_EXAONE, ask, 200_000)
    full, window = planned
    sequences_full = full.pages / (128 / PAGE)
    window_pages = (4 - 1 + 2 - 1) / PAGE + 1
    sequences_window = 1 + (window.pages - window.table_width) / window_pages
    assert sequences_window == pytest.approx(sequences_full, abs=1)
    assert sequences_full < 8


@pytest.mark.parametrize("dtype", ["int8", "float8_e4m3fn"])
def test_8_bits_hold_almost_twice_as_much(dtype: str):
    config = read_config(published("K-EXAONE-236B-A23B"))
    wide, narrow = (
        sum(
            group.pages
            for group in plan_pools(config, dataclasses.replace(ASK, dtype=name, max_sequences=10**5), 2**30)
        )
        for name in ("bfloat16", dtype)
    )
    assert narrow == pytest.approx(wide * 2 * 128 / (128 + 4), rel=0.01)


def test_too_little_memory_is_refused_with_the_arithmetic():
    """16 pages of 2 global layers, and of 2 window layers what 3 + 16 + 1 positions may lie in: 6 pages."""
    full, window = 16 * 2 * LAYER_PAGE, 6 * 2 * LAYER_PAGE
    assert plan_pools(K_EXAONE, ASK, full + window)
    with pytest.raises(ConfigError) as caught:
        plan_pools(K_EXAONE, ASK, full + window - 1)
    assert str(caught.value) == (
        f"one sequence of 64 positions needs 16 pages x {2 * LAYER_PAGE:,} bytes (2 layers without a window) + "
        f"6 pages x {2 * LAYER_PAGE:,} bytes (2 layers of window 4) = {full + window:,} bytes of keys and values, and "
        f"there are {full + window - 1:,}; 60 positions would fit"
    )


# One pool


def test_a_pool_forgets_only_what_it_must():
    pool = PagePool(3)
    a, b, c = (pool.take() for _ in range(3))
    pool.publish(a, b"a")
    pool.publish(b, b"b")
    pool.release(a, keep=True)
    pool.release(b, keep=True)
    pool.release(c, keep=True)  # nothing is known of it: the first to go
    assert pool.free == 3
    assert pool.take() == c
    assert b"a" in pool and b"b" in pool
    assert pool.share(b"a") == a and pool.share(b"a") == a
    assert pool.take() == b
    assert b"b" not in pool, "its page is written by somebody else"
    pool.release(a, keep=True)
    assert pool.free == 0, "another holds it"
    pool.release(a, keep=False)
    assert pool.take() == a and b"a" not in pool


def test_a_page_cannot_be_released_twice():
    pool = PagePool(1)
    pool.release(pool.take(), keep=False)
    with pytest.raises(RuntimeError, match="more often than taken"):
        pool.release(0, keep=False)


def test_the_first_of_two_equal_pages_is_the_one_to_find():
    pool = PagePool(2)
    a, b = pool.take(), pool.take()
    pool.publish(a, b"x")
    pool.publish(b, b"x")
    assert pool.share(b"x") == a


# Keys


def test_keys_depend_on_everything_before_and_one_token_more_with_mtp():
    tokens = list(range(20))

    def keys(tokens: list[int], lookahead: int = 0, salt: str = "") -> list[bytes]:
        return KeyChain(PAGE, lookahead=lookahead, salt=salt).extend(tokens)

    plain, ahead = keys(tokens), keys(tokens, 1)
    assert (len(plain), len(ahead)) == (5, 4)
    assert len({*plain, *ahead}) == 9
    other = [*tokens[:8], 99, *tokens[9:]]
    assert [a == b for a, b in zip(plain, keys(other), strict=True)] == [True, True, False, False, False]
    assert [a == b for a, b in zip(ahead, keys(other, 1), strict=True)] == [True, False, False, False]
    assert not {*plain} & {*keys(tokens, salt="another tenant")}
    chain = KeyChain(PAGE, lookahead=1, salt="")
    for end in range(21):
        found = chain.extend(tokens[:end])
        assert found == ahead[: max(0, end - 1) // PAGE]


# Sequences in pools


def pools(full: int = 32, window: int = 12, slots: int = 3) -> Pools:
    """One group without a window, one of window 6: a query sees 6 positions, so parts of at most 3 pages."""
    return Pools([Group(None, 1, full, 16, 1), Group(6, 1, window, 6, 1)], PAGE, slots)


def read(pools: Pools, slot: int, holding: Holding, keys: list[bytes], start: int, end: int, chunk: int = 8) -> None:
    for at in range(start, end, chunk):
        until = min(at + chunk, end)
        pools.pass_by(holding, at)
        assert pools.reserve(slot, holding, at, until)
        pools.publish(holding, keys, until)


KEYS = KeyChain(PAGE, lookahead=0, salt="").extend(list(range(64)))


def test_a_window_lets_go_of_what_it_has_left():
    p, holding = pools(), Holding(2)
    read(p, 0, holding, KEYS, 0, 40)
    p.pass_by(holding, 40)
    assert sorted(holding.pages[0]) == list(range(10))
    assert sorted(holding.pages[1]) == [8, 9], "position 40 sees 35 to 40"
    assert [p.tables[0][0, i] for i in range(10)] == [holding.pages[0][i] for i in range(10)]
    assert [p.tables[1][0, i % 6] for i in (8, 9)] == [holding.pages[1][i] for i in (8, 9)]
    p.release(holding)
    assert p.used() == [0.0, 0.0]


def test_reserving_takes_all_or_nothing():
    p, holding = pools(full=4, window=12), Holding(2)
    assert not p.reserve(0, holding, 0, 17)
    assert p.used() == [0.0, 0.0]
    assert p.reserve(0, holding, 0, 16)
    assert p.used() == pytest.approx([1.0, 4 / 12])


def test_a_hit_needs_every_global_page_and_the_window_before_it():
    p, first = pools(), Holding(2)
    first.checkpoints = {5}
    read(p, 0, first, KEYS, 0, 40)
    p.release(first)
    assert p.match(KEYS, 10) == (10, 10), "the end is remembered"
    other = KEYS[:5] + [bytes([i]) for i in range(5)]
    assert p.match(other, 10) == (5, 5), "and so is the checkpoint"
    assert p.match(KEYS, 9) == (9, 9)
    second = Holding(2)
    p.attach(1, second, KEYS, 5)
    assert sorted(second.pages[0]) == list(range(5))
    assert sorted(second.pages[1]) == [3, 4], "position 20 sees 15 to 20"
    assert p.tables[0][1, :5].tolist() == [second.pages[0][i] for i in range(5)]


def test_windows_that_were_written_over_are_no_hit_though_global_pages_are_there():
    p, first = pools(window=6), Holding(2)
    read(p, 0, first, KEYS, 0, 48)
    other = KEYS[:4] + [bytes([i]) for i in range(6)]
    assert p.match(other, 10) == (0, 4), "nobody knew that others would part there"
    second = Holding(2)
    second.checkpoints = {4}
    p.release(first)
    read(p, 1, second, other, 0, 40)
    assert p.match(KEYS[:4], 4) == (4, 4), "now it is known"


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(1, 60), st.integers(0, 4)), min_size=1, max_size=30))
def test_pages_are_never_lost_nor_written_by_two(requests: list[tuple[int, int, int]]):
    """Requests of four prefixes in three slots, ended in turn: a page is written only by the one that took it."""
    p, running, slots = pools(full=30, window=14), [], [0, 1, 2]
    for prefix, length, keep in requests:
        keys = KeyChain(PAGE, lookahead=0, salt=str(prefix)).extend(list(range(length)))
        while not slots or any(n > pool.free for n, pool in zip(p.missing(Holding(2), length), p.pools, strict=True)):
            slot, done = running.pop(0)
            p.release(done, keep=keep != 1)
            slots.append(slot)
        slot, holding = slots.pop(), Holding(2)
        count, known = p.match(keys, (length - 1) // PAGE)
        assert count <= known
        p.attach(slot, holding, keys, count)
        holding.checkpoints = {keep}
        others = [{page for _, other in running for page in other.pages[g].values()} for g in range(2)]
        shared = [set(held.values()) for held in holding.pages]
        read(p, slot, holding, keys, count * PAGE, length, chunk=6)
        for g in range(2):
            assert not (set(holding.pages[g].values()) - shared[g]) & others[g]
        running.append((slot, holding))
        held = [{page for _, h in running for page in h.pages[g].values()} for g in range(2)]
        assert [len(pages) for pages in held] == [pool.size - pool.free for pool in p.pools]
    for _, holding in running:
        p.release(holding)
    assert p.used() == [0.0, 0.0]


# What a hybrid model saves


@pytest.mark.parametrize(
    ("length", "draft_window", "goal"),
    [(8192, 1024, 3.8), (262_144, 1024, 4.0), (8192, None, 3.5), (262_144, None, 3.7)],
)
def test_k_exaone_keeps_about_four_times_as_many_tokens(length: int, draft_window: int | None, goal: float):
    """Counted by the allocator, prefix caching and MTP on, beside a model with the same layers and no windows.

    K-EXAONE's MTP layer has no window: as trained it is a 13th global layer of 49, and 49 / 13 = 3.77 the bound.
    """
    config, sequences = read_config(published("K-EXAONE-236B-A23B")), 100 if length == 8192 else 10
    hybrid, full = ratio(config, length, sequences=sequences, drafts=2, draft_window=draft_window)
    assert full == sequences * length
    assert goal <= hybrid / full < 49 / (13 if draft_window is None else 12)
