"""Tools of a request: what may be called, and whether something must be."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from agentmem.api.message import Name, Text
from agentmem.errors import BadRequest

MAX_TOOLS = 256


class Function(BaseModel):
    """A function that may be called. `parameters` is the JSON schema of its arguments."""

    model_config = ConfigDict(extra="ignore")

    name: Name
    description: Text | None = None
    parameters: dict[str, Any] | None = None

    def normalised(self) -> dict[str, Any]:
        """The tool as the engine takes it."""
        return {"type": "function", "function": self.model_dump(exclude_none=True)}


class FunctionTool(BaseModel):
    """A tool of chat completions."""

    model_config = ConfigDict(extra="ignore")

    type: Literal["function"]
    function: Function


class NamedFunction(BaseModel):
    name: Name


class NamedTool(BaseModel):
    """The choice of one function."""

    type: Literal["function"] = "function"
    function: NamedFunction


Choice = Literal["none", "auto", "required"] | NamedTool


@dataclass(frozen=True, slots=True)
class Tools:
    """Tools in OpenAI's shape. `must`: the reply is a call; of the function `name`, where there is one.

    One call, that is, unless several are asked for: a small model that must call goes on and on.
    """

    tools: list[dict[str, Any]] = field(default_factory=list)
    must: bool = False
    name: str | None = None
    parallel: bool = False
    silent: bool = False

    def __post_init__(self) -> None:
        names = [tool["function"]["name"] for tool in self.tools]
        if len(set(names)) < len(names):
            raise BadRequest("two tools have the same name", param="tools")
        if self.must and not names:
            raise BadRequest("there is no tool to choose; send tools", param="tool_choice")
        if self.name is not None and self.name not in names:
            raise BadRequest(f"there is no tool {self.name[:80]!r} to choose", param="tool_choice")

    @property
    def readable(self) -> bool:
        """Whether calls are looked for in a reply."""
        return bool(self.tools) and not self.silent

    @classmethod
    def chosen(cls, tools: list[dict[str, Any]], choice: Choice | None, parallel: bool | None) -> Tools:
        """As chat completions say it. Raises BadRequest for a choice that is none of the tools."""
        name = choice.function.name if isinstance(choice, NamedTool) else None
        return cls(
            tools,
            must=choice == "required" or name is not None,
            name=name,
            parallel=bool(parallel),
            silent=choice == "none",
        )


ToolList = list[FunctionTool]
Limited = Field(default=None, max_length=MAX_TOOLS)
