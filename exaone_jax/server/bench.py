"""`exaone-jax bench serve`: how fast a server of OpenAI's API answers. Definitions are those of `vllm bench serve`.

TTFT: from sending a request to its first token. ITL: between one piece of a stream and the next, over all pieces of all requests.
TPOT: of a request, (end - first token) / (tokens - 1). E2EL: from sending to the end. Goodput: requests that keep every limit
asked for, a second. Acceptance: what the server's /metrics count up during the run.
"""

import asyncio
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import numpy as np

from exaone_jax.errors import InputError

PERCENTILES = (50, 90, 95, 99)
SLOS = ("ttft", "tpot", "e2el")  # what a limit can be set for, in milliseconds
_SPEC = "vllm:spec_decode_num_"


@dataclass(frozen=True)
class Load:
    """What is sent. rate: requests a second, as a Poisson process; None: all at once. concurrency: most that are open.

    goodput: limits in milliseconds, by name of SLOS.
    """

    url: str
    prompts: Sequence[tuple[str | list[int], int]]  # and how many tokens to generate
    model: str | None = None
    rate: float | None = None
    concurrency: int | None = None
    goodput: Mapping[str, float] = field(default_factory=dict)
    seed: int = 0
    api_key: str | None = None
    temperature: float = 0.0


@dataclass
class Timing:
    """One request, in seconds. error: why it failed; empty if it did not."""

    prompt_tokens: int = 0
    output_tokens: int = 0
    ttft: float = 0.0
    latency: float = 0.0
    gaps: list[float] = field(default_factory=list)
    error: str = ""

    @property
    def tpot(self) -> float | None:
        return (self.latency - self.ttft) / (self.output_tokens - 1) if self.output_tokens > 1 else None

    def keeps(self, limits: Mapping[str, float]) -> bool:
        found = {"ttft": self.ttft, "tpot": self.tpot or 0.0, "e2el": self.latency}
        return all(found[name] * 1e3 <= limit for name, limit in limits.items())


def random_prompts(
    count: int, input_len: int, output_len: int, vocab_size: int, seed: int
) -> list[tuple[list[int], int]]:
    """Prompts of random tokens, of one length."""
    ids = np.random.default_rng(seed).integers(0, vocab_size, (count, input_len))
    return [(row.tolist(), output_len) for row in ids]


def read_prompts(file: Path, output_len: int) -> list[tuple[str | list[int], int]]:
    """Of a file with a JSON object a line: `prompt`, a text or token ids, and perhaps `max_tokens`."""
    prompts = []
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{file}: cannot be read: {error}") from error
    for number, line in enumerate(lines, 1):
        try:
            found = json.loads(line)
            prompts.append((found["prompt"], int(found.get("max_tokens", output_len))))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise InputError(f"{file}:{number}: expected a JSON object with prompt, found {line[:80]!r}") from error
    if not prompts:
        raise InputError(f"{file}: holds no prompt")
    return prompts


def run(load: Load) -> dict[str, Any]:
    """Send everything and measure. Raises InputError where the server cannot be talked to."""
    if unknown := sorted(load.goodput.keys() - set(SLOS)):
        raise InputError(f"goodput: {unknown[0]!r} is unknown; expected {', '.join(SLOS)}")
    return asyncio.run(_run(load))


def model_card(url: str, api_key: str | None = None) -> dict[str, Any]:
    """What the server says of its first model. Raises InputError where it says nothing."""
    try:
        with httpx.Client(timeout=30, headers=_headers(api_key)) as client:
            reply = client.get(f"{url}/v1/models")
            reply.raise_for_status()
            return reply.json()["data"][0]
    except (httpx.HTTPError, httpx.InvalidURL, ValueError, LookupError, TypeError) as error:
        raise InputError(f"{url}/v1/models: no answer that can be read: {error!r}") from error


async def _run(load: Load) -> dict[str, Any]:
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
    async with httpx.AsyncClient(
        base_url=load.url, timeout=None, limits=limits, headers=_headers(load.api_key)
    ) as client:
        warm = await _one(client, load, load.prompts[0][0], 2)
        if warm.error:
            raise InputError(f"{load.url}: the first request failed: {warm.error}")
        before, started = await _counters(client), time.perf_counter()
        gate = asyncio.Semaphore(load.concurrency or len(load.prompts))

        async def one(prompt: str | list[int], most: int, at: float) -> Timing:
            await asyncio.sleep(max(0.0, started + at - time.perf_counter()))
            async with gate:
                return await _one(client, load, prompt, most)

        at = _arrivals(len(load.prompts), load.rate, load.seed)
        timings = await asyncio.gather(*(one(*each, when) for each, when in zip(load.prompts, at, strict=True)))
        seconds = time.perf_counter() - started
        return report(load, timings, seconds) | _acceptance(before, await _counters(client))


def _arrivals(count: int, rate: float | None, seed: int) -> list[float]:
    """When each request is sent, in seconds from the start."""
    if rate is None:
        return [0.0] * count
    return np.cumsum(np.random.default_rng(seed).exponential(1 / rate, count)).tolist()


async def _one(client: httpx.AsyncClient, load: Load, prompt: str | list[int], most: int) -> Timing:
    body = {"prompt": prompt, "max_tokens": most, "temperature": load.temperature, "ignore_eos": True, "stream": True}
    body |= {"stream_options": {"include_usage": True}, **({"model": load.model} if load.model else {})}
    timing, started = Timing(), time.perf_counter()
    last = started
    try:
        async with client.stream("POST", "/v1/completions", json=body) as reply:
            if reply.status_code != 200:
                return Timing(error=f"status {reply.status_code}: {(await reply.aread())[:200]!r}")
            async for line in reply.aiter_lines():
                if not line.startswith("data: {"):
                    continue
                now, found = time.perf_counter(), json.loads(line.removeprefix("data: "))
                if "error" in found:
                    return Timing(error=found["error"]["message"])
                if usage := found.get("usage"):
                    timing.prompt_tokens, timing.output_tokens = usage["prompt_tokens"], usage["completion_tokens"]
                if found["choices"]:
                    if timing.ttft:
                        timing.gaps.append(now - last)
                    else:
                        timing.ttft = now - started
                    timing.latency, last = now - started, now
    except httpx.HTTPError as error:
        return Timing(error=repr(error))
    if not timing.output_tokens:
        timing.error = "the stream ended without a token"
    return timing


def report(load: Load, timings: Sequence[Timing], seconds: float) -> dict[str, Any]:
    """The figures of a run; times in milliseconds."""
    done = [timing for timing in timings if not timing.error]
    outputs, inputs = (sum(getattr(t, f"{which}_tokens") for t in done) for which in ("output", "prompt"))
    times = {
        "ttft": [t.ttft for t in done],
        "tpot": [t.tpot for t in done if t.tpot is not None],
        "itl": [gap for t in done for gap in t.gaps],
        "e2el": [t.latency for t in done],
    }
    found: dict[str, Any] = {
        "duration_s": seconds,
        "completed": len(done),
        "failed": len(timings) - len(done),
        "errors": sorted({t.error for t in timings if t.error})[:10],
        "total_input_tokens": inputs,
        "total_output_tokens": outputs,
        "request_throughput": len(done) / seconds,
        "output_throughput": outputs / seconds,
        "total_token_throughput": (inputs + outputs) / seconds,
    }
    if load.goodput:
        found["request_goodput"] = sum(t.keeps(load.goodput) for t in done) / seconds
    return found | {f"{name}_ms": _spread(values) for name, values in times.items()}


def _spread(seconds: Sequence[float]) -> dict[str, float] | None:
    if not seconds:
        return None
    values = np.asarray(seconds) * 1e3
    percentiles = {f"p{p}": float(np.percentile(values, p)) for p in PERCENTILES}
    return {"mean": float(values.mean()), "std": float(values.std()), **percentiles}


async def _counters(client: httpx.AsyncClient) -> dict[str, float]:
    """The server's counters of drafts; none where it has no such page."""
    reply = await client.get("/metrics")
    found: dict[str, float] = {}
    for line in reply.text.splitlines() if reply.status_code == 200 else ():
        if line.startswith(_SPEC):
            name, _, value = line.rpartition(" ")
            found[name] = float(value)
    return found


def _acceptance(before: Mapping[str, float], after: Mapping[str, float]) -> dict[str, Any]:
    """How drafts fared. Acceptance length counts the token that comes without a draft too."""

    def grown(start: str) -> list[float]:
        return [value - before.get(name, 0.0) for name, value in after.items() if name.startswith(_SPEC + start)]

    drafts, tokens, kept = (
        sum(grown(name)) for name in ("drafts_total", "draft_tokens_total", "accepted_tokens_total")
    )
    if not tokens:
        return {"speculation": None}
    positions = [value / drafts for value in grown("accepted_tokens_per_pos_total")]
    figures = {"acceptance_rate": kept / tokens, "acceptance_length": 1 + kept / drafts, "per_position": positions}
    return {"speculation": {"drafts": drafts, "draft_tokens": tokens, "accepted_tokens": kept, **figures}}


def _headers(api_key: str | None) -> dict[str, str]:
    return {} if api_key is None else {"Authorization": f"Bearer {api_key}"}


def lines(found: Mapping[str, Any]) -> list[str]:
    """For people."""
    shown = [f"{name.replace('_', ' '):28} {found[name]:12.2f}" for name in _SINGLE if name in found]
    shown.append(f"{'':28} " + " ".join(f"{name:>10}" for name in ("mean", *(f"p{p}" for p in PERCENTILES))))
    for name in ("ttft_ms", "tpot_ms", "itl_ms", "e2el_ms"):
        if spread := found[name]:
            values = (spread["mean"], *(spread[f"p{p}"] for p in PERCENTILES))
            shown.append(f"{name.replace('_', ' '):28} " + " ".join(f"{value:10.2f}" for value in values))
    if spec := found["speculation"]:
        per = ", ".join(f"{share:.2f}" for share in spec["per_position"])
        rate, length = spec["acceptance_rate"], spec["acceptance_length"]
        shown.append(f"drafts kept {rate:.1%}, tokens a step {length:.2f}, by position {per}")
    return shown + [f"error: {error}" for error in found["errors"]]


_SINGLE = ("duration_s", "completed", "failed", "total_input_tokens", "total_output_tokens", "request_throughput")
_SINGLE += ("output_throughput", "total_token_throughput", "request_goodput")
