from itertools import pairwise

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from exaone_jax.errors import InputError
from exaone_jax.text import ReasoningSplitter


def split(pieces, starts_in_reasoning=True, generation="k"):
    splitter = ReasoningSplitter(generation, starts_in_reasoning)
    parts = [splitter.feed(piece) for piece in pieces] + [splitter.flush()]
    return "".join(part.reasoning for part in parts), "".join(part.content for part in parts)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("hmm\n</think>\n\nANS", ("hmm", "ANS")),
        ("hmm</think>ANS", ("hmm", "ANS")),
        ("hmm\n\n</think>\nANS\n", ("hmm\n", "ANS\n")),
        ("\n</think>\n\nANS", ("", "ANS")),
        ("</think>\n\n\nANS", ("", "\nANS")),
        ("<think>\nhmm\n</think>\n\nANS", ("hmm", "ANS")),
        ("\n <think>hmm\n</think>\n\nANS", ("hmm", "ANS")),
        ("<think><think>hmm</think>ANS", ("<think>hmm", "ANS")),
        ("a <think> b</think>ANS", ("a <think> b", "ANS")),
        ("hmm</think>say </think> and <think>", ("hmm", "say </think> and <think>")),
        ("never ends\n", ("never ends\n", "")),
        ("cut at </thin", ("cut at </thin", "")),
        ("<think>", ("", "")),
        ("<thi", ("<thi", "")),
        ("", ("", "")),
    ],
)
def test_thinking_on(text, expected):
    assert split([text]) == expected
    assert split(list(text)) == expected


def test_thinking_off_is_never_searched():
    text = "<think>\nno\n</think>\n\nyes"
    assert split([text], starts_in_reasoning=False) == ("", text)
    assert split(["[|a|]"], starts_in_reasoning=False, generation="3") == ("", "[|a|]")


def test_deep_has_its_own_markers():
    assert split(["hm\n</thought>\n\nA</think>"], generation="deep") == ("hm", "A</think>")


def test_a_generation_without_reasoning():
    with pytest.raises(InputError, match="no reasoning"):
        ReasoningSplitter("3", True)


def test_nothing_is_held_back_longer_than_needed():
    splitter = ReasoningSplitter("k", True)
    assert splitter.feed("생각 <")[0] == "생각 "
    assert splitter.feed("b")[0] == "<b"
    assert splitter.in_reasoning
    assert splitter.feed("\n</think>\n\n답") == ("", "답")
    assert not splitter.in_reasoning
    assert splitter.feed("<") == ("", "<")


ALPHABET = st.sampled_from(["\n", "<think>", "</think>", "<", "</", "think>", " ", "가", "x"])


@settings(max_examples=400, deadline=None)
@given(words=st.lists(ALPHABET, max_size=12), cuts=st.sets(st.integers(0, 80)), starts=st.booleans())
@example(words=["<think>", "\n", "</think>", "\n", "\n", "\n"], cuts=set(range(80)), starts=True)
def test_streaming_equals_whole_over_every_cut(words, cuts, starts):
    text = "".join(words)
    places = sorted({0, len(text), *(cut for cut in cuts if cut < len(text))})
    pieces = [text[i:j] for i, j in pairwise(places)]
    assert split(pieces, starts) == split([text], starts)
    assert split(list(text), starts) == split([text], starts)
