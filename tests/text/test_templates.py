import pytest

from exaone_jax.errors import CheckpointError, InputError
from exaone_jax.text import ChatTemplate, Generation, Tokenizer, render_chat

USER = {"role": "user", "content": "hi"}
SYSTEM = {"role": "system", "content": "S"}
TALK = [SYSTEM, USER, {"role": "assistant", "content": "ANS"}, {"role": "user", "content": "q2"}]
TOOLS = [{"type": "function", "function": {"name": "f", "description": "<날씨>", "parameters": {"type": "object"}}}]
TOOL_JSON = '{"type": "function", "function": {"name": "f", "description": "<날씨>", "parameters": {"type": "object"}}}'
CALL = {"function": {"name": "f", "arguments": '{"도시": "서울", "n": 2}'}}
LOOP = [
    USER,
    {"role": "assistant", "content": "", "reasoning_content": "REASON", "tool_calls": [CALL, CALL]},
    {"role": "tool", "content": "42"},
    {"role": "tool", "content": {"a": 1}},
]
BUILTIN = {generation: ChatTemplate.for_generation(generation) for generation in Generation}


def render(generation, messages, **kwargs):
    return render_chat(messages, BUILTIN[Generation(generation)], **kwargs)


def test_exaone_3():
    assert render("3", TALK) == (
        "[|system|]S[|endofturn|]\n[|user|]hi\n[|assistant|]ANS[|endofturn|]\n[|user|]q2\n[|assistant|]"
    )
    assert render("3", [USER]) == "[|system|][|endofturn|]\n[|user|]hi\n[|assistant|]"
    assert render("3", [USER], add_generation_prompt=False) == "[|system|][|endofturn|]\n[|user|]hi\n"


def test_deep():
    answer = {"role": "assistant", "content": "<thought>\nhmm</thought>\n\nANS"}
    assert render("deep", [USER, answer, USER]) == (
        "[|system|][|endofturn|]\n[|user|]hi\n[|assistant|]ANS[|endofturn|]\n[|user|]hi\n[|assistant|]<thought>\n"
    )


def test_exaone_4():
    head = "[|user|]\nhi[|endofturn|]\n[|assistant|]\n<think>\n"
    assert render("4", [USER]) == render("4", [USER], enable_thinking=False) == head + "\n</think>\n\n"
    assert render("4", [USER], enable_thinking=True) == head
    assert render("4", TALK).startswith(
        "[|system|]\nS[|endofturn|]\n[|user|]\nhi[|endofturn|]\n"
        "[|assistant|]\n<think>\n\n</think>\n\nANS[|endofturn|]\n[|user|]\nq2[|endofturn|]\n"
    )


def test_exaone_4_keeps_the_last_reasoning_whole_on_request():
    talk = [USER, {"role": "assistant", "content": "<think>\nREASON\n</think>\n\nANS"}]
    kept = "[|assistant|]\n<think>\nREASON\n</think>\n\nANS[|endofturn|]\n"
    dropped = "[|assistant|]\n<think>\n\n</think>\n\nANS[|endofturn|]\n"
    assert render("4", talk, skip_think=False, add_generation_prompt=False).endswith(kept)
    assert render("4", talk, add_generation_prompt=False).endswith(dropped)
    assert dropped in render("4", [*talk, USER], skip_think=False)


def test_exaone_4_tools():
    with_system, without = render("4", [SYSTEM, USER], tools=TOOLS), render("4", [USER], tools=TOOLS)
    assert with_system.startswith("[|system|]\nS\n\n# Available Tools")
    assert without.startswith("[|system|]\n# Available Tools")
    assert f"\n<tool>{TOOL_JSON}</tool>\n" in with_system
    call = '<tool_call>{"name": "f", "arguments": {"도시": "서울", "n": 2}}</tool_call>'
    assert render("4", LOOP, add_generation_prompt=False) == (
        "[|user|]\nhi[|endofturn|]\n[|assistant|]\n<think>\n\n</think>\n\n" + call + "\n" + call + "[|endofturn|]\n"
        '[|tool|]\n<tool_result>{"result": "42"}</tool_result>\n<tool_result>{"result": {"a": 1}}</tool_result>'
        "[|endofturn|]\n"
    )


@pytest.mark.parametrize("generation", ["k", "4.5", "2"])
def test_k_exaone(generation):
    head = "<|user|>\nhi<|endofturn|>\n<|assistant|>\n<think>\n"
    assert render(generation, [USER]) == render(generation, [USER], enable_thinking=True) == head
    assert render(generation, [USER], enable_thinking=False) == head + "\n</think>\n\n"
    assert render(generation, TALK) == (
        "<|system|>\nS<|endofturn|>\n<|user|>\nhi<|endofturn|>\n<|assistant|>\n<think>\n\n</think>\n\nANS<|endofturn|>\n"
        "<|user|>\nq2<|endofturn|>\n<|assistant|>\n<think>\n"
    )


@pytest.mark.parametrize("generation", ["k", "4.5"])
def test_k_exaone_tools_and_reasoning_through_a_tool_loop(generation):
    assert render(generation, [SYSTEM, USER], tools=TOOLS, enable_thinking=False) == (
        f"<|tool_declare|>\n# Tools\n<tool>{TOOL_JSON}</tool>\n<|endofturn|>\n<|system|>\nS<|endofturn|>\n"
        "<|user|>\nhi<|endofturn|>\n<|assistant|>\n<think>\n\n</think>\n\n"
    )
    call = '<tool_call>{"name": "f", "arguments": {"도시": "서울", "n": 2}}</tool_call>'
    loop = (
        "<|user|>\nhi<|endofturn|>\n<|assistant|>\n<think>\nREASON\n</think>\n\n"
        + call
        + "\n"
        + call
        + "<|endofturn|>\n"
        '<|tool|>\n<tool_result>42</tool_result>\n<tool_result>{"a": 1}</tool_result><|endofturn|>\n'
    )
    assert render(generation, LOOP, add_generation_prompt=False) == loop
    gone = loop.replace("REASON", "")
    assert render(generation, LOOP, add_generation_prompt=False, skip_think=True) == gone
    assert render(generation, [*LOOP, USER], add_generation_prompt=False).startswith(gone)


def test_k_exaone_2_tools():
    prompt = render("2", [USER], tools=TOOLS)
    assert prompt.startswith(f"<|tool_declare|>\n# Tools\n<tool>{TOOL_JSON}</tool>\n# Tool Call Format\n")
    rendered = render("2", LOOP, add_generation_prompt=False)
    call = (
        "<tool_call>\n<function=f>\n<parameter=도시>\n서울\n</parameter>\n<parameter=n>\n2\n</parameter>\n</function>\n"
    )
    assert call + "</tool_call>\n" + call + "</tool_call><|endofturn|>\n" in rendered
    assert "REASON" in rendered
    assert "REASON" not in render("2", [*LOOP, USER])
    assert "REASON" in render("2", [*LOOP, USER], preserve_thinking=True)


@pytest.mark.parametrize("generation", Generation)
@pytest.mark.parametrize("thinking", [None, True, False])
def test_equals_transformers_on_the_same_template(generation, thinking, tokenizer_dir):
    transformers = pytest.importorskip("transformers")
    template = BUILTIN[generation]
    theirs = transformers.AutoTokenizer.from_pretrained(tokenizer_dir)
    talks = [TALK, [USER]]
    if template.rules.tool_format:
        arguments = {"function": {"name": "f", "arguments": {"도시": "서울", "n": 2}}}
        talks += [[LOOP[0], {**LOOP[1], "tool_calls": [arguments] * 2}, *LOOP[2:]], [SYSTEM, *LOOP[:1]]]
    kwargs = {} if "enable_thinking" not in template.variables or thinking is None else {"enable_thinking": thinking}
    for talk in talks:
        tools = TOOLS if template.rules.tool_format else None
        expected = theirs.apply_chat_template(
            talk, tools=tools, chat_template=template.source, tokenize=False, add_generation_prompt=True, **kwargs
        )
        assert render_chat(talk, template, tools=tools, **kwargs) == expected


FEATURES = """{%- generation -%}
{% for m in messages %}
    {% if loop.index0 == 3 %}{% break %}{% endif %}
  {{ m.role }}:{{ m.content | trim }}
{% endfor %}
{%- endgeneration -%}
{{ {'한': '<&>'} | tojson }}{{ dict(a=1) | tojson(indent=2) }}{{ bos_token }}{{ strftime_now('%%') }}
{%- set ns = namespace(x=1) %}{% set ns.x = ns.x + 1 %}{{ ns.x }}{{ messages | length }}"""


def test_environment_features_equal_transformers(tokenizer, tokenizer_dir):
    transformers = pytest.importorskip("transformers")
    ours = ChatTemplate(FEATURES, Generation.EXAONE_3, tokenizer.named_tokens)
    theirs = transformers.AutoTokenizer.from_pretrained(tokenizer_dir)
    assert render_chat(TALK, ours) == theirs.apply_chat_template(TALK, chat_template=FEATURES, tokenize=False)


@pytest.mark.parametrize(
    "source",
    [
        "{{ messages.__class__.__mro__ }}",
        "{{ messages.append(1) }}",
        "{{ ''.__class__ }}{{ cycler.__init__.__globals__ }}",
        "{{ dict.fromkeys.__self__ }}",
        "{% set ns = namespace(__x__=1) %}",
        "{% set ns = namespace() %}{% set ns.__x__ = 1 %}",
        "{{ raise_exception('no') }}",
        "{{ messages[0].content.format_map(1).x.y }}",
        "{{ range(10**9) }}",
        "{% include 'x' %}",
    ],
)
def test_sandbox(source):
    template = ChatTemplate(source, Generation.EXAONE_3)
    try:
        rendered = render_chat([USER], template)
    except InputError:
        return
    assert rendered == ""  # an unsafe attribute is undefined, and prints nothing


def test_a_template_that_does_not_compile():
    with pytest.raises(CheckpointError, match="does not compile"):
        ChatTemplate("{% if %}", Generation.EXAONE_3)


@pytest.mark.parametrize(
    ("generation", "kwargs", "match"),
    [
        ("4", {"enable_thinking": "no"}, "enable_thinking"),
        ("4", {"enable_thinking": 1}, "enable_thinking"),
        ("4", {"skip_think": "x"}, "skip_think"),
        ("4", {"preserve_thinking": True}, "does not read it"),
        ("4", {"tokenize": True}, "unknown"),
        ("4", {"chat_template": "x"}, "unknown"),
        ("4", {"__class__": True}, "unknown"),
        ("4", {"messages": []}, None),
        ("3", {"enable_thinking": True}, "cannot think"),
        ("deep", {"enable_thinking": False}, "always thinks"),
        ("3", {"tools": TOOLS}, "does not support tools"),
    ],
)
def test_bad_arguments(generation, kwargs, match):
    with pytest.raises(TypeError if match is None else InputError, match=match):
        render(generation, [USER], **kwargs)


def test_what_a_template_cannot_show_is_refused():
    with pytest.raises(InputError, match=r"messages\[1\].*tools"):
        render("3", LOOP)
    assert render("3", [USER], enable_thinking=False) == render("3", [USER])
    assert render("deep", [USER], enable_thinking=True) == render("deep", [USER])


def test_a_checkpoints_own_template_comes_first(tokenizer):
    own = Tokenizer(tokenizer._raw, chat_templates={"default": "A{{ messages[0].content }}", "rag": "R"})
    assert render_chat([USER], ChatTemplate.for_tokenizer(own, "3")) == "Ahi"
    assert render_chat([USER], ChatTemplate.for_tokenizer(own, "3", "rag")) == "R"
    with pytest.raises(CheckpointError, match="tool_use"):
        ChatTemplate.for_tokenizer(own, "3", "tool_use")
    assert ChatTemplate.for_tokenizer(tokenizer, "k").builtin
