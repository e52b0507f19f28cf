"""Orders without tables: permutations are permutations, mixtures keep their shares everywhere."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from exaone_jax.data.order import Interleave, permuted


@given(st.integers(1, 3000), st.lists(st.integers(0, 9), max_size=3))
def test_every_place_comes_once(size: int, key: list[int]) -> None:
    assert sorted(permuted(np.arange(size), size, *key)) == list(range(size))


def test_a_place_is_found_without_the_others_and_the_key_chooses() -> None:
    whole = permuted(np.arange(1000), 1000, 3, 4)
    assert permuted(np.array([17, 900]), 1000, 3, 4).tolist() == whole[[17, 900]].tolist()
    assert np.mean(whole == np.arange(1000)) < 0.02
    assert np.mean(whole == permuted(np.arange(1000), 1000, 3, 5)) < 0.02


def test_neighbours_are_spread_evenly() -> None:
    whole = permuted(np.arange(4096), 4096, 1)
    assert abs(np.corrcoef(whole[:-1], whole[1:])[0, 1]) < 0.05  # 3 standard deviations of independent neighbours
    assert np.all(np.abs(np.histogram(whole[:1024], 8, (0, 4096))[0] - 128) < 45)  # 4 of a fair draw


def test_a_permutation_of_billions_needs_no_table() -> None:
    size = 10**12 + 39
    places = permuted(np.arange(1000), size, 0)
    assert len(set(places.tolist())) == 1000
    assert places.min() >= 0 and places.max() < size


@given(st.lists(st.floats(0.01, 100), min_size=1, max_size=6), st.integers(0, 200_000))
def test_any_stretch_of_a_mixture_has_its_shares(weights: list[float], place: int) -> None:
    interleave, stretch = Interleave(weights), 500
    found = np.bincount([interleave[place + i][0] for i in range(stretch)], minlength=len(weights))
    np.testing.assert_allclose(found, np.array(weights) / sum(weights) * stretch, atol=2.5)


def test_each_source_counts_its_own_places_across_periods() -> None:
    interleave = Interleave([1, 2, 5])
    seen = [[], [], []]
    for place in range(2 * 65536 + 100):
        source, own = interleave[place]
        seen[source].append(own)
    for own in seen:
        assert own == list(range(len(own)))


def test_a_tiny_weight_still_has_a_place() -> None:
    interleave = Interleave([1e-9, 1])
    assert [interleave[place][0] for place in range(65536)].count(0) == 1


@pytest.mark.parametrize("weights", [[1], [3, 3]])
def test_equal_weights_take_turns(weights: list[float]) -> None:
    assert [Interleave(weights)[place][0] for place in range(6)] == [0, len(weights) - 1] * 3
