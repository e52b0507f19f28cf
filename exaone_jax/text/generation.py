"""Which EXAONE generation a checkpoint is, and each generation's text rules, as data.

Sources: the generations' chat templates and model cards, as rendered with the reference jinja environment.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Literal

from exaone_jax.errors import ConfigError


class Generation(StrEnum):
    """A family of checkpoints that share chat format and text rules."""

    EXAONE_3 = "3"  # 3.0 and 3.5
    DEEP = "deep"
    EXAONE_4 = "4"  # 4.0 and 4.0.1
    K = "k"  # K-EXAONE 236B
    EXAONE_4_5 = "4.5"
    K_2 = "2"  # K-EXAONE 2.0


Thinking = Literal["never", "always", "off", "on"]  # "off" and "on" are defaults that enable_thinking overrides
ToolFormat = Literal["json", "xml"]


@dataclass(frozen=True)
class GenerationRules:
    """The text rules of one generation."""

    generation: Generation
    template: str  # the built-in template's file name in chat_templates/
    thinking: Thinking
    reasoning_start: str | None
    reasoning_end: str | None
    tool_format: ToolFormat | None
    template_kwargs: frozenset[str]  # what the built-in template reads beyond enable_thinking
    end_of_turn: str

    @property
    def thinks_by_default(self) -> bool:
        """Whether a prompt opens reasoning when the caller says nothing."""
        return self.thinking in ("always", "on")


def _rules(
    generation: Generation,
    template: str,
    thinking: Thinking,
    markers: tuple[str | None, str | None],
    tool_format: ToolFormat | None,
    template_kwargs: tuple[str, ...],
    end_of_turn: str,
) -> GenerationRules:
    return GenerationRules(
        generation, template, thinking, *markers, tool_format, frozenset(template_kwargs), end_of_turn
    )


_THINK = ("<think>", "</think>")
_BRACKET_END, _ANGLE_END = "[|endofturn|]", "<|endofturn|>"

RULES: Mapping[Generation, GenerationRules] = {
    rules.generation: rules
    for rules in (
        _rules(Generation.EXAONE_3, "exaone3.jinja", "never", (None, None), None, (), _BRACKET_END),
        _rules(Generation.DEEP, "exaone_deep.jinja", "always", ("<thought>", "</thought>"), None, (), _BRACKET_END),
        _rules(Generation.EXAONE_4, "exaone4.jinja", "off", _THINK, "json", ("skip_think",), _BRACKET_END),
        _rules(Generation.K, "k_exaone.jinja", "on", _THINK, "json", ("skip_think",), _ANGLE_END),
        _rules(Generation.EXAONE_4_5, "k_exaone.jinja", "on", _THINK, "json", ("skip_think",), _ANGLE_END),
        _rules(Generation.K_2, "k_exaone2.jinja", "on", _THINK, "xml", ("preserve_thinking",), _ANGLE_END),
    )
}

TOOL_CALL = ("<tool_call>", "</tool_call>")

# What is read in a model's text, so it must be in it, even where a tokenizer.json flags it as special.
READ_MARKERS = frozenset(TOOL_CALL).union(
    marker for rules in RULES.values() for marker in (rules.reasoning_start, rules.reasoning_end) if marker
)

# config.json keys that only K-EXAONE 2.0 carries
_K_2_CONFIG_KEYS = ("swiglu_limits", "mtp_num_speculative_steps")


def detect_generation(
    config: Mapping[str, Any], *, template: str | None = None, tokens: Collection[str] = ()
) -> Generation:
    """The generation of a checkpoint.

    Args:
      config: the parsed config.json.
      template: the source of the checkpoint's own chat template, where it has one.
      tokens: the tokenizer's added tokens; tells a text-only EXAONE 4.5 (model_type exaone4) from a 4.0.

    Raises:
      ConfigError: model_type is missing or not an EXAONE language model's.
    """
    model_type = config.get("model_type")
    template = template or ""
    if model_type == "exaone":
        # Deep and 3.5 share config and tokenizer: only the template, or the name, tells them apart.
        name = str(config.get("_name_or_path") or "")
        return Generation.DEEP if "<thought>" in template or "EXAONE-Deep" in name else Generation.EXAONE_3
    if model_type in ("exaone4_5", "exaone4_5_text"):
        return Generation.EXAONE_4_5
    if model_type == "exaone4":
        angle = "<|assistant|>" in template if template else "<|assistant|>" in tokens
        return Generation.EXAONE_4_5 if angle else Generation.EXAONE_4
    if model_type == "exaone_moe":
        second = "<function=" in template if template else any(config.get(key) for key in _K_2_CONFIG_KEYS)
        return Generation.K_2 if second else Generation.K
    raise ConfigError(f"config.json: model_type is {model_type!r}; expected exaone, exaone4, exaone4_5 or exaone_moe")
