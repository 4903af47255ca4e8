"""Replies that call tools, taken apart: as mlx-lm's parsers read them, and the same however the text comes in pieces."""

from __future__ import annotations

import importlib
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agentmem.model.calls import ArgumentsPart, CallPart, Marks, TextPart, taken_apart
from agentmem.model.grammar import Grammars
from agentmem.model.random import byte_tokenizer
from agentmem.model.tools import ToolFormat

TOOLS: list[dict[str, Any]] = [
    {
        "type": "function",
        "function": {
            "name": "get_weather",
            "parameters": {
                "type": "object",
                "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
                "required": ["city", "days"],
            },
        },
    }
]
WANTED = {"city": "Oslo", "days": 3}
CALL = json.dumps({"name": "get_weather", "arguments": WANTED})


class Wrapper:
    """What mlx-lm's tokenizer says of its tools."""

    def __init__(self, kind: str | None) -> None:
        module = importlib.import_module(f"mlx_lm.tool_parsers.{kind}") if kind else None
        self.init_kwargs = {"tool_parser_type": kind} if kind else {}
        self.tool_parser = module.parse_tool_call if module else None
        self.tool_call_start = module.tool_call_start if module else None
        self.tool_call_end = module.tool_call_end if module else None


SAID = {
    "json_tools": f"<tool_call>\n{CALL}\n</tool_call>",
    "mistral": f"[TOOL_CALLS][{CALL}]",
    "qwen3_coder": (
        "<tool_call>\n<function=get_weather>\n<parameter=city>\nOslo\n</parameter>\n<parameter=days>\n3\n</parameter>\n"
        "</function>\n</tool_call>"
    ),
    "pythonic": '<|tool_call_start|>[get_weather(city="Oslo", days=3)]<|tool_call_end|>',
    "glm47": (
        "<tool_call>get_weather<arg_key>city</arg_key><arg_value>Oslo</arg_value>"
        "<arg_key>days</arg_key><arg_value>3</arg_value></tool_call>"
    ),
}


@pytest.mark.parametrize("kind", SAID)
def test_each_notation_is_read(kind: str) -> None:
    text, calls = ToolFormat(Wrapper(kind), native=True).apart(f"Let me look. {SAID[kind]}", TOOLS)
    assert text == "Let me look."
    assert [(call.name, json.loads(call.arguments)) for call in calls] == [("get_weather", WANTED)]


def test_a_bare_object_is_a_call_only_of_a_tool_that_is_there() -> None:
    form = ToolFormat(Wrapper(None), native=True)
    text, calls = form.apart('{"name": "get_weather", "parameters": {"city": "Oslo", "days": 3}}', TOOLS)
    assert (text, json.loads(calls[0].arguments)) == ("", WANTED)
    for other in ('{"name": "Ada", "age": 7}', "{not JSON", 'See {"name": "get_weather", "parameters": {}}'):
        assert form.apart(other, TOOLS) == (other, [])


@pytest.mark.parametrize(
    "said",
    [
        "<tool_call>\nnothing of the kind\n</tool_call>",
        '<tool_call>\n{"name": "get_w',
        "a < b <tool",
        "  spaces  ",
    ],
)
def test_what_is_no_call_is_text_as_it_stands(said: str) -> None:
    text, calls = ToolFormat(Wrapper("json_tools"), native=True).apart(said, TOOLS)
    assert (text, calls) == (said, [])


def test_arguments_that_were_cut_off_are_given_as_far_as_they_go() -> None:
    said = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Os'
    text, calls = ToolFormat(Wrapper("json_tools"), native=True).apart(said, TOOLS)
    assert (text, calls[0].name, calls[0].arguments) == ("", "get_weather", '{"city": "Os')


@given(
    st.lists(st.sampled_from(["Oh. ", *SAID.values(), "\n", "{", '"', "<tool", "<tool_call>"]), max_size=5),
    st.data(),
)
def test_pieces_add_up_to_the_whole(parts: list[str], data: st.DataObject) -> None:
    said = "".join(parts)
    form = ToolFormat(Wrapper("json_tools"), native=True)
    whole_text, whole_calls = form.apart(said, TOOLS)
    reader, found, rest = form.reader(TOOLS), [], said
    while rest:
        n = data.draw(st.integers(1, len(rest)))
        found += reader.add(rest[:n])
        rest = rest[n:]
    found += reader.finish()
    assert "".join(part.text for part in found if isinstance(part, TextPart)) == whole_text
    assert [part.name for part in found if isinstance(part, CallPart)] == [call.name for call in whole_calls]
    for number, call in enumerate(whole_calls):
        pieces = [p.text for p in found if isinstance(p, ArgumentsPart) and p.number == number]
        assert "".join(pieces) == call.arguments


def test_a_second_call_is_another_one() -> None:
    text, calls = taken_apart(f"<c>{CALL}</c>\n<c>{CALL}</c>", Marks("<c>", "</c>"), json.loads)
    assert text == ""
    assert len({call.id for call in calls}) == 2


def test_a_reply_is_remembered_as_it_was_said_however_it_is_spelt() -> None:
    form = ToolFormat(Wrapper("json_tools"), native=True)
    stored = [{"role": "user", "content": "x"}, {"role": "assistant", "content": SAID["json_tools"]}]
    function = {"name": "get_weather", "arguments": json.dumps(WANTED, indent=4)}
    sent = [
        stored[0],
        {"role": "assistant", "content": "", "tool_calls": [{"id": "other", "function": function}]},
    ]
    assert form.as_said(sent, stored, TOOLS) == stored
    changed = [sent[0], {**sent[1], "tool_calls": [{"id": "o", "function": {**function, "arguments": "{}"}}]}]
    assert form.as_said(changed, stored, TOOLS) == changed


@pytest.mark.parametrize("kind", [None, "json_tools", "mistral"])
@pytest.mark.parametrize("parallel", [False, True])
def test_what_the_grammar_allows_is_read_as_a_call(kind: str | None, parallel: bool) -> None:
    form, tokenizer = ToolFormat(Wrapper(kind), native=True), byte_tokenizer()
    grammars = Grammars(tokenizer._backend, tokenizer.vocab_size, tokenizer.eos_ids, tokenizer.special)
    rules = form.rules(TOOLS, "get_weather", parallel=parallel, grammars=grammars)
    constraint = grammars.constraint(f"start: calls\n{rules}", "tools")
    said = []
    for _ in range(400):
        allowed = constraint.allowed()
        # The shortest way through: ends where it may, quotes and brackets next, then any letter.
        order = [
            *tokenizer.eos_ids,
            ord('"'),
            ord("}"),
            ord("]"),
            ord("3"),
            ord(","),
            ord(" "),
            *range(32, 127),
            10,
        ]
        token = next(t for t in order if allowed[t])
        if token in tokenizer.eos_ids:
            break
        said.append(token)
        constraint.saw(token)
    text, calls = form.apart(tokenizer.decode(said), TOOLS)
    assert text == ""
    assert calls[0].name == "get_weather"
    assert set(json.loads(calls[0].arguments)) == {"city", "days"}
