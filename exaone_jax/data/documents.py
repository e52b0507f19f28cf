"""From records to documents: token ids, and which of them are to be learnt. Columns are named as TRL names them."""

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

import numpy as np

from exaone_jax.config.data import SourceConfig
from exaone_jax.data.sources import Record
from exaone_jax.errors import InputError
from exaone_jax.text import TEMPLATE_KWARGS, ChatTemplate, Tokenizer
from exaone_jax.text.turns import encode_turns


class Document(NamedTuple):
    """tokens: int32 `[n]`. loss_mask: bool `[n]`, which of them are to be learnt; None: all."""

    tokens: np.ndarray
    loss_mask: np.ndarray | None


@dataclass
class Counts:
    """What became of records. reasoning_dropped: turns whose reasoning the chat template left out."""

    documents: int = 0
    tokens: int = 0
    learnt_tokens: int = 0
    reasoning_dropped: int = 0

    def add(self, other: "Counts") -> None:
        for name, value in asdict(other).items():
            setattr(self, name, getattr(self, name) + value)


@dataclass(frozen=True)
class Encoder:
    """Makes a document of a record, by the first of these that its columns allow:

    - `messages`: a conversation; the assistant's turns are learnt. `tools` as a list or its JSON.
    - `prompt` and `completion`: two strings, of which the completion and an end token after it are learnt; or two lists of
      messages, of which the assistant's turns in the completion are.
    - the text column: all of it, and an end token after it.

    `chat_template_kwargs` of a record go before those of the configuration. None in a column is a column that is absent.
    """

    tokenizer: Tokenizer
    template: ChatTemplate | None
    source: SourceConfig
    chat_template_kwargs: Mapping[str, bool] = field(default_factory=dict)

    def documents(self, records: Iterable[Record], counts: Counts) -> Iterator[Document]:
        """Raises InputError with file and row where a record cannot be used."""
        for place, record in records:
            try:
                document = self.encode(record, counts)
            except InputError as error:
                raise InputError(f"{place}: {error}") from error
            counts.documents += 1
            counts.tokens += len(document.tokens)
            learnt = document.tokens if document.loss_mask is None else document.loss_mask
            counts.learnt_tokens += len(learnt) if document.loss_mask is None else int(learnt.sum())
            yield document

    def encode(self, record: Mapping[str, Any], counts: Counts) -> Document:
        """Raises InputError where columns are missing, of a wrong type, or hold nothing to learn."""
        columns = {name: value for name, value in record.items() if value is not None}
        if "messages" in columns:
            return self._chat(_list(columns, "messages"), 0, columns, counts)
        if "prompt" in columns or "completion" in columns:
            return self._completion(columns, counts)
        name = self.source.text_column
        if name not in columns:
            found = ", ".join(record) or "none"
            raise InputError(f"columns are {found}; expected messages, prompt and completion, or {name}")
        return Document(np.array([*self._encode_text(columns, name), self._end_id()], np.int32), None)

    def _completion(self, columns: Mapping[str, Any], counts: Counts) -> Document:
        for name, other in (("prompt", "completion"), ("completion", "prompt")):
            if name not in columns:
                raise InputError(f"{name} is missing; it goes with {other}")
        if not isinstance(columns["prompt"], str):
            prompt, completion = _list(columns, "prompt"), _list(columns, "completion")
            return self._chat([*prompt, *completion], len(prompt), columns, counts)
        prompt = self._encode_text(columns, "prompt")
        completion = self._encode_text(columns, "completion")
        if not completion:
            raise InputError("completion: empty; there is nothing to learn")
        if completion[-1] not in self.tokenizer.eos_ids:  # a rendered turn brings its own end
            completion.append(self._end_id())
        tokens = np.array([*prompt, *completion], np.int32)
        return Document(tokens, np.arange(len(tokens)) >= len(prompt))

    def _chat(self, messages: list[Any], given: int, columns: Mapping[str, Any], counts: Counts) -> Document:
        if self.template is None:
            raise InputError("a conversation, and no chat template to render it with")
        own = columns.get("chat_template_kwargs", {})
        if not isinstance(own, Mapping):
            raise InputError(f"chat_template_kwargs: expected an object, found {type(own).__name__}")
        for name in own:
            if name not in TEMPLATE_KWARGS:
                raise InputError(f"chat_template_kwargs: {name!r} is none of {', '.join(TEMPLATE_KWARGS)}")
        kwargs = {**self.chat_template_kwargs, **{name: value for name, value in own.items() if value is not None}}
        tools = columns.get("tools")
        if isinstance(tools, str):
            try:
                tools = json.loads(tools)
            except (ValueError, RecursionError) as error:
                raise InputError(f"tools: not JSON: {error}") from error
        turns = encode_turns(self.tokenizer, messages, self.template, tools=tools, given=given, **kwargs)
        counts.reasoning_dropped += turns.reasoning_dropped
        return Document(np.array(turns.ids, np.int32), np.array(turns.loss_mask, bool))

    def _encode_text(self, columns: Mapping[str, Any], name: str) -> list[int]:
        value = columns[name]
        if not isinstance(value, str):
            raise InputError(f"{name}: expected a string, found {type(value).__name__}")
        return self.tokenizer.encode(value, allow_special=self.source.control_tokens)

    def _end_id(self) -> int:
        if self.tokenizer.eos_id is None:
            raise InputError("this tokenizer names no eos_token to end documents with")
        return self.tokenizer.eos_id


def _list(columns: Mapping[str, Any], name: str) -> list[Any]:
    value = columns[name]
    if not isinstance(value, list):
        raise InputError(f"{name}: expected a list of messages, found {type(value).__name__}")
    return value
