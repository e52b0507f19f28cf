"""Orders that any process can compute at any place without the places before it."""

import hashlib
from collections.abc import Sequence

import numpy as np

_ROUNDS = 6
_PERIOD = 1 << 16


def permuted(places: np.ndarray, size: int, *key: int) -> np.ndarray:
    """Where a random permutation of `range(size)`, chosen by `key`, sends these places: int64, as `places`.

    A Feistel network on the smallest even number of bits that holds `size`, walked until it comes back into the range
    (Black and Rogaway, 2002): no table, so a permutation of a billion documents costs no memory.
    """
    half = np.uint64(max(1, -(-max(1, int(size - 1).bit_length()) // 2)))
    mask = np.uint64((1 << int(half)) - 1)
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8 * _ROUNDS).digest()
    keys = np.frombuffer(digest, np.uint64)
    result = np.asarray(places).astype(np.uint64)
    outside = np.ones(result.shape, bool)
    while outside.any():
        left, right = result[outside] >> half, result[outside] & mask
        for round_key in keys:
            left, right = right, left ^ (_mix(right ^ round_key) & mask)
        result[outside] = (left << half) | right
        outside = result >= size
    return result.astype(np.int64)


def _mix(x: np.ndarray) -> np.ndarray:
    """splitmix64's finaliser; overflow is meant."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


class Interleave:
    """Which source each place of an endless mixture takes, by weights: evenly spread, and never random.

    Weights become whole numbers of a period of 65,536 places, at least one each; in every period a source has exactly that
    many, and in each part of it its share to within a place or two.
    """

    def __init__(self, weights: Sequence[float]):
        shares = np.array(weights, float) / sum(weights) * (_PERIOD - len(weights))
        counts = 1 + np.floor(shares).astype(np.int64)
        counts[np.argsort(-(shares % 1), kind="stable")[: _PERIOD - counts.sum()]] += 1
        self._counts = counts
        times = np.concatenate([(np.arange(n) + 0.5) / n for n in counts])
        sources = np.repeat(np.arange(len(counts)), counts)
        self._pattern = sources[np.argsort(times, kind="stable")]
        before = np.empty(_PERIOD, np.int64)  # how often the place's source came up earlier in the period
        for source, count in enumerate(counts):
            before[self._pattern == source] = np.arange(count)
        self._before = before

    def __getitem__(self, place: int) -> tuple[int, int]:
        """The source of a place, and how many places before took that source."""
        period, offset = divmod(place, _PERIOD)
        source = int(self._pattern[offset])
        return source, period * int(self._counts[source]) + int(self._before[offset])
