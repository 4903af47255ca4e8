"""The daemon's unix socket: where it lies, how it is bound, and when a client may use it."""

from __future__ import annotations

import hashlib
import logging
import os
import socket
import stat
import tempfile
from pathlib import Path

from agentmem.home import Home

log = logging.getLogger(__name__)

LONGEST_PATH = 103  # bytes that every system takes; Linux takes a few more


def socket_path(home: Home) -> Path | None:
    """Where the socket of `home` belongs: in the home, or in a private folder when that path is too long.

    None when there is no such folder, or no unix sockets on this system.
    """
    if not hasattr(socket, "AF_UNIX"):
        return None
    if len(os.fsencode(home.socket)) <= LONGEST_PATH:
        return home.socket
    folder = _runtime_folder()
    if folder is None:
        return None
    name = hashlib.sha256(os.fsencode(home.root)).hexdigest()[:16]
    path = folder / f"agentmem-{name}.sock"
    return path if len(os.fsencode(path)) <= LONGEST_PATH else None


def _runtime_folder() -> Path | None:
    """A folder with a short name that only this user can enter."""
    named = os.environ.get("XDG_RUNTIME_DIR")
    if named and _is_private(Path(named)):
        return Path(named)
    folder = Path(tempfile.gettempdir()) / f"agentmem-{os.getuid()}"
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
    except OSError:
        return None
    return folder if _is_private(folder) else None


def _is_private(folder: Path) -> bool:
    try:
        facts = folder.lstat()
    except OSError:
        return False
    return stat.S_ISDIR(facts.st_mode) and facts.st_uid == os.getuid() and not facts.st_mode & 0o077


def is_own_socket(path: Path) -> bool:
    """Whether `path` is a socket that this user made. A link is not."""
    try:
        facts = path.lstat()
    except OSError:
        return False
    return stat.S_ISSOCK(facts.st_mode) and facts.st_uid == os.getuid()


def bind_socket(home: Home) -> socket.socket | None:
    """A bound socket (0600), not yet listening; None, and a line in the log, when there is only TCP.

    Precondition: the home is held, so that a socket which is there now was left by a daemon that was killed.
    """
    path = socket_path(home)
    if path is None:
        log.warning("no unix socket: the path of the home is too long, and no private folder has a short one")
        return None
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        if is_own_socket(path):
            path.unlink()
        listener.bind(str(path))
        os.chmod(path, 0o600)
    except OSError as error:
        listener.close()
        log.warning("no unix socket at %s: %s", path, error.strerror)
        return None
    return listener
