import pytest

from exaone_jax.errors import InputError
from exaone_jax.text.messages import check_messages, check_tools

USER = {"role": "user", "content": "hi"}


def call(arguments):
    return {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f", "arguments": arguments}}]}


def nested(depth):
    value = {}
    for _ in range(depth):
        value = {"a": value}
    return value


@pytest.mark.parametrize(
    ("messages", "match"),
    [
        ([], "empty"),
        (None, "expected a list"),
        ("hi", "expected a list"),
        (USER, "expected a list"),
        ([USER, "x"], r"messages\[1\]: expected an object"),
        ([USER, {"content": "x"}], r"messages\[1\]: role is missing"),
        ([{"role": "robot", "content": "x"}], r"messages\[0\]: role is 'robot'"),
        ([{"role": ["user"], "content": "x"}], r"messages\[0\]: role"),
        ([{"role": "user"}], r"messages\[0\]: content is missing"),
        ([{"role": "user", "content": None}], r"messages\[0\]: content is missing"),
        ([{"role": "assistant", "content": None}], r"messages\[0\]: content is missing"),
        ([{"role": "user", "content": 5}], "content is int"),
        ([{"role": "user", "content": {"a": 1}}], "content is dict"),
        ([{"role": "user", "content": []}], "content is list"),
        ([{"role": "user", "content": ["a"]}], "text parts"),
        ([{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}], r"content\[0\]: type is 'image_url'"),
        ([{"role": "user", "content": [{"type": "text", "text": 1}]}], r"content\[0\]: text is int"),
        ([{"role": "user", "content": "a\ud800"}], "surrogate"),
        ([{"role": "user", "content": "a", "tool_calls": []}], "only the assistant"),
        ([{"role": "assistant", "content": "a", "reasoning_content": 1}], "reasoning_content is int"),
        ([{"role": "assistant", "tool_calls": {}}], "tool_calls is dict"),
        ([{"role": "assistant", "tool_calls": [{}]}], r"tool_calls\[0\]: expected an object with function.name"),
        ([call("{broken")], "arguments: not JSON"),
        ([call(5)], "arguments: int"),
        ([call(nested(100))], "nested more than"),
        ([{"role": "user", "content": "a", "extra": {1: 2}}], "not a string"),
        ([{"role": "user", "content": "a", "extra": object()}], "not JSON"),
        ([{"role": "user", "content": "a", "extra": float("nan")}], "not JSON"),
    ],
)
def test_bad_messages(messages, match):
    with pytest.raises(InputError, match=match):
        check_messages(messages)


@pytest.mark.parametrize(
    "tools", ["x", {"a": 1}, [1], [{}], [{"function": {"name": ""}}], [{"function": nested(3000)}]]
)
def test_bad_tools(tools):
    with pytest.raises(InputError, match="tools"):
        check_tools(tools)


def test_shapes_become_one():
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    assert check_messages([{"role": "user", "content": parts}])[0]["content"] == "ab"
    assert check_messages([{"role": "assistant", "content": "x", "reasoning": "r"}])[0]["reasoning_content"] == "r"
    assert check_messages([{"role": "tool", "content": {"a": [1]}}])[0]["content"] == {"a": [1]}
    for arguments in ('{"도시": "서울"}', {"도시": "서울"}):
        message = check_messages([call(arguments)])[0]
        assert message["tool_calls"][0]["function"]["arguments"] == {"도시": "서울"}
        assert message["content"] == ""
    assert check_messages([call("")])[0]["tool_calls"][0]["function"]["arguments"] == {}
    assert check_messages([call("5")])[0]["tool_calls"][0]["function"]["arguments"] == 5  # a bare value, as 4.0 allows
    assert check_tools([]) is None
    assert check_tools(None) is None


def test_the_callers_objects_are_not_changed():
    message = call('{"a": 1}')
    check_messages([message])
    assert message == call('{"a": 1}')
