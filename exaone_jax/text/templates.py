"""Chat templates: a checkpoint's own, or the built-in one of its generation, run in jinja2's immutable sandbox.

The environment is the one that templates on the Hub are written for (transformers': trimmed blocks, `tojson` without
HTML escapes, `raise_exception`, `strftime_now`, loop controls, the `generation` tag). Templates come from checkpoints
and from this package, never from a request; a request's keyword arguments pass a white list.
"""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from functools import cached_property
from importlib import resources
from pathlib import Path
from typing import Any

import jinja2
import jinja2.ext
import jinja2.meta
import jinja2.nodes
import jinja2.parser
import jinja2.utils
from jinja2.sandbox import ImmutableSandboxedEnvironment

from exaone_jax.config.hf import read_raw_config
from exaone_jax.errors import CheckpointError, InputError
from exaone_jax.text.generation import RULES, Generation, GenerationRules, detect_generation
from exaone_jax.text.messages import check_messages, check_tools
from exaone_jax.text.tokenizer import Tokenizer

TEMPLATE_KWARGS = ("enable_thinking", "skip_think", "preserve_thinking")  # the white list; each is a bool


@dataclass(frozen=True)
class ChatTemplate:
    """A chat template with the rules of its generation.

    Attributes:
      source: the jinja source.
      generation: whose thinking default and markers apply.
      special_tokens: "bos_token", "eos_token", … -> spelling, visible to the template.
      builtin: whether it is this package's own.
    """

    source: str
    generation: Generation
    special_tokens: Mapping[str, str] = field(default_factory=dict)
    builtin: bool = False

    def __post_init__(self) -> None:
        _ = self.compiled  # a broken template is a fault of the checkpoint, told when it is loaded

    @classmethod
    def for_generation(cls, generation: Generation | str) -> "ChatTemplate":
        """The built-in template of a generation."""
        generation = Generation(generation)
        file = resources.files("exaone_jax.text") / "chat_templates" / RULES[generation].template
        return cls(file.read_text(encoding="utf-8"), generation, builtin=True)

    @classmethod
    def for_tokenizer(cls, tokenizer: Tokenizer, generation: Generation | str, name: str = "default") -> "ChatTemplate":
        """The checkpoint's own template of that name, or the generation's built-in one if the checkpoint has none.

        Raises:
          CheckpointError: the template does not compile, or the checkpoint has templates but none of that name.
        """
        if not tokenizer.chat_templates:
            return cls.for_generation(generation)
        if name not in tokenizer.chat_templates:
            found = ", ".join(sorted(tokenizer.chat_templates))
            raise CheckpointError(f"chat template {name!r}: not in the checkpoint, which has {found}")
        return cls(tokenizer.chat_templates[name], Generation(generation), tokenizer.named_tokens)

    @classmethod
    def for_checkpoint(cls, directory: str | os.PathLike[str], tokenizer: Tokenizer) -> "ChatTemplate":
        """The template of a checkpoint directory, whose config.json tells the generation.

        Raises:
          ConfigError: config.json is missing, or not of an EXAONE language model.
          CheckpointError: as `for_tokenizer`.
        """
        own = tokenizer.chat_templates.get("default")
        config = read_raw_config(Path(directory))
        return cls.for_tokenizer(tokenizer, detect_generation(config, template=own, tokens=tokenizer.control_tokens))

    @property
    def rules(self) -> GenerationRules:
        return RULES[self.generation]

    @cached_property
    def compiled(self) -> jinja2.Template:
        try:
            return _ENVIRONMENT.from_string(self.source)
        except (jinja2.TemplateError, RecursionError) as error:
            raise CheckpointError(f"chat template: does not compile: {error}") from error

    @cached_property
    def variables(self) -> frozenset[str]:
        """The names that the template reads from outside."""
        return frozenset(jinja2.meta.find_undeclared_variables(_ENVIRONMENT.parse(self.source)))

    def render(
        self,
        messages: list[dict[str, Any]],
        tools: list[dict[str, Any]] | None,
        add_generation_prompt: bool,
        kwargs: Mapping[str, Any],
    ) -> str:
        """The prompt of checked messages. Raises InputError where the template refuses or fails on them."""
        values = {
            **self.special_tokens,
            **kwargs,
            "messages": messages,
            "tools": tools,
            "documents": None,
            "add_generation_prompt": add_generation_prompt,
        }
        try:
            return self.compiled.render(values)
        except Exception as error:  # a template can raise anything on messages it was not written for
            raise InputError(f"the chat template cannot render these messages: {error}") from error


def render_chat(
    messages: Any,
    template: ChatTemplate,
    *,
    tools: Any = None,
    enable_thinking: bool | None = None,
    add_generation_prompt: bool = True,
    **template_kwargs: Any,
) -> str:
    """The prompt string of a conversation.

    To get token ids use `encode_chat`, not the encoding of this string: in it, a user's spelling of a control token
    cannot be told from the template's own.

    Args:
      messages: as the OpenAI chat format: objects with role (system, user, assistant, tool) and content.
      tools: as the OpenAI chat format, or None.
      enable_thinking: None takes the generation's default (off for 4.0, on for K-EXAONE, 4.5 and 2.0).
      template_kwargs: skip_think, preserve_thinking: bools, each refused if the template does not read it.

    Raises:
      InputError: messages, tools or an argument are wrong (with the index), or the template refuses them.
    """
    request = prepare(messages, template, tools, enable_thinking, template_kwargs)
    return template.render(request.messages, request.tools, add_generation_prompt, request.kwargs)


@dataclass(frozen=True)
class ChatRequest:
    """A checked conversation: what a template is rendered with."""

    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]] | None
    kwargs: dict[str, bool]


def prepare(
    messages: Any, template: ChatTemplate, tools: Any, enable_thinking: bool | None, template_kwargs: Mapping[str, Any]
) -> ChatRequest:
    """Check everything that a request brings. Nothing in it is ignored: what the template cannot do is refused."""
    checked, checked_tools = check_messages(messages), check_tools(tools)
    if checked_tools and "tools" not in template.variables:
        raise InputError("tools: this checkpoint's chat template does not support tools")
    for index, message in enumerate(checked):
        wanted = "tool" if message["role"] == "tool" else "tool_calls" if message.get("tool_calls") else None
        if wanted and wanted not in template.source:
            raise InputError(f"messages[{index}]: this checkpoint's chat template does not support tools")
    kwargs = _check_kwargs(template, template_kwargs)
    return ChatRequest(checked, checked_tools, kwargs | _thinking(template, enable_thinking))


def _check_kwargs(template: ChatTemplate, given: Mapping[str, Any]) -> dict[str, bool]:
    for name, value in given.items():
        if name not in TEMPLATE_KWARGS:
            raise InputError(f"chat template argument {name!r}: unknown; expected one of {', '.join(TEMPLATE_KWARGS)}")
        if not isinstance(value, bool):
            raise InputError(f"chat template argument {name}: {value!r}; expected true or false")
        if name not in template.variables:
            raise InputError(f"chat template argument {name}: this checkpoint's chat template does not read it")
    return dict(given)


def _thinking(template: ChatTemplate, enable_thinking: bool | None) -> dict[str, bool]:
    """enable_thinking as the template shall see it: the caller's, or else the generation's default."""
    if enable_thinking is not None and not isinstance(enable_thinking, bool):
        raise InputError(f"enable_thinking: {enable_thinking!r}; expected true or false")
    default = template.rules.thinks_by_default
    wanted = default if enable_thinking is None else enable_thinking
    if "enable_thinking" in template.variables:
        return {"enable_thinking": wanted}
    if wanted != default:
        state = "always thinks" if default else "cannot think"
        raise InputError(f"enable_thinking: {wanted}; this checkpoint's chat template {state}")
    return {}


class _Generation(jinja2.ext.Extension):
    """`{% generation %}…{% endgeneration %}` marks what the assistant says, for training; it prints its body."""

    tags = {"generation"}  # noqa: RUF012 (jinja2 declares it so)

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _Namespace(jinja2.utils.Namespace):
    """jinja's namespace without names that begin with an underscore, which reach into Python."""

    def __init__(*args: Any, **kwargs: Any) -> None:
        # `self` is positional only, so that a template may write namespace(self=…)
        values = dict(*args[1:], **kwargs)
        for name in values:
            _check_name(name)
        jinja2.utils.Namespace.__init__(args[0], values)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        super().__setitem__(name, value)


def _check_name(name: Any) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise jinja2.exceptions.SecurityError(f"namespace attribute {name!r} begins with an underscore")


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _strftime_now(format: str) -> str:
    return datetime.now().strftime(format)


def _make_dict(*args: Any, **kwargs: Any) -> dict[Any, Any]:
    return dict(*args, **kwargs)  # the class itself would offer its methods to the template


def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    names: dict[str, Any] = {
        "raise_exception": _raise_exception,
        "strftime_now": _strftime_now,
        "dict": _make_dict,
        "namespace": _Namespace,
    }
    for name, value in names.items():
        environment.globals[name] = value
    return environment


_ENVIRONMENT = _environment()
