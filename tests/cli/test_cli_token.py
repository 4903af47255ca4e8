"""`agentmem token`: both tokens, shown and replaced, with and without a daemon."""

from __future__ import annotations

import pytest
from filelock import FileLock

from agentmem.cli.exits import Exit
from agentmem.client import AgentMemClient
from agentmem.errors import Unauthorized
from agentmem.home import Home
from tests.cli.cli_line import invoke, parse

BOTH = pytest.mark.parametrize("flags", [(), ("--inference",)], ids=["all", "inference"])


def file_of(home: Home, flags: tuple[str, ...]) -> str:
    return (home.inference_token if flags else home.token).read_text().strip()


@BOTH
def test_show_prints_the_token_alone(daemon: Home, flags: tuple[str, ...]) -> None:
    assert invoke("token", "show", *flags).stdout == file_of(daemon, flags) + "\n"
    assert parse(invoke("token", "show", *flags, "--json"))["token"] == file_of(daemon, flags)


@BOTH
def test_rotate_while_the_daemon_runs(daemon: Home, flags: tuple[str, ...]) -> None:
    old = file_of(daemon, flags)
    said = parse(invoke("token", "rotate", *flags, "--json"))
    assert (said["scope"], said["rotated"]) == ("inference" if flags else "all", True)
    assert "token" not in said
    new = file_of(daemon, flags)
    assert new != old
    with AgentMemClient(token=old, home=daemon.root) as client, pytest.raises(Unauthorized):
        client.models()
    with AgentMemClient(token=new, home=daemon.root) as client:
        assert client.models()


@BOTH
def test_rotate_without_a_daemon(home: Home, flags: tuple[str, ...]) -> None:
    assert invoke("token", "rotate", *flags).exit_code == Exit.NOT_FOUND
    assert not home.root.exists()
    home.prepare()
    for path in (home.token, home.inference_token):
        path.write_text("a" * 40 + "\n")
    with FileLock(home.lock):
        held = invoke("token", "rotate", *flags)
    assert held.exit_code == Exit.REFUSED
    assert file_of(home, flags) == "a" * 40
    assert invoke("token", "rotate", *flags).exit_code == Exit.OK
    assert len(file_of(home, flags)) >= 32
    assert file_of(home, flags) != "a" * 40
    other = home.token if flags else home.inference_token
    assert other.read_text() == "a" * 40 + "\n"
