"""A conversation to learn from: its token ids, and which of them the assistant said.

The whole conversation is rendered once, so thinking is kept or dropped as the template does. An assistant's turn begins
where the template's own generation prompt for it ends, which must be a prefix of the whole, and ends with the end-of-turn
token. What the generation prompt writes, an empty block of reasoning included, is not to be learnt. The text is cut where
a turn begins, so that what is learnt follows the very ids that a prompt ends with.

EXAONE Deep thinks in every answer and its template prints no thought, the last one's neither. Of its conversations the last turn
is learnt, as the model would say it after its prompt; those before are printed without their thoughts, as it would see them.
"""

from dataclasses import dataclass
from typing import Any

from exaone_jax.errors import InputError
from exaone_jax.text.chat import Marker
from exaone_jax.text.templates import ChatRequest, ChatTemplate, prepare
from exaone_jax.text.tokenizer import Tokenizer


@dataclass(frozen=True)
class EncodedTurns:
    """A conversation.

    Attributes:
      ids: its token ids.
      loss_mask: which of them are to be learnt.
      reasoning_dropped: how many of the turns to be learnt came with reasoning that the template left out.
    """

    ids: list[int]
    loss_mask: list[bool]
    reasoning_dropped: int


def encode_turns(
    tokenizer: Tokenizer,
    messages: Any,
    template: ChatTemplate,
    *,
    tools: Any = None,
    given: int = 0,
    enable_thinking: bool | None = None,
    **template_kwargs: Any,
) -> EncodedTurns:
    """The ids of a conversation, to learn the assistant's turns among `messages[given:]`.

    Arguments as `encode_chat`. Raises InputError also where there is no such turn, one is empty, or the template does not
    render it as it would prompt for it; for EXAONE Deep, where the last turn is not the assistant's with a thought.
    """
    request = prepare(messages, template, tools, enable_thinking, template_kwargs)
    turns = [i for i, message in enumerate(request.messages) if message["role"] == "assistant" and i >= given]
    if not turns:
        raise InputError("messages: no assistant turn to learn")
    for turn in turns:
        _check_not_empty(request.messages[turn], turn)
    marker = Marker(tokenizer, template, request)
    if template.rules.thinking == "always":
        turns, (text, *said) = turns[-1:], _last_turn(marker, template, request)
    else:
        whole = marker.render(add_generation_prompt=False)
        starts = [_start(marker, template, request, turn, whole) for turn in turns]
        text, *said = (whole[a:b] for a, b in zip([0, *starts], [*starts, len(whole)], strict=True))
    ids = tokenizer.encode_marked(text, marker.mark)
    loss_mask, dropped = [False] * len(ids), 0
    for turn, text in zip(turns, said, strict=True):
        rest = tokenizer.encode_marked(text, marker.mark)
        end = next((place for place, token in enumerate(rest) if token in tokenizer.eos_ids), None)
        if end is None:
            raise InputError(
                f"messages[{turn}]: the chat template ends this turn with none of the tokenizer's eos tokens"
            )
        ids += rest
        loss_mask += [place <= end for place in range(len(rest))]
        dropped += _reasoning(request.messages[turn], template) not in text.replace(marker.mark, "")
    return EncodedTurns(ids, loss_mask, dropped)


def _check_not_empty(message: dict[str, Any], turn: int) -> None:
    said = (message["content"], message.get("reasoning_content", ""))
    if not message.get("tool_calls") and not any(text.strip() for text in said):
        raise InputError(f"messages[{turn}]: empty assistant turn; expected content, reasoning_content or tool_calls")


def _last_turn(marker: Marker, template: ChatTemplate, request: ChatRequest) -> tuple[str, str]:
    """(the prompt for the last turn, that turn as the model says it after its prompt, which opens the thought)."""
    *before, last = request.messages
    rules, turn = template.rules, len(before)
    start, end = str(rules.reasoning_start), str(rules.reasoning_end)
    if last["role"] != "assistant":
        raise InputError(
            f"messages[{turn}]: {last['role']} comes last; this template prompts for one turn, the last, to be learnt"
        )
    thought, answer = last.get("reasoning_content", ""), last["content"]
    if not thought and end in answer:
        thought, answer = answer.split(end, 1)
    thought = thought.strip("\n").removeprefix(start).strip("\n")
    if not thought.strip():
        raise InputError(
            f"messages[{turn}]: no reasoning, and this model always thinks; expected reasoning_content, or content that has "
            f"{start}…{end} before the answer"
        )
    said = f"{marker.mark_text(thought)}\n{end}\n\n{marker.mark_text(answer.lstrip(chr(10)))}{rules.end_of_turn}\n"
    return marker.render_part(before, True, request.kwargs, marker.reads_reasoning), said


def _start(marker: Marker, template: ChatTemplate, request: ChatRequest, turn: int, text: str) -> int:
    """Where in the rendered text the assistant's turn begins.

    What came before may have lost its reasoning in the whole that it would still have in a prompt for this turn, and the
    turn itself may be printed with the empty reasoning of a prompt that asks for none.
    """
    before = request.messages[:turn]
    variants = [request.kwargs]
    if "enable_thinking" in request.kwargs:
        variants = [{**request.kwargs, "enable_thinking": thinking} for thinking in (False, True)]
    bare = [_without_reasoning(message, template) for message in before]
    found = 0
    for history in (before, bare):
        for kwargs in variants if history else ():
            prompt = marker.render_part(history, True, kwargs, marker.reads_reasoning)
            if text.startswith(prompt):
                found = max(found, len(prompt))
    if not found:
        raise InputError(
            f"messages[{turn}]: the chat template does not print this turn as it prompts for it, so where it begins is not "
            "known; render such conversations to prompt and completion strings"
        )
    return found


def _reasoning(message: dict[str, Any], template: ChatTemplate) -> str:
    """The first words of a turn's reasoning, as a template that keeps it would print them; empty where there is none."""
    reasoning = message.get("reasoning_content", "")
    end = template.rules.reasoning_end
    if not reasoning and end and end in message["content"]:
        reasoning = message["content"].split(end)[0].split(template.rules.reasoning_start or end)[-1]
    return reasoning.strip()[:32].strip()


def _without_reasoning(message: dict[str, Any], template: ChatTemplate) -> dict[str, Any]:
    if message["role"] != "assistant":
        return message
    kept = {key: value for key, value in message.items() if key not in ("reasoning_content", "reasoning", "thinking")}
    end = template.rules.reasoning_end
    return {**kept, "content": message["content"].split(end)[-1].lstrip("\n")} if end else kept
