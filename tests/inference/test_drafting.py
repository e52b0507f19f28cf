"""How many drafts are worth their cost."""

import pytest

from exaone_jax.inference.drafting import _LOOK, Drafting
from exaone_jax.inference.engine import EngineConfig, _buckets, _programs


def chosen(kept: list[float], running: int, *, free_rows: int = 256, draft_cost: float = 0.05) -> int:
    drafting = Drafting(len(kept), free_rows=free_rows, draft_cost=draft_cost)
    drafting.kept = kept
    drafting._steps = 1
    return drafting.choose(running)


@pytest.mark.parametrize(
    ("kept", "running", "drafts"),
    [
        ([0.8, 0.6, 0.5], 1, 3),  # rows are free
        ([0.8, 0.6, 0.01], 1, 2),  # the third says less than it costs to draft
        ([0.02, 0.0, 0.0], 1, 0),
        ([0.8, 0.6, 0.5], 64, 3),  # 256 rows
        ([0.8, 0.6, 0.5], 128, 1),  # 256 rows; 384 would say 2.4 / 1.8 as much
        ([0.8, 0.6, 0.5], 1000, 0),  # each row costs as much as a token
        ([1.0, 1.0, 1.0], 1000, 0),  # and no draft is better than the token itself
        ([], 5, 0),
    ],
)
def test_the_best_ratio_of_tokens_to_cost(kept: list[float], running: int, drafts: int):
    assert chosen(kept, running) == drafts


def test_what_was_seen_is_what_is_reckoned_with():
    drafting = Drafting(2, free_rows=8, draft_cost=0.1)
    for i in range(2000):
        drafting.saw(2, [2, 1, 0, 0][i % 4])
    assert drafting.kept == pytest.approx([0.5, 0.25], abs=0.02)
    before = drafting.kept[1]
    for _ in range(2000):
        drafting.saw(1, 1)
    assert drafting.kept == [pytest.approx(1.0, abs=1e-3), before], "of what was not drafted nothing is known"


def test_all_drafts_are_tried_again():
    """Else a stretch in which none is kept would be the end of drafting."""
    drafting = Drafting(2, free_rows=8, draft_cost=0.1)
    drafting.kept = [0.0, 0.0]
    steps = [drafting.choose(4) for _ in range(3 * _LOOK)]
    assert [i for i, drafts in enumerate(steps) if drafts] == [
        0,
        *(n * _LOOK + i for n in (1, 2) for i in (-1, 0)),
        3 * _LOOK - 1,
    ]
    assert set(steps) == {0, 2}


@pytest.mark.parametrize(("requests", "rows"), [(8, 24), (32, 512), (5, 16), (1, 3), (16, 384)])
@pytest.mark.parametrize("fused", [1, 4])
def test_there_is_a_program_for_every_step(requests: int, rows: int, fused: int):
    """With prompts for as many rows as a step has; and to decode, whatever the drafts, no more rows than it takes."""
    settings = EngineConfig(max_requests=requests, rows_per_step=rows, draft_tokens=2)
    programs = _programs(settings, _buckets(settings), fused, fewer_drafts=True)
    assert (1, 2, rows, requests) in programs and programs == sorted(set(programs))
    counts = sorted({a for *_, a in programs})
    for drafts in range(3):
        for steps in {1, fused}:
            own = [(n, a) for s, d, n, a in programs if (s, d) == (steps, drafts)]
            assert [min(n for n, a in own if a == each) for each in counts] == [each * (drafts + 1) for each in counts]
