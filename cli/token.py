"""`token`: show and replace what programs send to the daemon."""

from __future__ import annotations

import click
from filelock import FileLock, Timeout

from agentmem.cli.output import json_option, print_json
from agentmem.client import AgentMemClient
from agentmem.daemon import running_daemon
from agentmem.errors import AlreadyRunning, Forbidden, NotFound
from agentmem.home import Home, default_home, private
from agentmem.tokens import TokenScope, renew_token, token_path

inference_option = click.option(
    "--inference", is_flag=True, help="The token that opens inference only: chats, embeddings, the models."
)


@click.group()
def token() -> None:
    """The tokens that programs send to the daemon: one opens everything, the other inference only."""


@token.command("show")
@inference_option
@json_option
def token_show(inference: bool, as_json: bool) -> None:
    """Print a token alone, for use in scripts."""
    path = token_path(Home(default_home()), _scope(inference))
    try:
        with open(path, encoding="ascii", opener=private) as file:
            text = file.read().strip()
    except FileNotFoundError:
        raise NotFound(f"no token at {path}; the first start makes it: agentmem up") from None
    except OSError as error:
        raise Forbidden(f"cannot read {path}: {error.strerror}") from error
    if as_json:
        print_json({"token": text, "path": str(path)})
    else:
        click.echo(text)


@token.command("rotate")
@inference_option
@json_option
def token_rotate(inference: bool, as_json: bool) -> None:
    """Make a new token. The running daemon refuses the old one at once."""
    home, scope = Home(default_home()), _scope(inference)
    path = token_path(home, scope)
    if running_daemon(home) is not None:
        with AgentMemClient() as client:
            client.rotate_token(scope)
    else:
        _rotate_at_rest(home, scope)
    if as_json:
        print_json({"scope": scope, "path": str(path), "rotated": True})
    else:
        click.echo(f"a new token is in {path}; the old one is refused")


def _scope(inference: bool) -> TokenScope:
    return "inference" if inference else "all"


def _rotate_at_rest(home: Home, scope: TokenScope) -> None:
    path = token_path(home, scope)
    if not path.exists():
        raise NotFound(f"no token at {path}; the first start makes it: agentmem up")
    try:
        # A daemon that starts meanwhile would go on with the old one.
        with FileLock(home.lock, timeout=0, mode=0o600):
            renew_token(home, scope)
    except Timeout:
        raise AlreadyRunning(f"{home.root} is held by a daemon that is starting; try again") from None
    except OSError as error:
        raise Forbidden(f"cannot write {path}: {error.strerror}") from error
