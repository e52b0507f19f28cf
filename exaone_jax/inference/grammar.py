"""Constrained decoding: which tokens may come next, so that a text is JSON, matches a regular expression or obeys a grammar.

The grammars are llguidance's, which is needed only when the first one is used: `pip install 'exaone-jax[serve]'`.
"""

import json
import threading
from collections import OrderedDict
from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from exaone_jax.errors import InputError
from exaone_jax.inference.grammar_rehearsal import Rehearsal
from exaone_jax.text import Tokenizer

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

_REMEMBERED = 64  # compiled grammars
_LONGEST = 1 << 19  # characters of one

Kind = Literal["json_schema", "regex", "lark"]


class Grammar(BaseModel):
    """What a text must obey; it ends only where it does.

    kind, text: a JSON schema, a regular expression (that matches all of the text) or a Lark grammar.
    start_after: the id of a token, such as `</think>`, before which anything may be said but an end; None: from the start.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Kind
    text: str
    start_after: int | None = Field(default=None, ge=0, lt=2**31)

    @classmethod
    def json_schema(cls, schema: str | Mapping[str, Any] | bool, start_after: int | None = None) -> "Grammar":
        """JSON of a schema. Raises InputError where it is not JSON itself."""
        try:
            parsed = json.loads(schema) if isinstance(schema, str) else schema
            text = json.dumps(parsed, ensure_ascii=False, allow_nan=False)
        except (ValueError, TypeError, RecursionError) as error:
            raise InputError(f"grammar: the schema is not JSON: {error}") from error
        if not isinstance(parsed, Mapping | bool):
            raise InputError(f"grammar: a JSON schema is an object, found {type(parsed).__name__}")
        return cls(kind="json_schema", text=text, start_after=start_after)

    @classmethod
    def json_object(cls, start_after: int | None = None) -> "Grammar":
        """Any JSON object."""
        return cls.json_schema({"type": "object"}, start_after)

    @classmethod
    def regex(cls, pattern: str, start_after: int | None = None) -> "Grammar":
        """What a regular expression matches, in Rust's syntax: without look-around and back-references."""
        return cls(kind="regex", text=pattern, start_after=start_after)

    @classmethod
    def lark(cls, grammar: str, start_after: int | None = None) -> "Grammar":
        """What a grammar in llguidance's variant of Lark derives from its rule `start`."""
        return cls(kind="lark", text=grammar, start_after=start_after)

    @classmethod
    def choice(cls, options: Sequence[str], start_after: int | None = None) -> "Grammar":
        """One of several texts. Raises InputError where there is none, or something else than a text."""
        if not options or not all(isinstance(option, str) for option in options):
            raise InputError(f"grammar: a choice needs at least one text and nothing else; found {options!r}")
        return cls.lark("start: " + " | ".join(json.dumps(o, ensure_ascii=False) for o in options), start_after)


class Constraint:
    """Where one request stands in its grammar.

    error: why its grammar cannot be followed any further; empty as long as it can.
    """

    def __init__(self, matcher: "LLMatcher", start_after: int | None, ends: Collection[int]):
        self._matcher, self._start_after, self._ends = matcher, start_after, sorted(ends)
        self._started = start_after is None
        self.error = ""

    def advance(self, tokens: Sequence[int]) -> None:
        """Take note of tokens that were said."""
        for token in tokens:
            if self._started:
                self._matcher.consume_token(token)
            self._started = self._started or token == self._start_after
        self._check()

    def masks(self, drafts: Sequence[int], masks: np.ndarray) -> None:
        """Write which tokens may be said, and which if the drafts are: uint32 `[k + 1, W]`, bit i % 32 of word i // 32 for
        token i. A row after a draft that may not be said is left as it is: nobody needs it."""
        started, consumed = self._started, 0
        for row, draft in zip(masks, [*drafts, None], strict=True):
            if started:
                bits = np.frombuffer(self._matcher.compute_bitmask(), np.uint32)[: len(row)]
                row[: len(bits)], row[len(bits) :] = bits, 0
            else:
                row[:] = np.iinfo(np.uint32).max
                for end in self._ends:
                    row[end // 32] &= ~np.uint32(1 << end % 32)
            if draft is None or draft in self._ends:
                break
            if started:
                if not self._matcher.try_consume_tokens([draft]):
                    break
                consumed += 1
            started = started or draft == self._start_after
        if consumed:
            self._matcher.rollback(consumed)
        self._check()

    def _check(self) -> None:
        if self._matcher.is_error() and not self.error:
            self.error = f"grammar: {_brief(self._matcher.get_error())}"


class Grammars:
    """Compiles grammars for a tokenizer and remembers the latest. Any thread may use it.

    Args:
        vocab: the number of logits; at least the tokenizer's size.
        ends: the token ids that end a text.
    """

    def __init__(self, tokenizer: Tokenizer, vocab: int, ends: Collection[int]):
        self._tokenizer, self._vocab, self._ends = tokenizer, vocab, sorted(e for e in ends if e < vocab)
        self._lock = threading.Lock()
        self._words: tuple[LLTokenizer, Rehearsal] | None = None
        self._compiled: OrderedDict[tuple[Kind, str], LLMatcher] = OrderedDict()

    def constraint(self, grammar: Grammar) -> Constraint:
        """The beginning of a text that obeys a grammar. Raises InputError where there is none, with llguidance's reason."""
        if grammar.start_after is not None and grammar.start_after >= self._vocab:
            raise InputError(f"grammar: start_after is token id {grammar.start_after}, and there are {self._vocab}")
        if len(grammar.text) > _LONGEST:
            raise InputError(f"grammar: {len(grammar.text)} characters long; at most {_LONGEST}")
        key = grammar.kind, grammar.text
        with self._lock:
            words, rehearsal = self._words = self._words or self._build()
            matcher = self._compiled.get(key)
        if matcher is None:
            rehearsal.check(*key)  # outside of the lock: it may take a while
            matcher = _compile(words, grammar)
        with self._lock:
            self._compiled[key] = matcher
            self._compiled.move_to_end(key)
            if len(self._compiled) > _REMEMBERED:
                self._compiled.popitem(last=False)
            return Constraint(matcher.deep_copy(), grammar.start_after, self._ends)

    def _build(self) -> "tuple[LLTokenizer, Rehearsal]":
        """The vocabulary as llguidance sees it. Control tokens are none of any text's."""
        try:
            from llguidance import LLTokenizer, TokenizerWrapper
        except ModuleNotFoundError as error:
            raise InputError("a grammar needs llguidance: pip install 'exaone-jax[serve]'") from error
        if not self._ends:
            raise InputError("a grammar needs a token that ends the text, and this model names none")
        words = _Words(self._tokenizer, self._vocab, self._ends[0])
        rehearsal = Rehearsal(words.tokens, words.special_token_ids, self._ends)
        return LLTokenizer(TokenizerWrapper(words), eos_token=self._ends), rehearsal


class _Words:
    """A tokenizer as llguidance's wrapper wants it."""

    bos_token_id = None

    def __init__(self, tokenizer: Tokenizer, vocab: int, end: int):
        def spelled(token: int) -> bytes:
            return b"" if tokenizer.id_to_token(token) is None else tokenizer.token_bytes(token)

        self._encode = tokenizer.encode
        self.eos_token_id = end
        self.tokens = [spelled(token) for token in range(vocab)]
        self.special_token_ids = sorted(token for token in tokenizer.control_tokens.values() if token < vocab)

    def __call__(self, text: str) -> list[int]:
        return self._encode(text)


def _compile(words: "LLTokenizer", grammar: Grammar) -> "LLMatcher":
    from llguidance import LLMatcher

    read = {
        "json_schema": LLMatcher.grammar_from_json_schema,
        "regex": LLMatcher.grammar_from_regex,
        "lark": LLMatcher.grammar_from_lark,
    }[grammar.kind]
    try:
        matcher = LLMatcher(words, read(grammar.text), log_level=0)
    except ValueError as error:
        raise InputError(f"grammar: {_brief(str(error))}") from error
    matcher.compute_bitmask()  # what it finds too large to follow from the first token on is the caller's to hear of
    if matcher.is_error():
        raise InputError(f"grammar: {_brief(matcher.get_error())}")
    return matcher


def check_regex(pattern: str) -> None:
    """Raises InputError for what is no regular expression by itself, with llguidance's reason."""
    try:
        from llguidance import LLMatcher
    except ModuleNotFoundError as error:
        raise InputError("a grammar needs llguidance: pip install 'exaone-jax[serve]'") from error
    if problem := LLMatcher.validate_grammar(LLMatcher.grammar_from_regex(pattern)):
        raise InputError(f"grammar: {_brief(problem)}")


def _brief(message: str) -> str:
    """The reason, without what llguidance adds of its own state."""
    return message.partition("<state>")[0].strip()
