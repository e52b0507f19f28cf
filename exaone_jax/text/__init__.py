"""Text in and out: tokenizer, chat templates, the split of reasoning and answer, tool calls."""

from exaone_jax.text.chat import EncodedChat, encode_chat, prompt_opens_reasoning
from exaone_jax.text.generation import RULES, Generation, GenerationRules, detect_generation
from exaone_jax.text.reasoning import ReasoningSplitter, Split
from exaone_jax.text.response import ReasoningPiece, Response, ResponseParser, parse_response
from exaone_jax.text.templates import TEMPLATE_KWARGS, ChatTemplate, render_chat
from exaone_jax.text.tokenizer import IncrementalDecoder, Tokenizer, train_bpe
from exaone_jax.text.tool_calls import TextPiece, ToolCall, ToolCallParser

__all__ = [
    "RULES",
    "TEMPLATE_KWARGS",
    "ChatTemplate",
    "EncodedChat",
    "Generation",
    "GenerationRules",
    "IncrementalDecoder",
    "ReasoningPiece",
    "ReasoningSplitter",
    "Response",
    "ResponseParser",
    "Split",
    "TextPiece",
    "Tokenizer",
    "ToolCall",
    "ToolCallParser",
    "detect_generation",
    "encode_chat",
    "parse_response",
    "prompt_opens_reasoning",
    "render_chat",
    "train_bpe",
]
