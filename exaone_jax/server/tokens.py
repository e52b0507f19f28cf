"""POST /tokenize and /detokenize, as vLLM has them."""

import asyncio
from typing import Any

from fastapi import Response
from fastapi.responses import JSONResponse

from exaone_jax.server.chat import encode
from exaone_jax.server.completions import encode_text
from exaone_jax.server.protocol import DetokenizeRequest, TokenizeRequest
from exaone_jax.server.served import Served, check_ids, token_text


async def tokenize(served: Served, asked: TokenizeRequest) -> Response:
    served.check_model(asked.model)
    return await asyncio.to_thread(_told, served, asked)  # millions of tokens take a while


def _told(served: Served, asked: TokenizeRequest) -> Response:
    ids = _ids(served, asked)
    strings = [token_text(served.tokenizer, token) for token in ids] if asked.return_token_strs else None
    told = {"count": len(ids), "max_model_len": served.max_length, "tokens": ids, "token_strs": strings}
    return JSONResponse(told)


def _ids(served: Served, asked: TokenizeRequest) -> list[int]:
    if asked.messages is not None:
        begins = asked.add_generation_prompt is not False
        return encode(served, asked.messages, asked.tools, asked.chat_template_kwargs, begins).ids
    return encode_text(served, asked.prompt or "", add_special=bool(asked.add_special_tokens))


async def detokenize(served: Served, asked: DetokenizeRequest) -> dict[str, Any]:
    served.check_model(asked.model)
    tokenizer = served.tokenizer
    check_ids(asked.tokens, tokenizer.vocab_size, "tokens")
    return {"prompt": await asyncio.to_thread(tokenizer.decode, asked.tokens)}
