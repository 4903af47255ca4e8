"""What `doctor` says about who can read what is kept: modes, agentmem's own encryption, the disk's."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from agentmem.cli.findings import Check
from agentmem.home import Home

MOST_FILES = 20_000
SYSFS = Path("/sys/dev/block")


def check_protection(home: Home, health: dict[str, Any]) -> Iterator[Check]:
    """All that is known; what is not known is said to be unknown."""
    yield check_modes(home)
    yield check_encryption(home, health.get("encryption"))
    yield check_disk_encryption(home)


def check_modes(home: Home) -> Check:
    """Nobody else may read what lies in the home, wherever the home itself is moved to."""
    private = (home.store, home.composed, home.keys, home.log.parent)
    paths = (p for folder in private for p in (folder, *folder.rglob("*")) if folder.exists())
    loose = [p for p in islice(paths, MOST_FILES) if _mode(p) & 0o077]
    if loose:
        message = f"others may read {loose[0]}" + (f" and {len(loose) - 1} more" if len(loose) > 1 else "")
        return Check("modes", "warning", message, f"chmod -R go-rwx {home.root}")
    return Check("modes", "ok", "files are 0600 and folders 0700")


def _mode(path: Path) -> int:
    try:
        facts = path.lstat()
    except OSError:
        return 0
    return 0 if stat.S_ISLNK(facts.st_mode) else stat.S_IMODE(facts.st_mode)


def check_encryption(home: Home, facts: dict[str, Any] | None) -> Check:
    """Which agents are encrypted, and where their keys are. `facts` come from the running daemon."""
    name = "encryption"
    if facts is None:
        kept = len(os.listdir(home.keys)) if home.keys.is_dir() else 0
        message = f"{kept} keys of encrypted agents lie in {home.keys}; " if kept else ""
        return Check(name, "note", f"{message}start the daemon to see which agents are encrypted")
    if facts["locked"]:
        message = f"{facts['locked']} agents are locked: they are encrypted, and their keys are not there"
        return Check(name, "warning", message, "put the keys back and restart; agentmem logs names them")
    sealed, plain = facts["file"] + facts["keyring"], facts["off"]
    said = f"{sealed} agents are encrypted (AES-256-GCM), {plain} are kept in plain text"
    if facts["file"]:
        said += f"; {facts['file']} keys lie in {home.keys}: whoever copies the whole home has them too"
    if facts["new_agents"] == "off":
        hint = 'to encrypt new agents, set encrypt = "keyring" or "file" in config.toml'
        return Check(name, "note", said, hint)
    return Check(name, "note" if plain else "ok", said)


def check_disk_encryption(home: Home) -> Check:
    """Whether the disk under the home is encrypted, as far as the system tells an ordinary user."""
    existing = next(folder for folder in (home.root, *home.root.parents) if folder.exists())
    known = _filevault() if sys.platform == "darwin" else encrypted_device(os.stat(existing).st_dev)
    what = "FileVault" if sys.platform == "darwin" else "LUKS"
    if known is None:
        return Check("disk encryption", "note", f"unknown: the system does not say whether {what} is in use")
    if known:
        return Check("disk encryption", "ok", f"the disk is encrypted ({what})")
    message = f"{what} is not in use under the home; whether the drive itself encrypts is unknown"
    hint = 'without an encrypted disk, encrypt the agents: encrypt = "keyring" in config.toml'
    return Check("disk encryption", "note", message, hint)


def _filevault() -> bool | None:
    try:
        done = subprocess.run(["fdesetup", "isactive"], capture_output=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return {0: True, 1: False}.get(done.returncode)


def encrypted_device(device: int, sysfs: Path = SYSFS) -> bool | None:
    """Whether a Linux block device, or one below it, is a LUKS volume; None for file systems without a device of their own."""
    folder = sysfs / f"{os.major(device)}:{os.minor(device)}"
    return _luks(folder) if folder.exists() else None


def _luks(folder: Path) -> bool:
    try:
        if (folder / "dm" / "uuid").read_text().startswith("CRYPT-"):
            return True
    except OSError:
        pass
    below = folder / "slaves"
    return any(_luks(slave) for slave in below.iterdir()) if below.is_dir() else False
