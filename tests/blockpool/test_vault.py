"""Keys and what they seal: opened by their own key only, and by nothing once that is dropped."""

from __future__ import annotations

import os
from pathlib import Path

import keyring.backends.fail
import pytest

from agentmem.blockpool.vault import Locked, Seal, Vaults, Where, vault_of
from agentmem.errors import StoreError
from tests.blockpool.keychain import MemoryKeyring, installed


def made(vaults: Vaults, where: Where = "file") -> str:
    """A space whose key is kept."""
    space = vaults.make("default", where)
    assert vaults.seal(space) is not None
    return space


def test_spaces_and_their_vaults(tmp_path: Path) -> None:
    space = Vaults(tmp_path / "keys").make("default", "file")
    assert space.startswith("default!f")
    assert vault_of(space) == space.removeprefix("default!")
    assert vault_of("default") is None
    assert vault_of("default#0123") is None
    assert Vaults(tmp_path / "keys").seal("default") is None


def test_a_key_is_a_private_file_of_32_bytes(tmp_path: Path) -> None:
    vaults = Vaults(tmp_path / "keys")
    paths = [tmp_path / "keys" / str(vault_of(made(vaults))) for _ in range(2)]
    assert (tmp_path / "keys").stat().st_mode & 0o777 == 0o700
    assert {p.stat().st_mode & 0o777 for p in paths} == {0o600}
    one, two = (p.read_bytes() for p in paths)
    assert len(one) == len(two) == 32
    assert one != two


def test_a_key_is_kept_when_it_is_used(tmp_path: Path) -> None:
    vaults = Vaults(tmp_path / "keys")
    unused, used = (vaults.make("default", "file") for _ in range(2))
    assert not (tmp_path / "keys").exists()
    vaults.seal(used)
    assert os.listdir(tmp_path / "keys") == [vault_of(used)]
    vaults.drop(unused)
    with pytest.raises(Locked):
        vaults.seal(unused)


def test_values_open_with_their_key_and_for_their_purpose(tmp_path: Path) -> None:
    vaults = Vaults(tmp_path / "keys")
    spaces = [made(vaults) for _ in range(2)]
    one, two = (vaults.seal(s) for s in spaces)
    assert one is not None
    assert two is not None
    sealed = one.seal(b"the lamp keeper", b"turn 1")
    assert b"lamp" not in sealed
    assert sealed != one.seal(b"the lamp keeper", b"turn 1")
    again = Vaults(tmp_path / "keys").seal(spaces[0])
    assert again is not None
    assert again.open(sealed, b"turn 1") == b"the lamp keeper"
    for opener, what in ((two, b"turn 1"), (one, b"turn 2")):
        with pytest.raises(Locked):
            opener.open(sealed, what)
    for bad in (b"", sealed[:10], sealed[:-1], bytes([sealed[0] ^ 1]) + sealed[1:]):
        with pytest.raises(Locked):
            one.open(bad, b"turn 1")


def test_pieces_open_at_their_place_only() -> None:
    seal = Seal(bytes(32))
    stream = seal.stream(b"n" * 16, b"header")
    text, tag = stream.seal(3, b"rows of state")
    assert len(text) == len(b"rows of state")
    assert seal.stream(b"n" * 16, b"header").open(3, text, tag) == b"rows of state"
    for other, number in (
        (seal.stream(b"n" * 16, b"header"), 4),
        (seal.stream(b"n" * 16, b"another"), 3),
        (seal.stream(b"m" * 16, b"header"), 3),
        (Seal(bytes(31) + b"1").stream(b"n" * 16, b"header"), 3),
    ):
        with pytest.raises(Locked):
            other.open(number, text, tag)


def test_a_dropped_key_is_gone(tmp_path: Path) -> None:
    vaults = Vaults(tmp_path / "keys")
    space, other = (made(vaults) for _ in range(2))
    path = tmp_path / "keys" / str(vault_of(space))
    key = path.read_bytes()
    kept = path.with_name("link")
    os.link(path, kept)
    vaults.drop(space)
    assert not path.exists()
    assert kept.read_bytes() != key, "the bytes were left where they lay"
    with pytest.raises(Locked, match="missing"):
        vaults.seal(space)
    assert vaults.seal(other) is not None
    vaults.drop(space)


@pytest.mark.parametrize("content", [b"", b"short", bytes(33)])
def test_a_damaged_key_locks(tmp_path: Path, content: bytes) -> None:
    space = made(Vaults(tmp_path / "keys"))
    (tmp_path / "keys" / str(vault_of(space))).write_bytes(content)
    with pytest.raises(Locked, match="damaged"):
        Vaults(tmp_path / "keys").seal(space)


def test_keys_are_never_read_through_links(tmp_path: Path) -> None:
    space = made(Vaults(tmp_path / "keys"))
    path = tmp_path / "keys" / str(vault_of(space))
    path.rename(tmp_path / "elsewhere")
    path.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(Locked):
        Vaults(tmp_path / "keys").seal(space)


@pytest.mark.parametrize(
    "space", ["default!", "default!x0123", "default!f../../token", "default!f/etc/passwd"]
)
def test_names_that_are_no_vaults(tmp_path: Path, space: str) -> None:
    vaults = Vaults(tmp_path / "keys")
    with pytest.raises(Locked):
        vaults.seal(space)
    vaults.drop(space)


def test_without_a_keychain_there_is_a_clear_error(tmp_path: Path) -> None:
    with installed(keyring.backends.fail.Keyring()):  # type: ignore[no-untyped-call]
        with pytest.raises(StoreError, match="set encrypt to 'file'"):
            Vaults(tmp_path).make("default", "keyring")
        with pytest.raises(Locked, match="keychain"):
            Vaults(tmp_path).seal("default!k0123456789abcdef")


def test_keys_in_the_keychain(tmp_path: Path) -> None:
    chain = MemoryKeyring()
    with installed(chain):
        space = made(Vaults(tmp_path), "keyring")
        assert os.listdir(tmp_path) == []
        seal, again = (v.seal(space) for v in (Vaults(tmp_path), Vaults(tmp_path)))
        assert seal is not None
        assert again is not None
        assert again.open(seal.seal(b"x", b"y"), b"y") == b"x"
        Vaults(tmp_path).drop(space)
        assert chain.entries == {}
        with pytest.raises(Locked, match="missing"):
            Vaults(tmp_path).seal(space)
