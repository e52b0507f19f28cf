"""The process of `grammar_rehearsal`: compiles what it is told on stdin and says so on stdout, if it survives.

First line: the vocabulary, and how many seconds a grammar may take. Then a grammar a line. It is run as a file, and nothing
of this package is imported.
"""

import json
import os
import resource
import signal
import sys
import threading
from typing import Any

from llguidance import LLMatcher, LLTokenizer, TokenizerWrapper

_MEMORY = 4 << 30  # bytes of address space
_STACK = 1 << 20  # an eighth of what threads have elsewhere, so what fits here fits there


class _Words:
    """A vocabulary as llguidance's wrapper wants it. Texts are never encoded with it, only spelled in bytes."""

    bos_token_id = None

    def __init__(self, tokens: list[str], special: list[int], end: int):
        self.tokens = [bytes.fromhex(token) for token in tokens]
        self.special_token_ids, self.eos_token_id = special, end
        self._of_byte = {token: i for i, token in enumerate(self.tokens) if len(token) == 1}

    def __call__(self, text: str | bytes) -> list[int]:
        raw = text.encode() if isinstance(text, str) else text
        return [self._of_byte[bytes([byte])] for byte in raw if bytes([byte]) in self._of_byte]


def rehearse(tokenizer: LLTokenizer, kind: str, text: str) -> None:
    """As `grammar` compiles; an error that llguidance tells is no concern of this process."""
    read: dict[str, Any] = {
        "json_schema": LLMatcher.grammar_from_json_schema,
        "regex": LLMatcher.grammar_from_regex,
        "lark": LLMatcher.grammar_from_lark,
    }
    try:
        matcher = LLMatcher(tokenizer, read[kind](text), log_level=0)
    except ValueError:
        return
    matcher.compute_bitmask()


def _answer(word: str) -> None:
    sys.stdout.write(word + "\n")
    sys.stdout.flush()


def main() -> None:
    os.nice(5)
    resource.setrlimit(resource.RLIMIT_AS, (_MEMORY, _MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    vocabulary = json.loads(sys.stdin.readline())
    ends, seconds = vocabulary.pop("ends"), vocabulary.pop("seconds")
    tokenizer = LLTokenizer(TokenizerWrapper(_Words(**vocabulary, end=ends[0])), eos_token=ends)
    threading.stack_size(_STACK)
    _answer("ready")
    for line in sys.stdin:
        signal.alarm(seconds)  # unhandled, so it ends the process, whatever that does
        thread = threading.Thread(target=rehearse, args=(tokenizer, *json.loads(line)))
        thread.start()
        thread.join()
        signal.alarm(0)
        _answer("done")


if __name__ == "__main__":
    main()
