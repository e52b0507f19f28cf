"""Prompts in, text out: whole or streamed, with stop strings, from text, token ids or a conversation."""

import dataclasses
import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from weakref import WeakKeyDictionary

from exaone_jax.errors import CheckpointError, InputError
from exaone_jax.inference.generate import Decoding, FinishReason, TokenOutput
from exaone_jax.inference.sampling import SamplingParams, sampling_params
from exaone_jax.model import Transformer
from exaone_jax.text import ChatTemplate, EncodedChat, IncrementalDecoder, Tokenizer, encode_chat
from exaone_jax.text.markers import held_back
from exaone_jax.text.response import Event, ResponseParser

_ROUNDS_BETWEEN_LOOKS = 8  # rounds on the device between two looks for stop strings

# Fields that generation_config.json and SamplingParams share.
_RECOMMENDED = ("temperature", "top_k", "top_p", "min_p", "presence_penalty", "frequency_penalty", "repetition_penalty")

_SOURCES: WeakKeyDictionary[Transformer, Path] = WeakKeyDictionary()

Prompt = str | Sequence[int]


@dataclasses.dataclass(frozen=True)
class Completion:
    """What a model wrote after one prompt.

    text: without special tokens, up to a stop string if one came. tokens: its ids, a final stop id or those of a stop
    string included.
    drafted, accepted: rounds that drafted, and for each draft of a round how often it was kept.
    """

    text: str
    tokens: list[int]
    prompt_tokens: int
    finish_reason: FinishReason
    drafted: int = 0
    accepted: tuple[int, ...] = ()

    def to_dict(self) -> dict[str, object]:
        return dataclasses.asdict(self)


class StopStrings:
    """Passes text on until a stop string comes, holding back an end that may be the beginning of one."""

    def __init__(self, stop: Sequence[str]):
        self._stop, self._held = tuple(stop), ""
        self._passed = 0  # characters held back in which no stop string may end
        self.stopped = False

    def feed(self, text: str, *, may_stop: bool = True) -> str:
        """What can be shown of the text so far and not shown yet. may_stop: a stop string may be complete in this piece."""
        if self.stopped:
            return ""
        self._held += text
        if not may_stop:
            self._passed = len(self._held)
        # The stop string that is complete first, so that the text does not depend on how it was cut into pieces.
        found = [(place + len(s), place) for s in self._stop if (place := self._find(s)) >= 0]
        if found:
            self.stopped = True
            shown, self._held = self._held[: min(found)[1]], ""
            return shown
        keep = held_back(self._held, *self._stop)
        shown, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
        self._passed = max(0, self._passed - len(shown))
        return shown

    def _find(self, stop: str) -> int:
        """The first place of a stop string that ends in what may stop."""
        return self._held.find(stop, max(0, self._passed + 1 - len(stop)))

    def flush(self) -> str:
        held, self._held = self._held, ""
        return held


class TextRow:
    """The text of one row as its tokens come.

    stop: texts that end it, from the token of index min_tokens on. unsaid: tokens that have no text, as they end it.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str], *, min_tokens: int = 0, unsaid: Collection[int] = ()):
        self._decoder, self._stops = IncrementalDecoder(tokenizer, skip_special=True), StopStrings(stop)
        self._min_tokens, self._unsaid = min_tokens, unsaid
        self.used = 0  # tokens read, up to the one that completes a stop string
        self.text = ""

    @property
    def stopped(self) -> bool:
        return self._stops.stopped

    def feed(self, new: Sequence[int]) -> str:
        """The further text, with these tokens."""
        pieces = []
        for token in new:
            if self.stopped:
                break
            text = "" if token in self._unsaid else self._decoder.feed(token)
            pieces.append(self._stops.feed(text, may_stop=self.used >= self._min_tokens))
            self.used += 1
        self.text += (said := "".join(pieces))
        return said

    def flush(self) -> str:
        new = self._stops.feed(self._decoder.flush()) + self._stops.flush()
        self.text += new
        return new


def complete(
    model: Transformer,
    tokenizer: Tokenizer,
    prompts: Sequence[Prompt],
    params: SamplingParams | Sequence[SamplingParams],
    draft_tokens: int = 0,
) -> list[Completion]:
    """Complete every prompt, together in one batch.

    Args:
        prompts: texts (in which spelled control tokens stay text) or token ids.
        params: of all rows, or one of each.
        draft_tokens: tokens the MTP layer proposes each round; 0: none.

    Raises InputError as `Decoding`.
    """
    ids = [tokenizer.encode(prompt) if isinstance(prompt, str) else list(prompt) for prompt in prompts]
    each = [params] * len(ids) if isinstance(params, SamplingParams) else list(params)
    decoding = Decoding(model, ids, each, draft_tokens, _stop_ids(model, tokenizer))
    rows = [TextRow(tokenizer, p.stop) for p in each]
    rounds = _ROUNDS_BETWEEN_LOOKS if any(p.stop for p in each) else 1 << 30
    _look(decoding, rows)
    while not decoding.finished:
        decoding.advance(rounds)
        _look(decoding, rows)
    for row in rows:
        row.flush()
    return [_completion(row, out, len(prompt)) for row, out, prompt in zip(rows, decoding.outputs(), ids, strict=True)]


def stream(
    model: Transformer, tokenizer: Tokenizer, prompt: Prompt, params: SamplingParams, draft_tokens: int = 0
) -> Iterator[str]:
    """The text of `complete` for one prompt in pieces, as it comes. Closing the iterator ends the decoding."""
    ids = tokenizer.encode(prompt) if isinstance(prompt, str) else list(prompt)
    decoding = Decoding(model, [ids], [params], draft_tokens, _stop_ids(model, tokenizer))
    row = TextRow(tokenizer, params.stop)
    while True:
        if new := row.feed(decoding.tokens()[0][row.used :]):
            yield new
        if row.stopped or decoding.finished:
            break
        decoding.advance(1)
    if last := row.flush():
        yield last


def generate(
    model: Transformer,
    prompt: str | Sequence[str],
    *,
    tokenizer: Tokenizer | None = None,
    draft_tokens: int = 0,
    **sampling: object,
) -> str | list[str]:
    """Text that follows a prompt, or each of several.

    Args:
        model: from `exaone_jax.load`.
        prompt: a text, or several that are completed in one batch.
        tokenizer: None: the one beside the weights the model was loaded from.
        draft_tokens: tokens the MTP layer proposes each round; 0: none.
        sampling: fields of SamplingParams: max_new_tokens, temperature, top_k, top_p, min_p, penalties, seed, stop.

    Raises InputError for a prompt or parameter that cannot be served.
    """
    tokenizer = tokenizer or tokenizer_of(model)
    if not isinstance(prompt, Sequence):
        raise InputError(f"prompt must be a text or several; found {prompt!r}")
    prompts = [prompt] if isinstance(prompt, str) else list(prompt)
    if wrong := [item for item in prompts if not isinstance(item, str)]:
        raise InputError(f"prompt must be a text or several; found {wrong[0]!r} (`complete` takes token ids)")
    texts = [c.text for c in complete(model, tokenizer, prompts, sampling_params(**sampling), draft_tokens)]
    return texts[0] if isinstance(prompt, str) else texts


def stream_chat(
    model: Transformer,
    tokenizer: Tokenizer,
    template: ChatTemplate,
    messages: Sequence[Mapping[str, object]],
    params: SamplingParams,
    *,
    tools: Sequence[Mapping[str, object]] | None = None,
    enable_thinking: bool | None = None,
    draft_tokens: int = 0,
) -> Iterator[Event]:
    """The model's next turn of a conversation: pieces of reasoning and answer, and tool calls where tools are offered.

    enable_thinking: None: what the model's generation does by default. A turn ends where the context does.
    """
    prompt: EncodedChat = encode_chat(tokenizer, messages, template, tools=tools, enable_thinking=enable_thinking)
    room = model.config.max_position_embeddings - len(prompt.ids)
    if 0 < room < params.max_new_tokens:
        params = params.model_copy(update={"max_new_tokens": room})
    parser = ResponseParser(template.rules, starts_in_reasoning=prompt.starts_in_reasoning, tools=tools)
    for text in stream(model, tokenizer, prompt.ids, params, draft_tokens):
        yield from parser.feed(text)
    yield from parser.flush()


def remember_source(model: Transformer, path: Path) -> None:
    """Note where a model's weights came from. Not an attribute: two checkpoints of one shape share compiled programs."""
    _SOURCES[model] = path


def tokenizer_of(model: Transformer) -> Tokenizer:
    """The tokenizer beside the weights that a model was loaded from; raises InputError for a model made in memory."""
    if model not in _SOURCES:
        raise InputError("this model was not loaded from a checkpoint: pass tokenizer=")
    return Tokenizer.from_directory(_SOURCES[model])


def recommended_sampling(model: Transformer) -> dict[str, object]:
    """Sampling fields that the generation_config.json beside a model's weights sets; none where there is no such file.

    Raises CheckpointError where it is not a JSON object.
    """
    file = _SOURCES[model] / "generation_config.json" if model in _SOURCES else None
    if file is None or not file.is_file():
        return {}
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{file}: not JSON: {error}") from error
    if not isinstance(found, dict):
        raise CheckpointError(f"{file}: found {type(found).__name__}, expected an object")
    if found.get("do_sample") is False:
        return {"temperature": 0.0}
    sampled = {"temperature": 1.0} if found.get("do_sample") else {}
    return sampled | {name: found[name] for name in _RECOMMENDED if found.get(name) is not None}


def _stop_ids(model: Transformer, tokenizer: Tokenizer) -> tuple[int, ...]:
    return tuple(dict.fromkeys((*model.config.eos_token_ids, *tokenizer.eos_ids)))


def _look(decoding: Decoding, rows: Sequence[TextRow]) -> None:
    """Read what is new and end the rows whose stop string came."""
    for index, (row, tokens) in enumerate(zip(rows, decoding.tokens(), strict=True)):
        row.feed(tokens[row.used :])
        if row.stopped:
            decoding.stop(index)


def _completion(row: TextRow, out: TokenOutput, prompt_tokens: int) -> Completion:
    reason: FinishReason = "stop" if row.stopped else out.finish_reason
    return Completion(row.text, out.tokens[: row.used], prompt_tokens, reason, out.drafted, out.accepted)
