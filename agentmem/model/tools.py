"""Tools: how a model is told of them, how it calls them, and how a conversation with calls is written down for it."""

from __future__ import annotations

import json
from typing import Any, Literal

from agentmem.errors import BadRequest
from agentmem.model.calls import Call, CallReader, Marks, taken_apart
from agentmem.model.grammar import Grammars, json_rule

Messages = list[dict[str, Any]]
Notation = Literal["object", "bare", "list", "other"]

HERMES = Marks("<tool_call>", "</tool_call>")
MORE = {"call": ' ("\\n" call){0,15}', "body": ' (", " body){0,15}'}
"""Further calls of one reply, between marks and in a list."""
INSTRUCTIONS = """You may call functions. Each line between the tags describes one in JSON:
<tools>
{tools}
</tools>
To call one, write a JSON object with its name and its arguments between these tags:
<tool_call>
{{"name": <name>, "arguments": <arguments>}}
</tool_call>"""
PROBE = {
    "type": "function",
    "function": {
        "name": "qx7probe",
        "description": "qx7probe",
        "parameters": {"type": "object", "properties": {}},
    },
}


class ToolFormat:
    """One model's way with tools.

    `native`: its chat template knows them. For a model whose template does not, the conversation is written in the notation of
    Hermes, which it may or may not follow. `notation`: "object" and "bare" are a JSON object with and without marks around it,
    "list" a JSON list of them, "other" anything else, which can be read but not enforced.
    """

    def __init__(self, wrapper: Any, *, native: bool) -> None:
        """`wrapper`: mlx-lm's tokenizer, with the parser that it found for this model."""
        self.native = native
        parser = wrapper.tool_parser if native else None
        name = wrapper.init_kwargs.get("tool_parser_type") if parser is not None else None
        if not native or name == "json_tools":
            self.marks, self.notation = HERMES, "object"
            self._parser: Any = _json_call
        elif parser is None:
            self.marks, self.notation = Marks("", ""), "bare"
            self._parser = _json_call
        else:
            self.marks = Marks(wrapper.tool_call_start, wrapper.tool_call_end or "")
            self.notation = "list" if self.marks.start == "[TOOL_CALLS]" else "other"
            self._parser = parser

    notation: Notation

    def reader(self, tools: list[dict[str, Any]]) -> CallReader:
        """For one reply of a request with these tools."""
        return CallReader(self.marks, lambda block: self._parse(block, tools))

    def apart(self, text: str, tools: list[dict[str, Any]]) -> tuple[str, list[Call]]:
        """A whole reply: its text and its calls."""
        return taken_apart(text, self.marks, lambda block: self._parse(block, tools))

    def _parse(self, block: str, tools: list[dict[str, Any]]) -> Any:
        """Raises what the parser raises, and ValueError for a bare object that calls none of the tools."""
        found = self._parser(block, tools)
        if self.notation == "bare" and found.get("name") not in {t["function"]["name"] for t in tools}:
            raise ValueError("an object, but no call")
        return found

    def written(self, messages: Messages, tools: list[dict[str, Any]] | None) -> Messages:
        """The messages as the template takes them: calls with their arguments as objects, or all of it as text."""
        if self.native:
            return [_with_objects(message) for message in messages]
        plain = [_as_text(message) for message in messages]
        if not tools:
            return plain
        lines = "\n".join(json.dumps(tool["function"], ensure_ascii=False) for tool in tools)
        told = INSTRUCTIONS.format(tools=lines)
        if plain and plain[0]["role"] == "system":
            return [{"role": "system", "content": f"{plain[0]['content']}\n\n{told}"}, *plain[1:]]
        return [{"role": "system", "content": told}, *plain]

    def as_said(self, messages: Messages, stored: Messages, tools: list[dict[str, Any]]) -> Messages:
        """`messages` with those replies as they were said that a client sends back as text and calls.

        Written down anew, a call may differ from what the model said by a space, and all behind it would have to be read again.
        """
        found = list(messages)
        for i, (new, old) in enumerate(zip(messages, stored, strict=False)):
            if new.get("tool_calls") and old["role"] == "assistant" and not old.get("tool_calls"):
                text, calls = self.apart(old["content"], tools)
                if (new.get("content") or "").strip() == text.strip() and _same(new["tool_calls"], calls):
                    found[i] = old
        return found

    def rules(
        self, tools: list[dict[str, Any]], name: str | None, *, parallel: bool, grammars: Grammars
    ) -> str:
        """Lark rules of `calls`, replies that call tools and say nothing else: any of `tools`, or the one of this `name`."""
        start, end = (grammars.marker(mark) for mark in self.marks)
        if self.notation == "other":
            closing = f" {end}" if self.marks.end else ""
            return f"calls: {start} REST{closing}\nREST: /(.|\\n)+/\n"
        chosen = [tool["function"] for tool in tools if name is None or tool["function"]["name"] == name]
        rules = {
            "object": f'calls: call{MORE["call"] if parallel else ""}\ncall: {start} "\\n" body "\\n" {end}\n',
            "list": f'calls: {start} "[" body{MORE["body"] if parallel else ""} "]"\n',
            "bare": "calls: body\n",
        }[self.notation]
        return rules + _body_rules(chosen, "parameters" if self.notation == "bare" else "arguments")


def knows_tools(render: Any) -> bool:
    """Whether a chat template says anything about the tools that it is given. `render(messages, tools)` gives its text."""
    try:
        return "qx7probe" in render([{"role": "user", "content": "question"}], [PROBE])
    except Exception:  # a template is a program of its own
        return False


def _json_call(block: str, _tools: Any) -> Any:
    found = json.loads(block.strip())
    if not isinstance(found, dict):
        raise ValueError("a call is an object")
    return found


def _body_rules(functions: list[dict[str, Any]], key: str) -> str:
    """The rule `body`: a call of one of these. Each schema is a root of its own, which its references start from.

    Arguments that a schema does not name are allowed only where it says so: a function that is called with others fails.
    """
    none: dict[str, Any] = {"type": "object", "properties": {}, "additionalProperties": False}
    rules = [f"body: {' | '.join(f'call_{i}' for i in range(len(functions)))}"]
    for i, function in enumerate(functions):
        head = f'{{"name": {json.dumps(function["name"])}, "{key}": '
        schema = {**none, **(function.get("parameters") or {})}
        rules.append(f'call_{i}: {json.dumps(head)} arguments_{i} "}}"')
        rules.append(f"arguments_{i}: {json_rule(schema, 'tools')}")
    return "\n".join(rules) + "\n"


def _with_objects(message: dict[str, Any]) -> dict[str, Any]:
    """Templates write arguments down themselves, from objects; clients send their JSON."""
    if not message.get("tool_calls"):
        return message
    calls = [
        {**call, "function": {**call["function"], "arguments": arguments_of(call)}}
        for call in message["tool_calls"]
    ]
    return {**message, "tool_calls": calls}


def arguments_of(call: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a call in OpenAI's shape. Raises BadRequest where they are no JSON object."""
    text = call["function"].get("arguments") or "{}"
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise BadRequest("the arguments of a tool call must be the JSON of an object", param="messages")
    return found


def _same(sent: list[dict[str, Any]], said: list[Call]) -> bool:
    """Whether these are the same calls; each time they are read they get other ids."""
    if len(sent) != len(said):
        return False
    return all(
        new["function"]["name"] == old.name and arguments_of(new) == arguments_of(old.as_openai())
        for new, old in zip(sent, said, strict=True)
    )


def _as_text(message: dict[str, Any]) -> dict[str, Any]:
    content = message.get("content") or ""
    if message["role"] == "tool":
        return {"role": "user", "content": f"<tool_response>\n{content}\n</tool_response>"}
    if not message.get("tool_calls"):
        return {"role": message["role"], "content": content}
    said = [
        f'<tool_call>\n{{"name": {json.dumps(call["function"]["name"])}, '
        f'"arguments": {json.dumps(arguments_of(call), ensure_ascii=False)}}}\n</tool_call>'
        for call in message["tool_calls"]
    ]
    return {"role": message["role"], "content": "\n".join([*([content] if content else []), *said])}
