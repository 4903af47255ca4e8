"""The daemon's settings as options of `up` and `serve`; everything else is set by environment or TOML."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import click

Decorated = TypeVar("Decorated", bound=Callable[..., Any])

_OPTIONS: tuple[Callable[[Any], Any], ...] = (
    click.option("--model", help="embedded, a local MLX folder, a .gguf file, or a Hugging Face repository."),
    click.option("--port", type=click.IntRange(0, 65535), help="Port to listen on; 0 picks a free one."),
    click.option("--host", help="Address to listen on. Default: 127.0.0.1."),
    click.option("--kv-format", help="How attention state is held. Default: q4."),
    click.option("--ram-budget", help="RAM for attention state, as 512MiB or 4GB. Default: 1GiB."),
    click.option("--memory-limit", help="Memory to use, as 8GB or 75%. Default: 90% of the device's."),
    click.option("--max-batch", type=click.IntRange(1, 256), help="Requests that run at once. Default: 16."),
    click.option(
        "--itl-target-ms",
        type=click.FloatRange(0, min_open=True),
        help="Milliseconds between two tokens while prompts are read. Default: 100.",
    ),
    click.option("--max-context", type=click.IntRange(64), help="Tokens of context at most."),
    click.option(
        "--commit",
        type=click.Choice(["full", "batched", "none"]),
        help="When a turn counts as kept. Default: full, once it is on disk.",
    ),
    click.option(
        "--open-inference", is_flag=True, default=None, help="Answer inference on loopback without a token."
    ),
    click.option("--allow-remote", is_flag=True, default=None, help="Allow an address that is not loopback."),
    click.option(
        "--log-level", type=click.Choice(["debug", "info", "warning", "error"]), help="Default: info."
    ),
)


def settings_options(command: Decorated) -> Decorated:
    """Give a command the daemon's settings: keywords named like fields of Settings, None when not given."""
    for option in reversed(_OPTIONS):
        command = option(command)
    return command
