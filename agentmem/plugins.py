"""Plug-ins: installed distributions that add commands and adapters, found by their entry points in the group `agentmem`."""

from __future__ import annotations

from dataclasses import dataclass, field
from importlib.metadata import EntryPoint, entry_points
from typing import TYPE_CHECKING, Any, NamedTuple

import pluggy

if TYPE_CHECKING:
    import click

GROUP = "agentmem"

hookspec = pluggy.HookspecMarker(GROUP)
hookimpl = pluggy.HookimplMarker(GROUP)
"""Marks the functions of a plug-in that answer our hooks."""


class Adapter(NamedTuple):
    """How a framework names its agents to us. `target` is where it is: `package.module:Name`, imported by its user."""

    name: str
    summary: str
    target: str


class Hooks:
    """What a plug-in may answer."""

    @hookspec
    def agentmem_commands(self, cli: click.Group) -> None:
        """Add commands to `cli`. Commands of ours stay as they are."""

    @hookspec
    def agentmem_adapters(self) -> list[Adapter]:  # type: ignore[empty-body]
        """The adapters that the plug-in brings."""


@dataclass(slots=True)
class Plugin:
    """One entry point, and what came of it. `error` says why it is left out, or what of it failed."""

    name: str
    distribution: str
    version: str
    error: str | None = None
    commands: list[str] = field(default_factory=list)
    adapters: list[Adapter] = field(default_factory=list)
    loaded: Any = None


def load_plugins() -> list[Plugin]:
    """Every plug-in, by name. One that is broken has an `error`; nothing is raised."""
    manager = pluggy.PluginManager(GROUP)
    manager.add_hookspecs(Hooks)
    found = sorted(entry_points(group=GROUP), key=lambda entry: entry.name)
    return [_load(manager, entry) for entry in found]


def _load(manager: pluggy.PluginManager, entry: EntryPoint) -> Plugin:
    dist = entry.dist
    plugin = Plugin(entry.name, dist.name if dist else "unknown", dist.version if dist else "unknown")
    try:
        loaded = entry.load()
        manager.register(loaded, entry.name)
        caller = manager.subset_hook_caller("agentmem_adapters", _others(manager, loaded))
        plugin.adapters = [Adapter(*adapter) for answer in caller() for adapter in answer]
        plugin.loaded = (manager, loaded)
    except (Exception, SystemExit) as error:
        plugin.error = _told(error)
    return plugin


def add_commands(plugins: list[Plugin], cli: click.Group) -> None:
    """Let each plug-in add its commands to `cli`. One that fails, or would replace a command, adds nothing."""
    for plugin in plugins:
        if plugin.loaded is None:
            continue
        manager, loaded = plugin.loaded
        before = dict(cli.commands)
        try:
            manager.subset_hook_caller("agentmem_commands", _others(manager, loaded))(cli=cli)
            taken = sorted(name for name, command in before.items() if cli.commands.get(name) is not command)
            if taken:
                raise ValueError(f"it would replace {', '.join(taken)}")
            plugin.commands = [name for name in cli.commands if name not in before]
        except (Exception, SystemExit) as error:
            cli.commands.clear()
            cli.commands.update(before)
            plugin.error = _told(error)


def _others(manager: pluggy.PluginManager, loaded: Any) -> list[Any]:
    return [other for other in manager.get_plugins() if other is not loaded]


def _told(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())
