"""Rows by index: each token once an epoch, the same on any number of hosts, from any place."""

from collections import Counter
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from exaone_jax.config.data import DataConfig
from exaone_jax.data import PackedRows, batches, open_rows
from exaone_jax.data import rows as rows_module
from exaone_jax.data.documents import Counts, Document
from exaone_jax.data.rows import PackedSource, Rows
from exaone_jax.data.store import MemoryStore
from exaone_jax.errors import ConfigError, InputError
from exaone_jax.text import Tokenizer
from tests.data.conftest import source, write_jsonl

PAD = 0


def numbered(sizes: list[int], first: int = 1) -> MemoryStore:
    """Documents in which no token occurs twice, every third with a mask of its odd tokens."""
    starts = first + np.concatenate([[0], np.cumsum(sizes)])
    tokens = [np.arange(a, a + n, dtype=np.int32) for a, n in zip(starts, sizes, strict=False)]
    return MemoryStore((Document(t, t % 2 == 1 if i % 3 == 0 else None) for i, t in enumerate(tokens)), Counts())


def config(**options) -> DataConfig:
    return DataConfig.model_validate({"sources": [{"path": "unused"}], **options})


def tokens_of(rows: list[PackedRows]) -> list[int]:
    return sorted(int(token) for row in rows for token in np.asarray(row.tokens)[np.asarray(row.segment_ids) > 0])


def mixture(*stores: MemoryStore, weights: list[float], length: int = 16, **options) -> Rows:
    packed = [PackedSource(store, config(**options), length, PAD, (7, i)) for i, store in enumerate(stores)]
    return Rows(packed, weights, [], length, PAD, True, "")


@settings(max_examples=60)
@given(
    st.lists(st.integers(0, 60), min_size=1, max_size=40).filter(any),
    st.integers(1, 20),
    st.sampled_from(["best_fit", "none"]),
    st.integers(1, 9),
    st.booleans(),
)
def test_every_token_lands_exactly_once_an_epoch(
    sizes: list[int], length: int, packing: str, block: int, shuffle: bool
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rows_module, "_BLOCK_DOCUMENTS", block)
        packed = PackedSource(numbered(sizes), config(packing=packing), length, PAD, (3,) if shuffle else None)
    rows = Rows([packed], [1.0], [], length, PAD, True, "")
    for epoch in (0, 1, 5):
        found = [rows[epoch * rows.rows_per_epoch + i] for i in range(rows.rows_per_epoch)]
        assert tokens_of(found) == list(range(1, sum(sizes) + 1))
        for row in found:
            learnt = np.asarray(row.tokens)[np.asarray(row.loss_mask)]
            assert np.all(learnt > 0)
    assert rows.tokens_per_epoch == sum(sizes)


def test_a_mask_goes_with_its_tokens_through_cutting_and_packing() -> None:
    sizes = [30, 5, 8, 21, 3, 3, 40]
    store = numbered(sizes)
    masked = {
        int(t): bool(m)
        for d in (store[i] for i in range(7))
        if d.loss_mask is not None
        for t, m in zip(*d, strict=True)
    }
    rows = mixture(store, weights=[1.0])
    for i in range(rows.rows_per_epoch):
        tokens, ids, mask = (np.asarray(x) for x in rows[i])
        assert not mask[ids == 0].any()
        assert all(mask[j] == masked.get(int(tokens[j]), True) for j in np.flatnonzero(ids))


@pytest.mark.parametrize(("overlong", "kept", "counted"), [("truncate", 16, "truncated"), ("drop", 0, "dropped")])
def test_overlong_documents_are_truncated_or_dropped_and_counted(overlong: str, kept: int, counted: str) -> None:
    packed = PackedSource(numbered([5, 40, 17, 16]), config(overlong=overlong), 16, PAD, None)
    assert packed.tokens == 5 + 16 + 2 * kept
    assert {name: getattr(packed, name) for name in ("split", "truncated", "dropped")} == {
        "split": 0, "truncated": 0, "dropped": 0, counted: 2
    }  # fmt: skip
    found = Counter(len(document.tokens) for i in range(packed.rows) for _, document in packed[i])
    assert found == Counter([5, 16] + [16] * (kept > 0) * 2)
    assert PackedSource(numbered([5, 40, 17, 16]), config(), 16, PAD, None).split == 2


def test_epochs_differ_and_seeds_differ() -> None:
    rows, other = (mixture(numbered([9] * 50), weights=[1.0]) for _ in range(2))
    n = rows.rows_per_epoch
    first, second = ([int(rows[e * n + i].tokens[0]) for i in range(n)] for e in (0, 1))
    assert sorted(first) == sorted(second) and first != second
    assert [int(other[i].tokens[0]) for i in range(n)] == first


def test_sources_mix_by_weight_and_each_is_read_through_before_it_repeats() -> None:
    first, second = numbered([16] * 6), numbered([16] * 50, first=10_001)
    rows = mixture(first, second, weights=[1, 3])
    taken = [int(rows[i].tokens[0]) for i in range(400)]
    of_first = [token for token in taken if token < 10_001]
    assert abs(len(of_first) - 100) <= 2
    for start in range(0, 96, 6):
        assert len(set(of_first[start : start + 6])) == 6
    assert rows.rows_per_epoch == 56


def test_global_batches_are_the_same_on_any_number_of_hosts() -> None:
    rows = mixture(numbered([3, 8, 13, 30, 16, 2] * 9), numbered([5] * 40, first=10_001), weights=[2, 1])
    whole = list(islice(batches(rows, 0, 8), 12))
    for hosts in (2, 4):
        share = 8 // hosts
        read = [islice(batches(rows, 0, 8, slice(h * share, (h + 1) * share)), 12) for h in range(hosts)]
        for batch, *parts in zip(whole, *read, strict=True):
            for i, array in enumerate(batch):
                np.testing.assert_array_equal(array, np.concatenate([part[i] for part in parts]))


@pytest.mark.parametrize("start", [1, 7, 11])
@pytest.mark.parametrize("local", [None, [1, 5], slice(2, 4)])
def test_going_on_from_a_batch_is_as_if_never_interrupted(start: int, local) -> None:
    rows = mixture(numbered([3, 8, 13, 30, 16, 2] * 9), numbered([5] * 40, first=10_001), weights=[2, 1])
    straight = list(islice(batches(rows, 0, 6, local), 14))
    again = mixture(numbered([3, 8, 13, 30, 16, 2] * 9), numbered([5] * 40, first=10_001), weights=[2, 1])
    for batch, resumed in zip(straight[start:], batches(again, start, 6, local), strict=False):
        for a, b in zip(batch, resumed, strict=True):
            np.testing.assert_array_equal(a, b)


def test_batches_may_reach_over_the_end_of_an_epoch() -> None:
    rows = mixture(numbered([16] * 10), weights=[1.0])
    seen = [int(token) for batch in islice(batches(rows, 0, 4), 5) for token in batch.tokens[:, 0]]
    assert sorted(seen) == sorted([*range(1, 161, 16)] * 2)


@pytest.mark.parametrize(
    ("start", "size", "local"), [(0, 0, None), (-1, 4, None), (0, 4, []), (0, 4, [4]), (0, 4, slice(4, 8))]
)
def test_batches_that_cannot_be_are_refused(start: int, size: int, local) -> None:
    rows = mixture(numbered([16] * 10), weights=[1.0])
    with pytest.raises(InputError, match="expected"):
        batches(rows, start, size, local)


def test_an_error_in_a_document_reaches_whoever_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(self, number: int) -> Document:
        raise InputError("record 3: not readable")

    rows = mixture(numbered([16] * 10), weights=[1.0])
    monkeypatch.setattr(MemoryStore, "__getitem__", broken)
    with pytest.raises(InputError, match="record 3"):
        next(batches(rows, 0, 4))


def test_evaluation_is_in_order_once_and_then_padding(tokenizer: Tokenizer, tmp_path: Path) -> None:
    texts = ["alpha", "beta and more", "gamma"]
    files = [write_jsonl(tmp_path / f"{i}.jsonl", [{"text": text}]) for i, text in enumerate(texts)]
    data = DataConfig(sources=(source(files[0]),), eval_sources=tuple(map(source, files)), packing="none")
    rows = open_rows(data, tokenizer, None, 32, evaluation=True)
    assert rows.rows_per_epoch == 3
    for i, text in enumerate(texts):
        row = rows[i]
        assert tokenizer.decode(row.tokens[row.segment_ids > 0].tolist(), skip_special=True) == text
    assert not rows[3].segment_ids.any() and not rows[99].segment_ids.any()
    with pytest.raises(ConfigError, match="eval_sources: empty"):
        open_rows(DataConfig(sources=(source(files[0]),)), tokenizer, None, 32, evaluation=True)


def test_the_fingerprint_knows_what_changes_rows(tokenizer: Tokenizer, tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": "one two"}, {"text": "three"}])

    def fingerprint(length: int = 8, **options) -> str:
        return open_rows(config(sources=[source(path)], **options), tokenizer, None, length).fingerprint

    same = fingerprint()
    other = [fingerprint(9), fingerprint(seed=1), fingerprint(shuffle=False), fingerprint(packing="none")]
    moved = tmp_path / "moved.jsonl"
    moved.write_bytes(path.read_bytes())
    assert open_rows(config(sources=[source(moved)]), tokenizer, None, 8).fingerprint == same
    write_jsonl(path, [{"text": "one two"}, {"text": "threes"}])
    assert len({same, fingerprint(), *other}) == 6


def test_nothing_to_train_on_is_an_error(tokenizer: Tokenizer, tmp_path: Path) -> None:
    empty = write_jsonl(tmp_path / "empty.jsonl", [])
    with pytest.raises(ConfigError, match=r"empty\.jsonl: nothing to train on"):
        open_rows(config(sources=[source(empty)]), tokenizer, None, 8)
    long = write_jsonl(tmp_path / "long.jsonl", [{"text": "word " * 50}])
    with pytest.raises(ConfigError, match="longer than a row of 8"):
        open_rows(config(sources=[source(long)], overlong="drop"), tokenizer, None, 8)
    with pytest.raises(ConfigError, match="length 0"):
        open_rows(config(sources=[source(long)]), tokenizer, None, 0)
