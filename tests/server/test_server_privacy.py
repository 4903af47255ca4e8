"""What people say stays in the token log: not in the daemon's log, not in any other file, not in figures."""

from __future__ import annotations

import stat
from pathlib import Path

import pytest

MARKER = "Swordfish-4711-under-the-lamp"
STORY = f"The password of the lighthouse is {MARKER}. " * 8
BINARY = {"content-type": "application/octet-stream"}


pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def chatty(start, tmp_path_factory: pytest.TempPathFactory):
    """A daemon that logs everything it logs at all, and that has heard the marker in every way there is."""
    home = tmp_path_factory.mktemp("chatty") / "home"
    home.mkdir(mode=0o700)
    (home / "config.toml").write_text('log_level = "debug"\n')
    daemon = start(home)
    daemon.chat("keeper", STORY)
    daemon.chat("keeper", STORY, "I see.", STORY, stream=False)
    with daemon.http.stream(
        "POST",
        "/v1/chat/completions",
        json={"messages": [{"role": "user", "content": STORY}], "stream": True},
    ) as response:
        assert MARKER not in "".join(response.iter_lines())
    assert daemon.http.post("/v1/agents/keeper/append", json={"text": STORY}).status_code == 200
    archive = daemon.http.post("/v1/agents/keeper/export").content
    assert MARKER.encode() in archive
    good = {"content": archive, "headers": BINARY, "params": {"agent": "copy"}}
    assert daemon.http.post("/v1/agents/import", **good).status_code == 200
    assert daemon.http.post("/v1/agents/import", **{**good, "content": archive[:-1]}).status_code == 400
    refused = [
        {"json": {"messages": [{"role": "user", "content": STORY * 200}]}},
        {"json": {"messages": [{"role": "user", "content": STORY, "name": 1}], "temperature": MARKER}},
        {"json": {"messages": [{"role": MARKER, "content": STORY}]}},
        {"content": f'{{"messages": "{STORY}'.encode(), "headers": {"content-type": "application/json"}},
    ]
    for body in refused:
        assert daemon.http.post("/v1/chat/completions", **body).status_code == 400
    for verb in ("evict", "warm"):
        daemon.http.post(f"/v1/agents/keeper/{verb}")
    for path in ("/v1/agents/keeper/explain", "/v1/store", "/metrics", "/health", "/v1/agents"):
        assert MARKER not in daemon.http.get(path).text, path
    return daemon


def holding(folder: Path) -> set[str]:
    """Names of the files below a folder that hold the marker."""
    found = (p for p in folder.rglob("*") if p.is_file() and MARKER.encode() in p.read_bytes())
    return {str(p.relative_to(folder)) for p in found}


def test_only_the_token_log_holds_what_was_said(chatty) -> None:
    assert {name.removesuffix("-wal") for name in holding(chatty.home)} == {"store/index.sqlite"}


def test_the_log_holds_nothing_of_it(chatty) -> None:
    text = chatty.log.read_text()
    assert "/v1/chat/completions" in text or "DEBUG" in text, "the daemon logs at debug level"
    assert MARKER not in text
    assert "lighthouse" not in text


def test_a_forgotten_agent_is_gone_from_the_token_log(chatty) -> None:
    for agent in [a["agent"] for a in chatty.http.get("/v1/agents").json()["data"]]:
        assert chatty.http.delete(f"/v1/agents/{agent}").status_code == 200
    assert holding(chatty.home) == set()


def test_everything_in_the_home_is_private(chatty) -> None:
    for path in (chatty.home, *chatty.home.rglob("*")):
        if path.name != "config.toml" and not path.is_symlink():
            assert stat.S_IMODE(path.lstat().st_mode) & 0o077 == 0, path


def test_agents_may_be_made_encrypted(chatty) -> None:
    made = chatty.http.post("/v1/agents", json={"agent": "vaulted", "encrypt": "file"})
    assert made.status_code == 200, made.text
    assert (made.json()["encrypted"], made.json()["locked"]) == ("file", False)
    chatty.chat("vaulted", STORY)
    facts = chatty.http.get("/health").json()["encryption"]
    assert (facts["new_agents"], facts["file"], facts["locked"]) == ("off", 1, 0)
    assert holding(chatty.home) == set()
    assert [p.stat().st_size for p in (chatty.home / "keys").iterdir()] == [32]
    assert chatty.http.delete("/v1/agents/vaulted").status_code == 200
    assert list((chatty.home / "keys").iterdir()) == []


def test_an_unknown_way_to_encrypt_is_refused(chatty) -> None:
    response = chatty.http.post("/v1/agents", json={"agent": "vaulted", "encrypt": "rot13"})
    assert response.status_code == 400
    assert response.json()["error"]["param"] == "encrypt"
