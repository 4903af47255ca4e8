"""The home folder: where everything that must survive lives. Folders 0700, files 0600."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from tempfile import NamedTemporaryFile

import platformdirs


def default_home() -> Path:
    """`AGENTMEM_HOME`, else the platform's data folder (never a cache folder that the system may purge)."""
    named = os.environ.get("AGENTMEM_HOME")
    return (
        Path(named).expanduser() if named else Path(platformdirs.user_data_dir("agentmem", appauthor=False))
    )


def private(path: str | os.PathLike[str], flags: int) -> int:
    """The opener of every file in a home: never through a link, and new files are their owner's alone."""
    return os.open(path, flags | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)


@dataclass(frozen=True, slots=True)
class Home:
    """Paths inside one home folder. `root` is created on `prepare`."""

    root: Path

    @property
    def config(self) -> Path:
        return self.root / "config.toml"

    @property
    def token(self) -> Path:
        return self.root / "token"

    @property
    def inference_token(self) -> Path:
        """The token that opens inference only."""
        return self.root / "inference-token"

    @property
    def socket(self) -> Path:
        """The daemon's unix socket, unless this path is too long for one."""
        return self.root / "agentmem.sock"

    @property
    def lock(self) -> Path:
        return self.root / "daemon.lock"

    @property
    def daemon(self) -> Path:
        """JSON of the running daemon: pid, url, port, model, version, home, started, socket."""
        return self.root / "daemon.json"

    @property
    def models(self) -> Path:
        """Converted models; `AGENTMEM_MODELS` shares one folder between several homes."""
        named = os.environ.get("AGENTMEM_MODELS")
        return Path(named).expanduser() if named else self.root / "models"

    @property
    def calibration(self) -> Path:
        """What formats measure of a model before they pack its keys, one file a model; made again where it is gone."""
        return self.models / "calibration"

    @property
    def store(self) -> Path:
        return self.root / "store"

    @property
    def composed(self) -> Path:
        """What composed reuse keeps; made again where it is gone."""
        return self.root / "composed"

    @property
    def responses(self) -> Path:
        """What clients of the Responses API go on from."""
        return self.root / "responses.db"

    @property
    def jobs(self) -> Path:
        """Transcripts that are read in the background, one file each."""
        return self.root / "jobs"

    @property
    def keys(self) -> Path:
        """Keys of encrypted agents, one file each, where they are not in the system's keychain."""
        return self.root / "keys"

    @property
    def log(self) -> Path:
        return self.root / "logs" / "daemon.log"

    def prepare(self) -> Home:
        """Create the folders (0700) and narrow the process's umask to 077."""
        os.umask(0o077)
        for folder in (self.root, self.models, self.store, self.log.parent):
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        return self


def publish(path: Path, content: bytes) -> None:
    """Put `content` into the file, whole or not at all, and make its folder where there is none. Raises OSError."""
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    with NamedTemporaryFile("wb", dir=path.parent, delete=False) as file:
        try:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
            os.replace(file.name, path)
        except BaseException:
            os.unlink(file.name)
            raise
