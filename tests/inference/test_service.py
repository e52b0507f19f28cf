"""The engine in its thread: streams, texts and stop strings, cancelling, the queue's bound, draining and death."""

import asyncio
import itertools
import threading
import time
from collections.abc import Iterator
from functools import cache

import pytest

from exaone_jax.errors import InputError
from exaone_jax.inference import engine as engine_module
from exaone_jax.inference.engine import Engine, EngineConfig, Update
from exaone_jax.inference.sampling import SamplingParams
from exaone_jax.inference.service import EngineDiedError, EngineStuckError, OverloadedError, Service
from exaone_jax.inference.text import complete
from exaone_jax.model import Transformer
from exaone_jax.text import Tokenizer, train_bpe
from tests.inference.small_models import reciting

END = 53
CORPUS = ["the answer to the question is in the library; 대한민국의 수도는 서울이다. " * 20]


@cache
def tokenizer() -> Tokenizer:
    return train_bpe(CORPUS, 640)


@cache
def model() -> Transformer:
    """It says one sentence over and over, from any of its tokens on."""
    ids = list(dict.fromkeys(tokenizer().encode("the library 서울")))
    follows = dict(itertools.pairwise([*ids, ids[0]]))
    return reciting(follows, tokenizer().vocab_size, eos_token_ids=(END,), max_position_embeddings=256)


@cache
def engine() -> Engine:
    settings = EngineConfig(
        max_requests=2, adaptive_drafts=False, rows_per_step=24, page_size=4, draft_tokens=2, kv_bytes=10_000_000
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine_module, "_buckets", lambda s: [(s.rows_per_step, s.max_requests)])
        return Engine(model(), settings, tokenizer=tokenizer())


def prompt() -> list[int]:
    return tokenizer().encode("the library 서울")[:1]


@pytest.fixture
def service() -> Iterator[Service]:
    service = Service(engine(), max_waiting=4)
    yield service
    service.close(drain=False, timeout=60)
    assert not service.alive
    _end_all()


def long(n: int = 200, **more) -> SamplingParams:
    return SamplingParams(max_new_tokens=n, ignore_eos=True, **more)


async def text_of(service: Service, params: SamplingParams) -> tuple[str, str | None]:
    text, reason = "", None
    async for update in service.stream(prompt(), params):
        text, reason = text + update.text, update.finish_reason
    return text, reason


def test_streams_side_by_side_are_what_complete_says(service: Service):
    """Whole and with stop strings, some of which come in the middle of a token."""
    params = [long(24), long(24, stop=("rar",)), long(24, stop=("울",)), long(1, stop=("nowhere",))]
    wanted = complete(model(), tokenizer(), [prompt()] * len(params), params)

    async def main() -> list[tuple[str, str | None]]:
        return await asyncio.gather(*(text_of(service, each) for each in params))

    found = asyncio.run(main())
    assert found == [(c.text, c.finish_reason) for c in wanted]
    assert {reason for _, reason in found} == {"stop", "length"}


def test_leaving_a_stream_cancels_it(service: Service):
    async def main() -> None:
        async for _ in (stream := service.stream(prompt(), long())):
            break
        await stream.aclose()
        assert (await text_of(service, long(3)))[1] == "length"

    asyncio.run(main())
    assert not engine()._requests
    assert engine().pools.used() == [0.0] * len(engine().pools.groups)


def test_more_than_may_wait_are_refused_and_the_others_served(service: Service):
    heard: list[Update | Exception] = []
    entered, release, refused = threading.Event(), threading.Event(), 0

    def first(update: Update | Exception) -> None:
        entered.set()
        release.wait(60)  # holds the engine's thread, so that what comes waits

    service.submit(prompt(), long(2), first)
    assert entered.wait(60)
    for _ in range(20):
        try:
            service.submit(prompt(), long(2), heard.append)
        except OverloadedError:
            refused += 1
    release.set()
    service.close(timeout=60)
    assert 20 - 4 - 2 <= refused <= 20 - 4
    ends = [u for u in heard if isinstance(u, Update) and u.finish_reason == "length"]
    assert len(ends) == 20 - refused


def test_what_cannot_be_served_is_refused_in_the_callers_thread(service: Service):
    with pytest.raises(InputError, match="beyond the context of 256"):
        service.submit(prompt(), long(256), print)
    assert service.alive


def test_a_closed_service_takes_nothing(service: Service):
    service.close(timeout=60)
    with pytest.raises(EngineDiedError, match="no more requests"):
        service.submit(prompt(), long(2), print)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_the_death_of_the_engine_is_heard(service: Service, monkeypatch: pytest.MonkeyPatch):
    def fail() -> list[Update]:
        raise RuntimeError("out of memory")

    heard, ended = [], threading.Event()

    def listen(update: Update | Exception) -> None:
        heard.append(update)
        ended.set()

    monkeypatch.setattr(engine(), "step", fail)
    service.submit(prompt(), long(), listen)
    assert ended.wait(60)
    assert isinstance(heard[0], EngineDiedError)
    service._thread.join(60)
    assert not service.alive
    with pytest.raises(EngineDiedError) as caught:
        service.submit(prompt(), long(), print)
    assert str(caught.value.__cause__) == "out of memory"


def test_a_step_that_does_not_come_back_is_given_up(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture):
    """All hear so, those that wait in the queue too; when it comes back after all, nobody hears of it and the thread ends."""
    service = Service(engine(), step_seconds=0.4)
    entered, release = threading.Event(), threading.Event()
    step = engine().step

    def hang_here() -> list[Update]:
        entered.set()
        assert release.wait(60)
        return step()

    monkeypatch.setattr(engine(), "step", hang_here)
    heard: list[list[Update | Exception]] = [[], []]

    def listener(index: int):
        def listen(update: Update | Exception) -> None:
            heard[index].append(update)
            if isinstance(update, Exception) and index == 1:
                ended.set()

        return listen

    ended = threading.Event()
    service.submit(prompt(), long(), listener(0))
    assert entered.wait(60)
    assert service.alive
    service.submit(prompt(), long(), listener(1))
    assert ended.wait(60)
    for each in heard:
        assert [type(update) for update in each] == [EngineStuckError]
        assert "has not ended within 0.4 s" in str(each[0])
    assert not service.alive and service.stuck
    with pytest.raises(EngineStuckError, match="has not ended"):
        service.submit(prompt(), long(), print)
    assert "hang_here" in caplog.records[-1].fields["stack"]  # type: ignore[attr-defined]
    service.close(drain=False, timeout=60)  # does not wait for it
    assert service._thread.is_alive()
    release.set()
    service._thread.join(60)
    assert not service._thread.is_alive()
    assert [len(each) for each in heard] == [1, 1]
    _end_all()


def test_slow_steps_and_idle_times_are_not_taken_for_stuck(monkeypatch: pytest.MonkeyPatch):
    service = Service(engine(), step_seconds=0.6)
    step = engine().step

    def slow() -> list[Update]:
        time.sleep(0.3)
        return step()

    monkeypatch.setattr(engine(), "step", slow)

    async def main() -> None:
        for _ in range(2):
            await asyncio.sleep(1.0)  # longer than a step may take
            assert (await text_of(service, long(6)))[1] == "length"

    asyncio.run(main())
    assert service.alive
    service.close(drain=False, timeout=60)


def _end_all() -> None:
    for request in list(engine()._requests):
        engine().cancel(request)
    while engine().busy:
        engine().step()
