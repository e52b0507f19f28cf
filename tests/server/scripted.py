"""The app around an engine that says what it is told to: what is tested is how the server tells it."""

import itertools
import threading
from collections.abc import Callable, Sequence
from typing import Any

import httpx

from exaone_jax.inference.engine import Load, Stats, Summary, Update
from exaone_jax.inference.sampling import SamplingParams
from exaone_jax.inference.text import TextRow
from exaone_jax.server.app import make_app
from exaone_jax.server.guard import Guard
from exaone_jax.server.served import Served
from exaone_jax.text import ChatTemplate, Tokenizer
from tests.server.checkpoints import random_config, tokenizer


class ScriptedEngine:
    """The parts of an engine that the server reads."""

    def __init__(self, tokenizer: Tokenizer | None, max_length: int):
        self.tokenizer, self.max_length, self.stats = tokenizer, max_length, Stats()
        self.config = random_config()

    def load(self) -> Load:
        return Load(0, 0, {None: 0.0})


class ScriptedService:
    """Says `texts`, one a request and over again, each cut into updates of so many tokens; then that it stopped."""

    alive, stuck = True, ""

    def __init__(self, texts: Sequence[str], tokens_per_update: int = 1):
        self._texts, self._cut = itertools.cycle(texts), tokens_per_update
        self._numbers = itertools.count()
        self.cancelled: list[int] = []
        self.asked: list[tuple[list[int], SamplingParams, str]] = []

    def submit(
        self, prompt: Sequence[int], params: SamplingParams, on_update: Callable[[Any], None], *, cache_salt: str = ""
    ) -> int:
        number = next(self._numbers)
        self.asked.append((list(prompt), params, cache_salt))
        ids = [*tokenizer().encode(next(self._texts), allow_special=True), tokenizer().eos_ids[0]]
        threading.Thread(target=self._say, args=(number, ids, len(prompt), params, on_update)).start()
        return number

    def _say(
        self, number: int, ids: list[int], prompt: int, params: SamplingParams, on_update: Callable[[Any], None]
    ) -> None:
        row = TextRow(tokenizer(), params.stop, unsaid=tokenizer().eos_ids)
        for at in range(0, len(ids), self._cut):
            new, last = ids[at : at + self._cut], at + self._cut >= len(ids)
            text = row.feed(new) + (row.flush() if last else "")
            summary = Summary(prompt, 0, len(ids), 0, 0.0, 0.0, 0.0, 1.0) if last else None
            on_update(Update(number, new, text, "stop" if last else None, summary=summary))

    def cancel(self, number: int) -> None:
        self.cancelled.append(number)


def served(service: Any, generation: str = "k", *, max_length: int = 4096, **more: Any) -> Served:
    engine: Any = ScriptedEngine(tokenizer(), max_length)
    template = ChatTemplate.for_generation(generation)
    return Served(("tiny",), [engine], service, template, **more)


_APPS: dict[int, Any] = {}  # id of what is served -> its app, which takes a while to make


def _app(what: Served) -> Any:
    if id(what) not in _APPS:
        _APPS[id(what)] = make_app(what)
    return _APPS[id(what)]


def client(what: Served, keys: Sequence[str] = ()) -> httpx.AsyncClient:
    app: Any = Guard(_app(what), keys)
    return httpx.AsyncClient(
        transport=httpx.ASGITransport(app, raise_app_exceptions=False), base_url="http://server", trust_env=False
    )
