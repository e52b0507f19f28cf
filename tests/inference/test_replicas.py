"""Several engines of one model as one: each on its own devices, with half of the requests, and as much room again."""

import itertools
import threading
from types import SimpleNamespace
from typing import Any

import jax
import pytest
from flax import nnx

from exaone_jax.inference import engine as engine_module
from exaone_jax.inference.engine import Engine, EngineConfig, Load, Update
from exaone_jax.inference.generate import generate_tokens
from exaone_jax.inference.replicas import Replicas
from exaone_jax.inference.sampling import SamplingParams
from exaone_jax.inference.service import EngineDiedError, EngineStuckError, OverloadedError, Service
from exaone_jax.parallel import MeshShape, copies, init_model, make_mesh
from tests.inference.small_models import K_EXAONE, agreeing, prompts
from tests.parallel.small_model import moved

PROMPTS = prompts([9, 30, 1, 17, 5, 44, 12, 23], seed=3)
PARAMS = [SamplingParams(max_new_tokens=20 + i, seed=i, temperature=0.9 * (i % 2)) for i in range(len(PROMPTS))]
NOTHING = SamplingParams(max_new_tokens=1)


@pytest.fixture(params=["data=2", "data=2,tensor=2"])
def engines(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> list[Engine]:
    monkeypatch.setattr(engine_module, "_buckets", lambda settings: [(settings.rows_per_step, settings.max_requests)])
    shape = MeshShape.parse(request.param)
    meshes = copies(make_mesh(shape, jax.devices()[: 2 * shape.tensor]))
    settings = EngineConfig(
        fused_steps=1,
        adaptive_drafts=False,
        draft_tokens=2,
        kv_bytes=400_000,
        max_requests=2,
        max_length=160,
        rows_per_step=24,
        page_size=4,
        typical_length=80,
    )
    engines = []
    for mesh in meshes:
        model = init_model(K_EXAONE, mesh)
        nnx.update(model, moved(nnx.state(agreeing(K_EXAONE, 1)), nnx.state(model), mesh))
        engines.append(Engine(model, settings))
        held = {device for x in jax.tree.leaves(engines[-1]._device._state) for device in x.sharding.device_set}
        assert held == set(mesh.devices.flat)
    return engines


def test_engines_side_by_side_say_what_generate_says(engines: list[Engine]):
    replicas = Replicas([Service(engine) for engine in engines])
    heard: list[list[int]] = [[] for _ in PROMPTS]
    ended = threading.Semaphore(0)

    def listener(index: int):
        def listen(update: Update | Exception) -> None:
            assert isinstance(update, Update), update
            heard[index] += update.tokens
            if update.finish_reason is not None:
                ended.release()

        return listen

    numbers = [
        replicas.submit(row, params, listener(i)) for i, (row, params) in enumerate(zip(PROMPTS, PARAMS, strict=True))
    ]
    assert len(set(numbers)) == len(PROMPTS)
    assert all(ended.acquire(timeout=120) for _ in PROMPTS)
    replicas.close(timeout=60)
    assert heard == [out.tokens for out in generate_tokens(agreeing(K_EXAONE, 1), PROMPTS, PARAMS)]
    said = [engine.stats.prompt_tokens for engine in engines]
    assert sum(said) == sum(map(len, PROMPTS)) and min(said) > 0
    assert not any(any(engine.pools.used()) for engine in engines)


class Scripted:
    """A service that takes requests and never ends them."""

    def __init__(self) -> None:
        self.taken, self.cancelled = itertools.count(), list[int]()
        self.busy, self.pages, self.alive, self.stuck = 0, 0.0, True, ""

    def load(self) -> Load:
        return Load(running=0, waiting=self.busy, pages={None: self.pages})

    def submit(self, prompt: list[int], params: SamplingParams, on_update: Any, *, cache_salt: str = "") -> int:
        self.busy += 1
        return next(self.taken)

    def cancel(self, number: int) -> None:
        self.cancelled.append(number)
        self.busy -= 1


@pytest.fixture
def three() -> SimpleNamespace:
    services: Any = [Scripted() for _ in range(3)]
    return SimpleNamespace(services=services, replicas=Replicas(services, max_waiting=7))


def test_the_one_with_the_least_work_is_next(three: SimpleNamespace):
    numbers = [three.replicas.submit([1], NOTHING, print) for _ in range(6)]
    assert [service.busy for service in three.services] == [2, 2, 2]
    for number in numbers:
        three.replicas.cancel(number)
    assert [service.cancelled for service in three.services] == [[0, 1]] * 3
    three.services[0].pages = 0.5
    three.services[1].pages = 0.1
    three.services[2].pages = 0.2
    three.replicas.submit([1], NOTHING, print)
    assert [service.busy for service in three.services] == [0, 1, 0]


def test_the_queue_is_bounded_as_a_whole(three: SimpleNamespace):
    for _ in range(7):
        three.replicas.submit([1], NOTHING, print)
    with pytest.raises(OverloadedError, match="7 requests wait already, and at most 7 may"):
        three.replicas.submit([1], NOTHING, print)


def test_one_that_is_dead_or_stuck_ends_all(three: SimpleNamespace):
    assert three.replicas.alive and not three.replicas.stuck
    three.services[1].alive = False
    assert not three.replicas.alive
    with pytest.raises(EngineDiedError, match="an engine has ended"):
        three.replicas.submit([1], NOTHING, print)
    three.services[1].stuck = "a step has not ended"
    assert three.replicas.stuck == "a step has not ended"
    with pytest.raises(EngineStuckError, match="a step has not ended"):
        three.replicas.submit([1], NOTHING, print)


def test_all_are_told_to_end_before_one_is_waited_for(three: SimpleNamespace):
    told: list[str] = []
    for i, service in enumerate(three.services):
        service.stop = lambda *, drain, i=i: told.append(f"stop {i} {drain}")
        service.close = lambda *, drain, timeout, i=i: told.append(f"close {i} {timeout <= 5}")
    three.replicas.close(timeout=5)
    assert told == [f"stop {i} True" for i in range(3)] + [f"close {i} True" for i in range(3)]
