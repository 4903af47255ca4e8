"""The file-system seam: whole or not at all, private, and synced in the right order."""

from __future__ import annotations

import errno
import os
import random
import stat
from pathlib import Path
from typing import Any

import pytest

from agentmem.blockpool import files as files_module
from agentmem.blockpool.files import Files


def test_many_buffers_are_written_in_order(tmp_path: Path) -> None:
    rng = random.Random(0)
    buffers = [rng.randbytes(rng.choice([0, 1, 7, 4096])) for _ in range(2000)]
    Files().write_durably(tmp_path / "x", [b"head", *(memoryview(b) for b in buffers)])
    assert (tmp_path / "x").read_bytes() == b"head" + b"".join(buffers)
    assert stat.S_IMODE((tmp_path / "x").stat().st_mode) == 0o600
    assert os.listdir(tmp_path) == ["x"]


def test_short_writes_are_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.writev

    def few(fd: int, buffers: list[memoryview]) -> int:
        joined = b"".join(buffers)
        return real(fd, [joined[: max(1, len(joined) // 3)]])

    monkeypatch.setattr(os, "writev", few)
    Files().write_durably(tmp_path / "x", [b"abc", b"", b"defghijk", b"l"])
    assert (tmp_path / "x").read_bytes() == b"abcdefghijkl"


@pytest.mark.parametrize("call", ["writev", "fsync", "rename"])
def test_a_failed_write_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    def fail(*_: Any) -> None:
        raise OSError(errno.EIO, "I/O error")

    (tmp_path / "x").write_bytes(b"before")
    monkeypatch.setattr(os, call, fail)
    with pytest.raises(OSError, match="I/O error"):
        Files().write_durably(tmp_path / "x", [b"after"])
    assert os.listdir(tmp_path) == ["x"]
    assert (tmp_path / "x").read_bytes() == b"before"


def test_content_is_synced_before_the_rename_and_the_folder_after(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []
    fsync, rename = os.fsync, os.rename

    def log_fsync(fd: int) -> None:
        calls.append("folder" if stat.S_ISDIR(os.fstat(fd).st_mode) else "file")
        fsync(fd)

    def log_rename(a: Any, b: Any) -> None:
        calls.append("rename")
        rename(a, b)

    monkeypatch.setattr(os, "fsync", log_fsync)
    monkeypatch.setattr(os, "rename", log_rename)
    Files().write_durably(tmp_path / "x", [b"1"])
    assert calls == ["file", "rename", "folder"]
    calls.clear()
    Files(durable=False).write_durably(tmp_path / "y", [b"1"])
    assert calls == ["rename"]


def test_macos_flushes_the_drive_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    monkeypatch.setattr(files_module.sys, "platform", "darwin")
    monkeypatch.setattr(files_module.fcntl, "F_FULLFSYNC", 51, raising=False)
    monkeypatch.setattr(files_module.fcntl, "fcntl", lambda fd, command: asked.append(command))
    with (tmp_path / "x").open("w") as file:
        files_module.sync(file.fileno())
    assert asked == [51]


def test_an_existing_temporary_file_is_never_followed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Known:
        hex = "known"

    monkeypatch.setattr(files_module.uuid, "uuid4", Known)
    victim = tmp_path / "victim"
    victim.write_bytes(b"precious")
    (tmp_path / "known.tmp").symlink_to(victim)
    with pytest.raises(FileExistsError):
        Files().write_durably(tmp_path / "x", [b"1"])
    assert victim.read_bytes() == b"precious"


def test_move_and_unlink(tmp_path: Path) -> None:
    files = Files()
    (tmp_path / "a").write_bytes(b"1")
    files.move(tmp_path / "a", tmp_path / "aside")
    assert (tmp_path / "aside" / "a").read_bytes() == b"1"
    assert stat.S_IMODE((tmp_path / "aside").stat().st_mode) == 0o700
    files.unlink(tmp_path / "aside" / "a")
    files.unlink(tmp_path / "aside" / "a")
    assert os.listdir(tmp_path / "aside") == []
