"""A real server process, and clients that were not written for it: the openai SDK and httpx."""

import asyncio
import itertools
import json
from pathlib import Path

import httpx
import openai
import pytest

import exaone_jax
from exaone_jax.inference.sampling import SamplingParams
from exaone_jax.inference.text import complete, tokenizer_of
from tests.server.checkpoints import tokenizer
from tests.server.processes import Server

PROMPT = "the answer to the question"
USER = [{"role": "user", "content": "대한민국의 수도는?"}]


@pytest.fixture
def client(server: Server) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=60)


def whole_text(server: Server, **body) -> str:
    reply = server.client().post("/v1/completions", json=body)
    assert reply.status_code == 200, reply.text
    return reply.json()["choices"][0]["text"]


def test_models(client: openai.OpenAI):
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").id == "tiny"
    with pytest.raises(openai.NotFoundError, match="nobody"):
        client.models.retrieve("nobody")


def test_greedy_text_is_what_the_model_says(client: openai.OpenAI, checkpoint: Path):
    """With drafts, batched and streamed, against `complete` in this process without."""
    model = exaone_jax.load(checkpoint)
    prompts = [PROMPT, "서울", "나뉘지 않는"]
    wanted = complete(model, tokenizer_of(model), prompts, SamplingParams(max_new_tokens=12))
    found = client.completions.create(model="tiny", prompt=prompts, max_tokens=12, temperature=0)
    assert [choice.text for choice in found.choices] == [each.text for each in wanted]
    assert [choice.finish_reason for choice in found.choices] == [each.finish_reason for each in wanted]
    assert found.usage is not None
    assert found.usage.completion_tokens == sum(len(each.tokens) for each in wanted)
    ids = [tokenizer().encode(prompt) for prompt in prompts]
    by_ids = client.completions.create(model="tiny", prompt=ids, max_tokens=12, temperature=0)
    assert [choice.text for choice in by_ids.choices] == [each.text for each in wanted]
    texts = ["", "", ""]
    for chunk in client.completions.create(model="tiny", prompt=prompts, max_tokens=12, temperature=0, stream=True):
        for choice in chunk.choices:
            texts[choice.index] += choice.text
    assert texts == [each.text for each in wanted]


@pytest.mark.parametrize(
    "sampling",
    [
        {"temperature": 1.0},
        {"temperature": 0.7, "top_p": 0.9, "extra_body": {"top_k": 40, "min_p": 0.01}},
        {"presence_penalty": 1.5, "frequency_penalty": -0.5, "extra_body": {"repetition_penalty": 1.1}},
    ],
    ids=["plain", "filters", "penalties"],
)
def test_a_seed_gives_the_same_chat_whole_and_streamed(client: openai.OpenAI, sampling):
    body = {"model": "tiny", "messages": USER, "max_completion_tokens": 24, "seed": 7, "n": 2, **sampling}
    whole = client.chat.completions.create(**body)
    stream = client.chat.completions.create(**body, stream=True, stream_options={"include_usage": True})
    content, reasoning, usage = ["", ""], ["", ""], None
    for chunk in stream:
        usage = chunk.usage or usage
        for choice in chunk.choices:
            content[choice.index] += choice.delta.content or ""
            reasoning[choice.index] += getattr(choice.delta, "reasoning_content", None) or ""
    assert content == [choice.message.content or "" for choice in whole.choices]
    assert reasoning == [getattr(choice.message, "reasoning_content", "") for choice in whole.choices]
    assert reasoning[0] != reasoning[1]
    assert usage is not None and whole.usage is not None
    assert usage.completion_tokens == whole.usage.completion_tokens
    assert usage.prompt_tokens == whole.usage.prompt_tokens


def test_without_a_seed_answers_differ(client: openai.OpenAI):
    texts = {client.completions.create(model="tiny", prompt=PROMPT, temperature=2).choices[0].text for _ in range(3)}
    assert len(texts) > 1


def test_stop_strings_end_a_text_before_them(server: Server):
    body = {"prompt": PROMPT, "temperature": 0, "ignore_eos": True, "max_tokens": 40}
    text = whole_text(server, **body)
    stop = text[len(text) // 2 : len(text) // 2 + 2]
    assert whole_text(server, **body, stop=[stop, "nowhere"]) == text[: text.index(stop)]


def test_korean_is_never_broken_inside_a_character(server: Server):
    """The model says bytes of Korean at random: pieces of a stream join to what is said whole, replacement marks included."""
    body = {"prompt": "서울", "max_tokens": 100, "seed": 3, "temperature": 1.0, "ignore_eos": True}
    bias = {str(token): 8 for token in range(362, 700) if not _is_text(token)}
    body["logit_bias"] = bias
    whole = whole_text(server, **body)
    assert any("가" <= character <= "힣" for character in whole)
    with server.client().stream("POST", "/v1/completions", json=body | {"stream": True}) as reply:
        lines = [line.removeprefix("data: ") for line in reply.iter_lines() if line]
    assert lines.pop() == "[DONE]"
    pieces = [json.loads(line)["choices"][0]["text"] for line in lines]
    assert len(pieces) > 5
    assert "".join(pieces) == whole


def _is_text(token: int) -> bool:
    try:
        tokenizer().token_bytes(token).decode()
    except UnicodeDecodeError:
        return False
    return True


def test_logprobs(client: openai.OpenAI):
    """Of a chat: sums over everything stay below 1, the best come first, and the greedy token is the best."""
    found = (
        client.chat.completions.create(
            model="tiny", messages=USER, max_tokens=6, temperature=0, logprobs=True, top_logprobs=5
        )
        .choices[0]
        .logprobs
    )
    assert found is not None and found.content is not None
    assert len(found.content) == 6
    for each in found.content:
        best = [top.logprob for top in each.top_logprobs]
        assert len(best) == 5 and best == sorted(best, reverse=True)
        assert each.logprob == best[0] and each.token == each.top_logprobs[0].token


def test_echo_tells_the_prompts_logprobs_as_a_text_said_before_would_have(client: openai.OpenAI):
    """What evaluation harnesses ask for: a text said greedily, echoed as a prompt, has the same log-probabilities."""
    ids = tokenizer().encode(PROMPT)
    said = client.completions.create(
        model="tiny", prompt=ids, max_tokens=8, temperature=0, logprobs=1, extra_body={"return_token_ids": True}
    ).choices[0]
    whole = [*ids, *said.model_extra["token_ids"]]
    echoed = client.completions.create(model="tiny", prompt=whole, max_tokens=0, echo=True, logprobs=1).choices[0]
    assert said.logprobs is not None and echoed.logprobs is not None
    assert echoed.logprobs.token_logprobs[0] is None
    assert echoed.logprobs.token_logprobs[len(ids) :] == pytest.approx(said.logprobs.token_logprobs, abs=1e-4)
    assert echoed.logprobs.tokens[len(ids) :] == said.logprobs.tokens
    assert echoed.text.startswith(PROMPT)
    for offset, token in zip(echoed.logprobs.text_offset[: len(ids)], echoed.logprobs.tokens, strict=False):
        assert echoed.text[offset : offset + len(token)] == token


def test_prompt_logprobs_are_vllms(server: Server):
    """Of each token but the first {id: {logprob, rank, decoded_token}}: its own, wherever it ranks, and the best ones."""
    ids = tokenizer().encode(PROMPT)
    with server.client() as http:
        body = {"prompt": ids, "max_tokens": 1, "temperature": 0}
        found = http.post("/v1/completions", json=body | {"prompt_logprobs": 3}).json()["choices"][0]["prompt_logprobs"]
        all_best = http.post("/v1/completions", json=body | {"prompt_logprobs": 20}).json()["choices"][0]
        chat = http.post("/v1/chat/completions", json={"messages": USER, "max_tokens": 1, "prompt_logprobs": 1}).json()
    assert found[0] is None and len(found) == len(ids)
    for token, told, more in zip(ids[1:], found[1:], all_best["prompt_logprobs"][1:], strict=True):
        assert all(each.keys() == {"logprob", "rank", "decoded_token"} for each in told.values())
        own = told[str(token)]
        assert {1, 2, 3} | {own["rank"]} == {each["rank"] for each in told.values()}
        ranked = sorted((each["rank"], -each["logprob"]) for each in more.values())
        assert ranked == sorted(ranked, key=lambda pair: pair[1]), "who ranks lower is not likelier"
        assert own == more[str(token)]
    assert any(told[str(token)]["rank"] > 20 for token, told in zip(ids[1:], found[1:], strict=True))
    assert len(chat["prompt_logprobs"]) == chat["usage"]["prompt_tokens"]


def test_tokenize_and_detokenize(server: Server):
    with server.client() as http:
        text = "서울 <|endofturn|> </think>"
        found = http.post("/tokenize", json={"prompt": text, "return_token_strs": True}).json()
        assert found["count"] == len(found["tokens"]) == len(found["token_strs"])
        assert not {53, 55} & set(found["tokens"])
        assert http.post("/detokenize", json={"tokens": found["tokens"]}).json() == {"prompt": text}
        chat = http.post("/tokenize", json={"messages": USER}).json()["tokens"]
        assert chat[-2] == 54 or 54 in chat, "K-EXAONE thinks by default: the prompt opens <think>"
        assert http.post("/detokenize", json={"tokens": [10**6]}).status_code == 400
        assert http.post("/tokenize", json={"prompt": "a", "messages": USER}).status_code == 400


def test_a_prompts_ids_must_be_in_the_vocabulary(server: Server):
    with server.client() as http:
        for body in ({"prompt": [700_000]}, {"prompt": [700], "max_tokens": 1}):
            reply = http.post("/v1/completions", json=body)
            assert reply.status_code == 400
            assert "vocabulary" in reply.json()["error"]["message"]
        for field in ({"logit_bias": {"700": 1}}, {"stop_token_ids": [700]}):
            reply = http.post("/v1/completions", json={"prompt": [5], **field})
            assert reply.status_code == 400, reply.text
            assert reply.json()["error"]["param"] == next(iter(field))


def test_about(server: Server):
    with server.client() as http:
        assert http.get("/health").json() == {"status": "ok"}
        assert http.get("/version").json() == {"version": exaone_jax.__version__}
        assert http.get("/nope").json()["error"]["type"] == "not_found_error"
        assert http.get("/v1/completions").status_code == 405
        figures = http.get("/metrics").text
    names = {line.split("{")[0] for line in figures.splitlines() if not line.startswith("#")}
    assert {"vllm:num_requests_running", "vllm:num_requests_waiting", "vllm:kv_cache_usage_perc"} <= names
    assert {"vllm:request_success_total", "vllm:spec_decode_num_accepted_tokens_per_pos_total"} <= names
    assert {"vllm:time_to_first_token_seconds_bucket", "vllm:inter_token_latency_seconds_sum"} <= names
    assert 'exaone:kv_pool_usage{engine="0",model_name="tiny",window="4"}' in figures


def test_many_at_once_say_what_they_say_alone(server: Server):
    bodies = [{"prompt": PROMPT[:n], "max_tokens": 16, "seed": n, "temperature": 1.0} for n in range(1, 13)]
    alone = [whole_text(server, **body) for body in bodies]

    async def all_at_once() -> list[httpx.Response]:
        async with httpx.AsyncClient(base_url=server.url, timeout=60, trust_env=False) as http:
            return await asyncio.gather(*(http.post("/v1/completions", json=body) for body in bodies))

    replies = asyncio.run(all_at_once())
    assert [reply.json()["choices"][0]["text"] for reply in replies] == alone
    logged = list(itertools.islice((line for line in server.lines if line["event"] == "request"), 100))
    assert all(line["status"] for line in logged)
    assert "answer" not in json.dumps(logged), "no text of a prompt is logged"
