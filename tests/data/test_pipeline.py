"""The batch stream: a function of its arguments and the index."""

import itertools

import numpy as np
import pytest

from exaone_jax.data import PackedRows, pipeline
from exaone_jax.errors import InputError


def rows(count: int) -> PackedRows:
    tokens = np.arange(count * 4, dtype=np.int32).reshape(count, 4)
    return PackedRows(tokens, np.ones_like(tokens))


def test_batches_have_the_rows_shape_and_are_packed_rows() -> None:
    batch = pipeline(rows(10), 3, seed=0)[0]
    assert isinstance(batch, PackedRows)
    assert batch.tokens.shape == batch.segment_ids.shape == (3, 4)


def test_each_epoch_has_every_row_once_in_its_own_order() -> None:
    batches = pipeline(rows(10), 5, seed=0)
    epochs = [np.concatenate([batches[2 * epoch + half].tokens[:, 0] for half in range(2)]) for epoch in range(3)]
    for epoch in epochs:
        assert sorted(epoch) == list(range(0, 40, 4))
    assert len({tuple(epoch) for epoch in epochs}) == 3


def test_rows_left_over_open_the_next_epoch() -> None:
    batches = pipeline(rows(10), 4, seed=0)
    seen = np.concatenate([batches[i].tokens[:, 0] for i in range(5)])
    assert sorted(seen) == sorted([*range(0, 40, 4)] * 2)


def test_a_batch_is_a_function_of_its_index() -> None:
    in_order = [batch.tokens for batch in itertools.islice(pipeline(rows(10), 3, seed=7), 8)]
    again = pipeline(rows(10), 3, seed=7)
    for i in (5, 0, 7):
        np.testing.assert_array_equal(again[i].tokens, in_order[i])
    assert any(np.any(pipeline(rows(10), 3, seed=8)[i].tokens != in_order[i]) for i in range(8))


@pytest.mark.parametrize("batch_size", [0, 11])
def test_a_batch_larger_than_the_rows_is_an_error(batch_size: int) -> None:
    with pytest.raises(InputError, match="10 rows"):
        pipeline(rows(10), batch_size, seed=0)
