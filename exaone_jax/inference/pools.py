"""Pages of keys and values: how many there are, who holds them, and which are remembered for a prompt that begins alike.

Layers with one window are a group with a pool of its own. A sequence holds, in each group, the pages that its next step
can see: all of them under global layers, the last few under a window. What it lets go of stays where it is until
the page is needed for something else, and until then a prompt with the same beginning takes it again.
"""

import dataclasses
import hashlib
import math
from collections import OrderedDict
from collections.abc import Iterable, Sequence

import jax.numpy as jnp
import numpy as np

from exaone_jax.config.model import ModelConfig
from exaone_jax.errors import ConfigError
from exaone_jax.model.paged import Window, groups
from pallas_kernels.paged_attention import QUANTIZED

Key = bytes
_SPARE = 2  # a pool is at most so many times what all running sequences can hold


@dataclasses.dataclass(frozen=True)
class Group:
    """The layers of one window: pages of `page_bytes` for all of them together, `table_width` to a sequence at most."""

    window: Window
    layers: int
    pages: int
    table_width: int
    page_bytes: int

    @property
    def bytes(self) -> int:
        return self.pages * self.page_bytes


@dataclasses.dataclass(frozen=True)
class PoolRequest:
    """What pools are planned for.

    max_length: positions of the longest sequence. max_sequences: how many run at once at most. rows: most rows of a
    sequence in one step (a chunk). ahead: positions that may be written beyond what is known to be settled (drafts in flight).
    typical_length: of a sequence; decides how the memory is shared between the groups. spare: positions beyond `ahead`
    that may be written where there is room. dtype: of keys and values.
    """

    page_size: int
    max_length: int
    max_sequences: int
    rows: int
    ahead: int
    typical_length: int
    dtype: str
    mtp: bool
    spare: int = 0


def plan_pools(config: ModelConfig, ask: PoolRequest, memory: int) -> tuple[Group, ...]:
    """How many pages each group gets of `memory` bytes.

    The groups run out together when all sequences have the typical length. None gets more than twice what max_sequences
    of the greatest length can hold: the rest of it remembers prefixes.

    Raises ConfigError, with the arithmetic, where one sequence of the greatest length does not fit.
    """
    dtype = jnp.dtype(ask.dtype)
    scale = 4 if dtype in QUANTIZED else 0
    position_bytes = 2 * config.num_kv_heads * (config.head_dim * dtype.itemsize + scale)
    found = []
    for window, layers in groups(config, mtp=ask.mtp).items():
        page_bytes = layers * ask.page_size * position_bytes
        found.append(Group(window, layers, 0, _table_width(window, ask), page_bytes))
    needed = sum(group.table_width * group.page_bytes for group in found)
    if needed > memory:
        raise ConfigError(_too_small(found, ask, needed, memory))
    # Windows have one sequence at its widest, as one chunk is being written at a time, and typical pages for all others,
    # be they running or remembered.
    typical = [_typical_pages(group.window, ask) for group in found]
    one = sum(pages * group.page_bytes for pages, group in zip(typical, found, strict=True))
    windows = sum(p * g.page_bytes for p, g in zip(typical, found, strict=True) if g.window is not None)
    sequences = min(memory / one, 1 + (memory - needed) / windows if windows else math.inf)
    left, out = memory, []
    for group, pages in reversed(list(zip(found, typical, strict=True))):
        if group.window is None:  # last: what the windows leave
            share = left // group.page_bytes
        else:
            share = group.table_width + math.floor(max(0, sequences - 1) * pages)
        share = min(share, _SPARE * group.table_width * ask.max_sequences)
        left -= share * group.page_bytes
        out.append(dataclasses.replace(group, pages=share))
    return tuple(reversed(out))


def _table_width(window: Window, ask: PoolRequest) -> int:
    """Pages that hold every position which a step of one sequence writes or sees."""
    whole = -(-ask.max_length // ask.page_size)
    if window is None:
        return whole
    return min(whole, -(-(window - 1 + ask.rows + ask.ahead + ask.spare - 1) // ask.page_size) + 1)


def _typical_pages(window: Window, ask: PoolRequest) -> float:
    """Pages of a sequence in the middle of decoding: n positions that start anywhere lie in (n - 1) / page_size + 1."""
    length = min(ask.typical_length, ask.max_length)
    if window is None or window > length:
        return -(-length // ask.page_size)
    return (window - 1 + ask.ahead - 1) / ask.page_size + 1


def _too_small(found: Sequence[Group], ask: PoolRequest, needed: int, memory: int) -> str:
    def part(group: Group) -> str:
        kind = f"of window {group.window}" if group.window else "without a window"
        return f"{group.table_width} pages x {group.page_bytes:,} bytes ({group.layers} layers {kind})"

    parts = " + ".join(map(part, found))
    fixed = sum(g.table_width * g.page_bytes for g in found if g.window is not None)
    each = sum(g.page_bytes for g in found if g.window is None)
    fits = (memory - fixed) // each * ask.page_size if each and memory > fixed else 0
    hint = f"; {fits:,} positions would fit" if fits > 0 else ""
    return (
        f"one sequence of {ask.max_length:,} positions needs {parts} = {needed:,} bytes of keys and values, and there are "
        f"{memory:,}{hint}"
    )


class PagePool:
    """The pages of one group: how often each is held, and under which key it can be found again.

    Pages that nobody holds wait in a queue; the first is taken when one is needed, and forgotten then.
    """

    def __init__(self, pages: int):
        self._holders = [0] * pages
        self._waiting: OrderedDict[int, None] = OrderedDict.fromkeys(range(pages))
        self._page_of: dict[Key, int] = {}
        self._key_of: dict[int, Key] = {}

    @property
    def size(self) -> int:
        return len(self._holders)

    @property
    def free(self) -> int:
        """Pages that nobody holds, remembered or not."""
        return len(self._waiting)

    def __contains__(self, key: Key) -> bool:
        return key in self._page_of

    def take(self) -> int:
        """A page to write; the caller has looked that one is free."""
        page, _ = self._waiting.popitem(last=False)
        self._forget(page)
        self._holders[page] = 1
        return page

    def share(self, key: Key) -> int:
        """The page remembered under a key, with one holder more."""
        page = self._page_of[key]
        self._waiting.pop(page, None)
        self._holders[page] += 1
        return page

    def publish(self, page: int, key: Key) -> None:
        """Remember what a page holds, which nobody writes any more; the first of two equal pages is the one to find."""
        if key not in self._page_of:
            self._forget(page)
            self._page_of[key], self._key_of[page] = page, key

    def release(self, page: int, *, keep: bool) -> None:
        """One holder less. Without any a page waits: behind all others if it is to be kept, else it is the next to go."""
        self._holders[page] -= 1
        if self._holders[page] < 0:
            raise RuntimeError(f"page {page} was released more often than taken")
        if not self._holders[page]:
            self._waiting[page] = None
            self._waiting.move_to_end(page, last=keep and page in self._key_of)

    def forget(self, page: int) -> None:
        """Nobody shall find this page again."""
        self._forget(page)

    def _forget(self, page: int) -> None:
        if (key := self._key_of.pop(page, None)) is not None:
            del self._page_of[key]


class KeyChain:
    """The keys of a sequence's full pages: each is the digest of every token up to the page's end.

    With MTP it reads one token further, as the MTP layer's last entry in the page does: then a page may be shared only
    between sequences that agree on that token too.
    """

    def __init__(self, page_size: int, *, lookahead: int, salt: str):
        self._page_size, self._lookahead = page_size, lookahead
        self._hash = hashlib.sha256(salt.encode())
        self._read = 0
        self.keys: list[Key] = []

    def extend(self, tokens: Sequence[int]) -> list[Key]:
        """The keys of all pages that these tokens (the same ones as before, and more) make known."""
        while (end := (len(self.keys) + 1) * self._page_size + self._lookahead) <= len(tokens):
            self._hash.update(np.asarray(tokens[self._read : end], np.int32).tobytes())
            self._read = end
            self.keys.append(self._hash.copy().digest())
        return self.keys


class Holding:
    """What one sequence holds: for each group, pages by their number in the sequence."""

    def __init__(self, groups: int):
        self.pages: list[dict[int, int]] = [{} for _ in range(groups)]
        self.published = 0  # pages of the sequence whose keys are known to the pools
        self.checkpoints: set[int] = set()  # numbers of pages before which windows are worth keeping


class Pools:
    """The pools of all groups, and the page tables of the slots that sequences run in."""

    def __init__(self, planned: Sequence[Group], page_size: int, slots: int):
        self.groups, self.page_size = tuple(planned), page_size
        self.pools = [PagePool(group.pages) for group in planned]
        self.tables = [np.zeros((slots, group.table_width), np.int32) for group in planned]
        self.changed = True  # since the tables were last read

    def match(self, keys: Sequence[Key], most: int) -> tuple[int, int]:
        """(pages of the sequence that need not be computed, pages that global layers alone would have).

        At most `most`. A window layer needs only the pages that the first token after them sees.
        """
        known = most = min(most, len(keys))
        for group, pool in zip(self.groups, self.pools, strict=True):
            if group.window is None:
                known = next((i for i in range(most) if keys[i] not in pool), most)
        for count in range(known, 0, -1):
            if all(
                all(keys[i] in pool for i in range(self._first_seen(group, count * self.page_size), count))
                for group, pool in zip(self.groups, self.pools, strict=True)
                if group.window is not None
            ):
                return count, known
        return 0, known

    def attach(self, slot: int, holding: Holding, keys: Sequence[Key], count: int) -> None:
        """Hold what the first position after `count` remembered pages sees."""
        for g, (group, pool) in enumerate(zip(self.groups, self.pools, strict=True)):
            for i in range(self._first_seen(group, count * self.page_size), count):
                self._put(slot, holding, g, i, pool.share(keys[i]))
        holding.published = count

    def missing(self, holding: Holding, length: int) -> list[int]:
        """How many pages of each group a sequence lacks to go from nothing to this length, chunk by chunk."""
        whole = -(-length // self.page_size)
        return [
            max(0, min(whole, group.table_width) - len(held))
            for group, held in zip(self.groups, holding.pages, strict=True)
        ]

    def fits(self, wishes: Iterable[tuple[Holding, int, int]]) -> bool:
        """Whether all of these sequences could have their pages for the positions `first .. length - 1`."""
        wanted = [[len(new) for new in self._lacking(holding, first, length)] for holding, first, length in wishes]
        return all(
            sum(counts) <= pool.free for counts, pool in zip(zip(*wanted, strict=True), self.pools, strict=False)
        )

    def reserve(self, slot: int, holding: Holding, first: int, length: int) -> bool:
        """Pages for the positions `first .. length - 1`; False where some pool has too few, and then nothing changed."""
        wanted = self._lacking(holding, first, length)
        if any(len(new) > pool.free for new, pool in zip(wanted, self.pools, strict=True)):
            return False
        for g, new in enumerate(wanted):
            for i in new:
                self._put(slot, holding, g, i, self.pools[g].take())
        return True

    def publish(self, holding: Holding, keys: Sequence[Key], length: int) -> None:
        """Make the full pages of a sequence known of which `length` positions are settled."""
        full = min(len(keys), length // self.page_size)
        for i in range(holding.published, full):
            for pool, held in zip(self.pools, holding.pages, strict=True):
                if i in held:
                    pool.publish(held[i], keys[i])
        holding.published = max(holding.published, full)

    def pass_by(self, holding: Holding, position: int) -> None:
        """Let go of pages that no query from `position` on sees. They are the first to be used again, unless they are
        what a checkpoint needs."""
        for group, pool, held in zip(self.groups, self.pools, holding.pages, strict=True):
            if group.window is None:
                continue
            for i in [i for i in held if i < self._first_seen(group, position)]:
                keep = any(self._first_seen(group, c * self.page_size) <= i < c for c in holding.checkpoints)
                pool.release(held.pop(i), keep=keep)

    def release(self, holding: Holding, *, keep: bool = True) -> None:
        """Let go of everything; pages at the beginning of the sequence are remembered longest."""
        for pool, held in zip(self.pools, holding.pages, strict=True):
            for i in sorted(held, reverse=True):
                if not keep:
                    pool.forget(held[i])
                pool.release(held[i], keep=keep)
            held.clear()
        holding.published = 0

    def used(self) -> list[float]:
        """For each group, the share of its pages that somebody holds."""
        return [1 - pool.free / pool.size for pool in self.pools]

    def _first_seen(self, group: Group, position: int) -> int:
        """The number of the first page that a query at `position` sees."""
        return 0 if group.window is None else max(0, position - group.window + 1) // self.page_size

    def _lacking(self, holding: Holding, first: int, length: int) -> list[list[int]]:
        """For each group, the numbers of the pages that a sequence would need."""
        numbers = range(first // self.page_size, -(-length // self.page_size))
        return [[i for i in numbers if i not in held] for held in holding.pages]

    def _put(self, slot: int, holding: Holding, group: int, number: int, page: int) -> None:
        holding.pages[group][number] = page
        self.tables[group][slot, number % self.groups[group].table_width] = page
        self.changed = True
