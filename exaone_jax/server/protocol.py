"""What clients may send. A field that is not here is refused, and so is a value of another JSON type."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, WithJsonSchema, model_validator

MAX_CHOICES = 32
MAX_PROMPTS = 256
MAX_LOGPROBS = 20
MAX_GRAMMAR = 1 << 16
_MAX_KEYS = 1024


def _few_keys(value: Any) -> Any:
    """Before anything is said of each key: hundreds of thousands of errors take longer than all else that the server does."""
    if isinstance(value, dict) and len(value) > _MAX_KEYS:
        raise ValueError(f"{len(value)} keys; expected at most {_MAX_KEYS}")
    return value


_Text = Annotated[str, Field(min_length=1, max_length=1024)]
_TokenId = Annotated[int, Field(ge=0, lt=2**31)]
_FIRST_ERROR = Field(fail_fast=True)  # of long lists
_Ids = Annotated[list[_TokenId], Field(min_length=1), _FIRST_ERROR]


_AnyNull: dict[str, Any] = {"type": "null"}
_Message = Annotated[  # exaone_jax.text checks it, and says what is wrong better than a schema
    dict[str, Any],
    WithJsonSchema(
        {
            "type": "object",
            "properties": {
                "role": {"enum": ["system", "developer", "user", "assistant", "tool"]},
                "content": {"anyOf": [{"type": t} for t in ("string", "array", "object", "null")]},
                "tool_calls": {"anyOf": [{"type": "array", "items": {"type": "object"}}, _AnyNull]},
                **{
                    name: {"anyOf": [{"type": "string"}, _AnyNull]}
                    for name in ("tool_call_id", "reasoning_content", "reasoning", "thinking")
                },
            },
            "required": ["role"],
            "additionalProperties": _AnyNull,
        }
    ),
]


class Request(BaseModel):
    """Strict: "2" and true are no numbers, and a field that is not known is an error."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, protected_namespaces=())

    @model_validator(mode="before")
    @classmethod
    def _few(cls, given: Any) -> Any:
        return _few_keys(given)


class StreamOptions(Request):
    """include_usage: a last chunk tells the tokens used; continuous_usage_stats: every chunk does."""

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None
    include_obfuscation: Literal[False] | None = None


class Sampling(Request):
    """How tokens are drawn. What is not given, the checkpoint's generation_config.json decides."""

    temperature: float | None = Field(default=None, ge=0.0, le=2.0)
    top_p: float | None = Field(default=None, gt=0.0, le=1.0)
    top_k: int | None = Field(default=None, ge=-1, lt=2**31)  # 0 and -1: off
    min_p: float | None = Field(default=None, ge=0.0, le=1.0)
    presence_penalty: float | None = Field(default=None, ge=-2.0, le=2.0)
    frequency_penalty: float | None = Field(default=None, ge=-2.0, le=2.0)
    repetition_penalty: float | None = Field(default=None, ge=0.01, le=100.0)
    seed: int | None = Field(default=None, ge=-(2**63), lt=2**63)
    stop: _Text | Annotated[list[_Text], Field(max_length=16)] | None = None
    stop_token_ids: Annotated[list[_TokenId], Field(max_length=64)] | None = None
    min_tokens: int | None = Field(default=None, ge=0, lt=2**31)
    ignore_eos: bool | None = None
    logit_bias: (
        Annotated[
            dict[Annotated[str, Field(pattern=r"^[0-9]{1,9}$")], Annotated[float, Field(ge=-100.0, le=100.0)]],
            Field(max_length=_MAX_KEYS),
            BeforeValidator(_few_keys),
        ]
        | None
    ) = None
    prompt_logprobs: int | None = Field(default=None, ge=0, le=MAX_LOGPROBS)


class StructuredOutputs(Request):
    """The form of a text: one of a JSON schema, a regular expression, a choice of texts, a Lark grammar, any JSON object."""

    json_: dict[str, Any] | Annotated[str, Field(max_length=MAX_GRAMMAR)] | None = Field(default=None, alias="json")
    regex: str | None = Field(default=None, min_length=1, max_length=MAX_GRAMMAR)
    choice: Annotated[list[_Text], Field(min_length=1, max_length=1024)] | None = None
    grammar: str | None = Field(default=None, min_length=1, max_length=MAX_GRAMMAR)
    json_object: Literal[True] | None = None

    @model_validator(mode="after")
    def _one(self) -> "StructuredOutputs":
        if (
            sum(value is not None for value in (self.json_, self.regex, self.choice, self.grammar, self.json_object))
            != 1
        ):
            raise ValueError("expected one of json, regex, choice, grammar and json_object")
        return self


class Generation(Sampling):
    """What chat and text completions have in common.

    user: is written into the log. cache_salt: only requests of one salt share remembered prompts.
    return_token_ids: answer with token ids too.
    """

    model: str | None = Field(default=None, max_length=1024)
    n: int | None = Field(default=None, ge=1, le=MAX_CHOICES)
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: str | None = Field(default=None, max_length=256)
    cache_salt: str | None = Field(default=None, min_length=1, max_length=1024)
    return_token_ids: bool | None = None
    max_tokens: int | None = Field(default=None, ge=1, lt=2**31)
    structured_outputs: StructuredOutputs | None = None

    @model_validator(mode="after")
    def _streams(self) -> "Generation":
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options: given without stream")
        return self


class ChatTemplateKwargs(Request):
    """The white list."""

    enable_thinking: bool | None = None
    skip_think: bool | None = None
    preserve_thinking: bool | None = None


class Function(Request):
    """strict: arguments obey the schema of the parameters."""

    name: str = Field(pattern=r"^[a-zA-Z0-9_.-]{1,64}$")
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(Request):
    type: Literal["function"]
    function: Function


class NamedFunction(Request):
    name: str = Field(min_length=1, max_length=64)


class NamedTool(Request):
    type: Literal["function"]
    function: NamedFunction


class TextFormat(Request):
    type: Literal["text"]


class JsonObjectFormat(Request):
    type: Literal["json_object"]


class JsonSchema(Request):
    """strict: the answer obeys the schema with it and without."""

    name: str = Field(pattern=r"^[a-zA-Z0-9_-]{1,64}$")
    description: str | None = None
    schema_: dict[str, Any] | None = Field(default=None, alias="schema")
    strict: bool | None = None


class JsonSchemaFormat(Request):
    type: Literal["json_schema"]
    json_schema: JsonSchema


ResponseFormat = Annotated[TextFormat | JsonObjectFormat | JsonSchemaFormat, Field(discriminator="type")]


class ChatRequest(Generation):
    """POST /v1/chat/completions. `messages` are checked by exaone_jax.text, which knows what templates take."""

    messages: list[_Message] = Field(min_length=1, max_length=65536, fail_fast=True)
    max_completion_tokens: int | None = Field(default=None, ge=1, lt=2**31)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(default=None, ge=0, le=MAX_LOGPROBS)
    tools: Annotated[list[Tool], Field(max_length=1024)] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    parallel_tool_calls: bool | None = None
    response_format: ResponseFormat | None = None
    chat_template_kwargs: ChatTemplateKwargs | None = None
    reasoning_effort: Literal["none"] | None = None  # as enable_thinking: false
    modalities: Annotated[list[Literal["text"]], Field(min_length=1, max_length=1)] | None = None
    store: Literal[False] | None = None
    service_tier: Literal["auto", "default"] | None = None

    @model_validator(mode="after")
    def _agree(self) -> "ChatRequest":
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs: given without logprobs")
        if self.tool_choice not in (None, "none") and not self.tools:
            raise ValueError("tool_choice: given without tools")
        most = {self.max_tokens, self.max_completion_tokens} - {None}
        if len(most) > 1:
            raise ValueError("max_tokens: differs from max_completion_tokens")
        return self


class CompletionRequest(Generation):
    """POST /v1/completions. A text prompt cannot spell control tokens: their spellings stay text; token ids can be any.

    max_tokens may be 0 with echo: only the prompt is told.
    """

    prompt: (
        str
        | _Ids
        | Annotated[
            Annotated[list[str], _FIRST_ERROR] | Annotated[list[_Ids], _FIRST_ERROR],
            Field(min_length=1, max_length=MAX_PROMPTS),
        ]
    )
    max_tokens: int | None = Field(default=16, ge=0, lt=2**31)
    logprobs: int | None = Field(default=None, ge=0, le=MAX_LOGPROBS)
    echo: bool | None = None

    @model_validator(mode="after")
    def _some(self) -> "CompletionRequest":
        if self.max_tokens == 0 and not self.echo:
            raise ValueError("max_tokens: 0 without echo leaves nothing to answer")
        return self


class ResponsesTool(Function):
    type: Literal["function"]


class ResponsesChoice(Request):
    type: Literal["function"]
    name: str = Field(min_length=1, max_length=64)


class ResponsesJsonSchema(JsonSchema):
    type: Literal["json_schema"]


class ResponsesText(Request):
    format: Annotated[TextFormat | JsonObjectFormat | ResponsesJsonSchema, Field(discriminator="type")] | None = None

    def response_format(self) -> dict[str, Any] | None:
        """As a chat completion has it."""
        if not isinstance(self.format, ResponsesJsonSchema):
            return None if self.format is None else self.format.model_dump()
        schema = self.format.model_dump(exclude={"type"}, exclude_none=True, by_alias=True)
        return {"type": "json_schema", "json_schema": schema}


class Reasoning(Request):
    effort: Literal["none"] | None = None
    summary: Literal["auto"] | None = None  # reasoning is told whole


class ResponsesStreamOptions(Request):
    include_obfuscation: Literal[False] | None = None


class ResponsesRequest(Sampling):
    """POST /v1/responses. Input items are checked where they become messages. Nothing is stored."""

    input: str | Annotated[list[dict[str, Any]], Field(min_length=1, max_length=65536, fail_fast=True)]
    model: str | None = Field(default=None, max_length=1024)
    instructions: str | None = None
    max_output_tokens: int | None = Field(default=None, ge=1, lt=2**31)
    stream: bool | None = None
    stream_options: ResponsesStreamOptions | None = None
    tools: Annotated[list[ResponsesTool], Field(max_length=1024)] | None = None
    tool_choice: Literal["none", "auto", "required"] | ResponsesChoice | None = None
    parallel_tool_calls: bool | None = None
    text: ResponsesText | None = None
    reasoning: Reasoning | None = None
    top_logprobs: int | None = Field(default=None, ge=0, le=MAX_LOGPROBS)
    include: Annotated[list[Literal["message.output_text.logprobs"]], Field(max_length=1)] | None = None
    metadata: (
        Annotated[dict[str, Annotated[str, Field(max_length=512)]], Field(max_length=16), BeforeValidator(_few_keys)]
        | None
    ) = None
    store: Literal[False] | None = None
    background: Literal[False] | None = None
    truncation: Literal["disabled"] | None = None
    service_tier: Literal["auto", "default"] | None = None
    user: str | None = Field(default=None, max_length=256)
    cache_salt: str | None = Field(default=None, min_length=1, max_length=1024)
    chat_template_kwargs: ChatTemplateKwargs | None = None


class TokenizeRequest(Request):
    """POST /tokenize: the ids of a text, or of a conversation as a model reads it."""

    model: str | None = Field(default=None, max_length=1024)
    prompt: str | None = None
    messages: Annotated[list[_Message], _FIRST_ERROR] | None = Field(default=None, min_length=1, max_length=65536)
    tools: Annotated[list[Tool], Field(max_length=1024)] | None = None
    chat_template_kwargs: ChatTemplateKwargs | None = None
    add_generation_prompt: bool | None = None
    add_special_tokens: bool | None = None
    return_token_strs: bool | None = None

    @model_validator(mode="after")
    def _one(self) -> "TokenizeRequest":
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("prompt: expected it or messages, one of them")
        of_chats = (self.tools, self.chat_template_kwargs, self.add_generation_prompt)
        if self.messages is None and any(value is not None for value in of_chats):
            raise ValueError("prompt: tools, chat_template_kwargs and add_generation_prompt go with messages")
        if self.prompt is None and self.add_special_tokens is not None:
            raise ValueError("add_special_tokens: goes with prompt; a template adds its own")
        return self


class DetokenizeRequest(Request):
    """POST /detokenize."""

    model: str | None = Field(default=None, max_length=1024)
    tokens: Annotated[list[_TokenId], Field(max_length=1 << 20, fail_fast=True)]
