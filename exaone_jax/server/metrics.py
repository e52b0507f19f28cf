"""GET /metrics: what happens, for Prometheus, under the names that vLLM gave them."""

import time
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import Metric
from prometheus_client.registry import Collector

from exaone_jax.inference.engine import Engine, Update

if TYPE_CHECKING:
    from exaone_jax.server.served import Job

_SECONDS = (
    0.001,
    0.005,
    0.01,
    0.02,
    0.04,
    0.06,
    0.08,
    0.1,
    0.25,
    0.5,
    0.75,
    1.0,
    2.5,
    5.0,
    7.5,
    10.0,
    20.0,
    40.0,
    80.0,
)
_LONG_SECONDS = (0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0, 120.0, 480.0, 1920.0)
_TOKENS = tuple(float(m * 10**e) for e in range(6) for m in (1, 2, 5))
_HISTOGRAMS = {
    "time_to_first_token_seconds": _SECONDS,
    "inter_token_latency_seconds": _SECONDS,
    "request_time_per_output_token_seconds": _SECONDS,
    "e2e_request_latency_seconds": _LONG_SECONDS,
    "request_queue_time_seconds": _LONG_SECONDS,
    "request_prefill_time_seconds": _LONG_SECONDS,
    "request_decode_time_seconds": _LONG_SECONDS,
    "request_prompt_tokens": _TOKENS,
    "request_generation_tokens": _TOKENS,
    "request_params_n": (1.0, 2.0, 5.0, 10.0, 20.0),
    "request_params_max_tokens": _TOKENS,
}
_FINISHED = {"cancelled": "abort"}  # what vLLM calls it


class Metrics:
    """The figures of the engines, and of the requests that they had. model: the label model_name."""

    def __init__(self, engines: Sequence[Engine], model: str):
        self._registry = CollectorRegistry()
        self._registry.register(_EngineFigures(engines, model))
        self._histograms = {
            name: Histogram(
                f"vllm:{name}", name.replace("_", " "), ["model_name"], buckets=b, registry=self._registry
            ).labels(model)
            for name, b in _HISTOGRAMS.items()
        }
        self._ended = Counter(
            "vllm:request_success", "Requests that ended.", ["model_name", "finished_reason"], registry=self._registry
        )
        self._rejected = Counter(
            "vllm:admission_rejections", "Requests refused.", ["model_name", "reason"], registry=self._registry
        )
        self._model = model

    def text(self) -> bytes:
        return generate_latest(self._registry)

    def rejected(self, reason: str) -> None:
        self._rejected.labels(self._model, reason).inc()

    def heard(self, job: "Job", index: int, update: Update) -> None:
        """Count an update of one sequence."""
        now = time.monotonic()
        if update.tokens and (last := job.last_heard.get(index)) is not None:
            self._observe("inter_token_latency_seconds", (now - last) / len(update.tokens))
        job.last_heard[index] = now
        if update.finish_reason is not None:
            self.ended(_FINISHED.get(update.finish_reason, update.finish_reason))
            self._count_end(job, index, update)

    def ended(self, reason: str, count: int = 1) -> None:
        """Count sequences that ended for one of vLLM's reasons."""
        self._ended.labels(self._model, reason).inc(count)

    def _count_end(self, job: "Job", index: int, update: Update) -> None:
        params, done = job.asks[index].params, update.summary
        self._observe("request_params_n", len(job.asks))
        self._observe("request_params_max_tokens", params.max_new_tokens)
        if done is None:
            return
        self._observe("request_prompt_tokens", done.prompt_tokens)
        self._observe("request_generation_tokens", done.generated_tokens)
        self._observe("e2e_request_latency_seconds", done.finished - done.arrived)
        if done.started is not None:
            self._observe("request_queue_time_seconds", done.started - done.arrived)
        if done.started is not None and done.first_token is not None:
            decode = done.finished - done.first_token
            self._observe("time_to_first_token_seconds", done.first_token - done.arrived)
            self._observe("request_prefill_time_seconds", done.first_token - done.started)
            self._observe("request_decode_time_seconds", decode)
            if done.generated_tokens > 1:
                self._observe("request_time_per_output_token_seconds", decode / (done.generated_tokens - 1))

    def _observe(self, name: str, value: float) -> None:
        self._histograms[name].observe(value)


class _EngineFigures(Collector):
    """What the engines themselves count, read when asked for; the label engine numbers them."""

    def __init__(self, engines: Sequence[Engine], model: str):
        self._engines, self._model = engines, model

    def collect(self) -> Iterator[Metric]:
        gauges = {
            "vllm:num_requests_running": "Requests that have a place.",
            "vllm:num_requests_waiting": "Requests that wait for one.",
            "vllm:kv_cache_usage_perc": "Of the fullest pool, 1 is full.",
            "exaone:kv_pool_usage": "Of each pool, 1 is full.",
        }
        families = {name: Metric(name, text, "gauge") for name, text in gauges.items()}
        for index, engine in enumerate(self._engines):
            for kind, figures in (("gauge", _gauges(engine)), ("counter", _counters(engine))):
                for name, value, labels in figures:
                    family = families.setdefault(name, Metric(name, name.split(":")[1].replace("_", " "), kind))
                    suffix = "_total" if kind == "counter" else ""
                    labels = {"model_name": self._model, "engine": str(index), **labels}
                    family.add_sample(name + suffix, labels, value)
        yield from families.values()


def _gauges(engine: Engine) -> Iterator[tuple[str, float, dict[str, str]]]:
    """(name, value, labels)"""
    load = engine.load()
    yield "vllm:num_requests_running", load.running, {}
    yield "vllm:num_requests_waiting", load.waiting, {}
    yield "vllm:kv_cache_usage_perc", max(load.pages.values(), default=0.0), {}
    for window, used in load.pages.items():
        yield "exaone:kv_pool_usage", used, {"window": "global" if window is None else str(window)}


def _counters(engine: Engine) -> Iterator[tuple[str, float, dict[str, str]]]:
    """(name, value, labels)"""
    stats = engine.stats
    yield "vllm:prompt_tokens", stats.prompt_tokens, {}
    yield "vllm:generation_tokens", stats.generated_tokens, {}
    yield "vllm:prefix_cache_queries", stats.prompt_tokens, {}
    yield "vllm:prefix_cache_hits", stats.cached_tokens, {}
    yield "vllm:num_preemptions", stats.preemptions, {}
    yield "vllm:spec_decode_num_drafts", max(stats.drafted, default=0), {}
    yield "vllm:spec_decode_num_draft_tokens", sum(stats.drafted), {}
    yield "vllm:spec_decode_num_accepted_tokens", sum(stats.accepted), {}
    yield "exaone:engine_steps", stats.steps, {}
    for position, kept in enumerate(stats.accepted):
        yield "vllm:spec_decode_num_accepted_tokens_per_pos", kept, {"position": str(position)}
