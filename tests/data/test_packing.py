"""Packing: each token in exactly one place, rows of one length, segments in runs."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from exaone_jax.data import PackedRows, pack
from exaone_jax.errors import InputError

PAD = -1


def segments(rows: PackedRows) -> list[list[int]]:
    """The tokens of every segment, read back row by row."""
    found = []
    for tokens, ids in zip(rows.tokens, rows.segment_ids, strict=True):
        for _, group in itertools.groupby(zip(ids, tokens, strict=True), key=lambda pair: pair[0]):
            run = list(group)
            if run[0][0] != 0:
                found.append([int(token) for _, token in run])
    return found


def numbered(sizes: list[int]) -> list[np.ndarray]:
    """Documents of these sizes in which no token occurs twice."""
    starts = np.concatenate([[0], np.cumsum(sizes)])
    return [np.arange(start, start + size) for start, size in zip(starts, sizes, strict=False)]


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(0, 40), min_size=1, max_size=30).filter(any), st.integers(1, 17))
def test_every_token_lands_once_in_its_documents_order(sizes: list[int], length: int) -> None:
    documents = numbered(sizes)
    rows = pack(documents, length, PAD)
    assert rows.tokens.shape == rows.segment_ids.shape
    assert rows.tokens.shape[1] == length
    assert rows.tokens.dtype == rows.segment_ids.dtype == np.int32
    assert sorted(rows.tokens[rows.segment_ids > 0]) == list(range(sum(sizes)))
    assert np.all(rows.tokens[rows.segment_ids == 0] == PAD)
    expected = [list(document[i : i + length]) for document in documents for i in range(0, len(document), length)]
    assert sorted(segments(rows)) == sorted(expected)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(1, 40), min_size=1, max_size=30), st.integers(1, 17))
def test_segment_ids_count_up_and_padding_is_last(sizes: list[int], length: int) -> None:
    for ids in pack(numbered(sizes), length, PAD).segment_ids:
        real = ids[ids > 0]
        assert np.all(ids[: len(real)] > 0)
        assert real[0] == 1
        assert set(np.diff(real)) <= {0, 1}


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(1, 17), min_size=1, max_size=30), st.integers(17, 30))
def test_no_two_rows_would_fit_in_one(sizes: list[int], length: int) -> None:
    filled = sorted((pack(numbered(sizes), length, PAD).segment_ids > 0).sum(axis=1))
    assert len(filled) == 1 or filled[0] + filled[1] > length


def test_a_piece_goes_where_it_leaves_the_least_room() -> None:
    rows = pack(numbered([7, 8, 2, 3]), 10, PAD)
    assert [list(row) for row in rows.segment_ids] == [[1] * 8 + [2] * 2, [1] * 7 + [2] * 3]


def test_packing_is_repeatable() -> None:
    documents = numbered([5, 9, 3, 3, 8, 1, 12])
    first, second = pack(documents, 10, PAD), pack(documents, 10, PAD)
    np.testing.assert_array_equal(first.tokens, second.tokens)
    np.testing.assert_array_equal(first.segment_ids, second.segment_ids)


@pytest.mark.parametrize(("documents", "length"), [([], 8), ([np.zeros(0, int)], 8), ([np.arange(3)], 0)])
def test_nothing_to_pack_or_nowhere_to_put_it_is_an_error(documents: list[np.ndarray], length: int) -> None:
    with pytest.raises(InputError):
        pack(documents, length, PAD)
