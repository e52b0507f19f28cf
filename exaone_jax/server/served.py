"""The model that is served, and one HTTP request's work on it."""

import asyncio
import contextlib
import secrets
import time
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass, field

from exaone_jax.errors import InputError
from exaone_jax.inference.engine import Engine, Update
from exaone_jax.inference.replicas import Replicas
from exaone_jax.inference.sampling import SamplingParams, sampling_params
from exaone_jax.inference.service import OnUpdate, OverloadedError, Service
from exaone_jax.server.errors import ApiError, grammar_of, refused
from exaone_jax.server.metrics import Metrics
from exaone_jax.server.protocol import Generation
from exaone_jax.text import ChatTemplate, Tokenizer

_SEEDS = 2**32
_NEXT_SEED = 0x9E3779B1  # odd, so that the seeds of a request's choices differ

_PASSED_ON = (
    "temperature",
    "top_p",
    "min_p",
    "presence_penalty",
    "frequency_penalty",
    "repetition_penalty",
    "ignore_eos",
)
_PASSED_ON += ("stop_token_ids", "min_tokens", "prompt_logprobs")


@dataclass(frozen=True)
class Served:
    """What every request needs.

    names: the model's; the first is told in answers. engines: all alike, which `service` runs. template: None where the
    checkpoint cannot chat, and no_chat says why. defaults: sampling fields that requests do not give. request_seconds: a
    request's deadline; None: none. most_choices: of a request, n for each of its prompts.
    """

    names: tuple[str, ...]
    engines: Sequence[Engine]
    service: Service | Replicas
    template: ChatTemplate | None
    no_chat: str = ""
    defaults: dict[str, object] = field(default_factory=dict)
    request_seconds: float | None = None
    most_choices: int = 256
    created: int = field(default_factory=lambda: int(time.time()))
    metrics: Metrics = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "metrics", Metrics(self.engines, self.names[0]))

    @property
    def engine(self) -> Engine:
        """One for what they have in common."""
        return self.engines[0]

    @property
    def max_length(self) -> int:
        return self.engine.max_length

    @property
    def tokenizer(self) -> Tokenizer:
        """Raises ApiError where there is none."""
        if self.engine.tokenizer is None:
            raise ApiError(
                400,
                "this checkpoint has no tokenizer: only /v1/completions with token ids as prompt is served",
                code="no_tokenizer",
            )
        return self.engine.tokenizer

    @property
    def chat_template(self) -> ChatTemplate:
        """Raises ApiError where there is none."""
        if self.template is None:
            raise ApiError(400, f"this checkpoint cannot chat: {self.no_chat}", code="no_chat_template")
        return self.template

    def check_model(self, name: str | None) -> str:
        """The name to answer with; raises ApiError for one that is not served."""
        if name is not None and name not in self.names:
            known = ", ".join(self.names)
            raise ApiError(
                404, f"model: {name!r} is not served here; expected {known}", param="model", code="model_not_found"
            )
        return name or self.names[0]

    def sampling(
        self, asked: Generation, prompt_tokens: int, max_tokens: int | None, **more: object
    ) -> list[SamplingParams]:
        """The parameters of each of a request's n choices. max_tokens None: what the context has room for.

        Raises InputError and ApiError.
        """
        room = self.max_length - prompt_tokens
        if room < 1 or (max_tokens or 0) > room:
            wanted = f" and {max_tokens} to be generated" if max_tokens else ""
            raise ApiError(
                400,
                f"the prompt has {prompt_tokens} tokens{wanted}, and this model's context is {self.max_length} tokens",
                param="messages" if hasattr(asked, "messages") else "prompt",
                code="context_length_exceeded",
            )
        given = {name: getattr(asked, name) for name in _PASSED_ON}
        fields = self.defaults | {name: value for name, value in (given | more).items() if value is not None}
        if asked.top_k is not None:
            fields["top_k"] = max(0, asked.top_k)
        if asked.stop:
            fields["stop"] = (asked.stop,) if isinstance(asked.stop, str) else tuple(asked.stop)
        if asked.logit_bias:
            fields["logit_bias"] = {int(token): bias for token, bias in asked.logit_bias.items()}
        seed = secrets.randbelow(_SEEDS) if asked.seed is None else asked.seed
        seeds = [(seed + i * _NEXT_SEED) % _SEEDS for i in range(asked.n or 1)]
        fields["max_new_tokens"] = max_tokens or room
        return [sampling_params(**fields, seed=each) for each in seeds]


@dataclass
class Usage:
    """Tokens of a request so far; a prompt counts once, however many choices it has."""

    prompt_tokens: int
    cached_tokens: int = 0
    completion_tokens: int = 0
    reasoning_tokens: int = 0

    def to_dict(self) -> dict[str, object]:
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": self.prompt_tokens + self.completion_tokens,
            "prompt_tokens_details": {"cached_tokens": self.cached_tokens},
            "completion_tokens_details": {"reasoning_tokens": self.reasoning_tokens},
        }


@dataclass(frozen=True)
class Ask:
    """One sequence for the engine: token ids and how to go on from them."""

    prompt: Sequence[int]
    params: SamplingParams


class Job:
    """The sequences of one HTTP request; their updates come through one queue. Always `close` it.

    form: the field of the request that a grammar comes from, if one does. Raises ApiError for more sequences than the server
    ever takes.
    """

    def __init__(self, served: Served, asks: Sequence[Ask], *, cache_salt: str | None = None, form: str | None = None):
        if len(asks) > served.most_choices:
            raise refused("n", f"{len(asks)} choices in all, and a request has at most {served.most_choices}")
        self._served, self.asks, self._salt, self._form = served, asks, cache_salt or "", form
        self._loop = asyncio.get_running_loop()
        self._updates = asyncio.Queue[tuple[int, Update | Exception]]()
        self._numbers: list[int] = []
        self._open = set(range(len(asks)))
        self._closed = False
        self.last_heard: dict[int, float] = {}  # sequence -> when it last had tokens, of time.monotonic
        seconds = served.request_seconds
        self.deadline = None if seconds is None else self._loop.time() + seconds
        prompts = {id(ask.prompt): len(ask.prompt) for ask in asks}
        self.usage = Usage(sum(prompts.values()))
        self.finish_reasons: list[str] = []

    async def submit(self) -> None:
        """Queue all of them, or none. Raises as Service.submit."""
        try:
            with grammar_of(self._form):
                await asyncio.to_thread(self._submit)  # reading a prompt of 256K tokens takes a while
        except BaseException as error:
            if isinstance(error, OverloadedError):
                self._served.metrics.rejected("queue_full")
            self.close()
            raise

    def _submit(self) -> None:
        for index, ask in enumerate(self.asks):
            if self._closed:
                break
            tell = self._listener(index)
            self._numbers.append(self._served.service.submit(ask.prompt, ask.params, tell, cache_salt=self._salt))
        if self._closed:
            self._cancel_all()  # left while this thread was submitting

    def _listener(self, index: int) -> OnUpdate:
        def tell(update: Update | Exception) -> None:
            with contextlib.suppress(RuntimeError):  # the loop is closed, and nobody listens any more
                self._loop.call_soon_threadsafe(self._updates.put_nowait, (index, update))

        return tell

    async def updates(self) -> AsyncGenerator[tuple[int, Update]]:
        """(index of the sequence, what is new), until all have ended. Raises EngineDiedError, and ApiError for an error."""
        while self._open:
            index, update = await self._updates.get()
            if isinstance(update, Exception):
                raise update
            self._count(index, update)
            if update.finish_reason == "error":
                raise ApiError(500, update.error, code="generation_failed")
            yield index, update

    def cancel(self, index: int) -> None:
        """End one sequence; its last update says "cancelled"."""
        self._served.service.cancel(self._numbers[index])

    def close(self) -> None:
        """End what has not ended. May be called again."""
        if not self._closed:
            self._closed = True
            self._served.metrics.ended("abort", len(self._open))
            self._cancel_all()

    def _cancel_all(self) -> None:
        for number in self._numbers if self._open else ():
            self._served.service.cancel(number)

    def _count(self, index: int, update: Update) -> None:
        self.usage.completion_tokens += len(update.tokens)
        self._served.metrics.heard(self, index, update)
        if update.finish_reason is not None:
            self._open.discard(index)
            self.finish_reasons.append(update.finish_reason)
            if update.summary is not None and all(
                self.asks[i].prompt is not self.asks[index].prompt for i in range(index)
            ):
                self.usage.cached_tokens += update.summary.cached_tokens


def token_text(tokenizer: Tokenizer, token: int) -> str:
    """A token as people read it; bytes that are no whole characters as `bytes:\\xed\\x95`."""
    raw = tokenizer.token_bytes(token)
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)


def check_ids(ids: Sequence[int], vocab_size: int, name: str) -> None:
    """Raises InputError for an id outside the vocabulary."""
    if wrong := [token for token in ids if not 0 <= token < vocab_size]:
        raise InputError(f"{name}: token id {wrong[0]}, expected ids in [0, {vocab_size})")
