"""Models of the Hugging Face hub, downloaded into the models folder."""

from __future__ import annotations

import re
import threading
from pathlib import Path

from agentmem.errors import ModelUnavailable
from agentmem.model.progress import Progress, folder_bytes

REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
PATTERNS = ["*.json", "model*.safetensors", "tokenizer.model", "*.jinja"]
TIMEOUT_SECONDS = 10.0
POLL_SECONDS = 0.5


def is_repository(spec: str) -> bool:
    """True for "org/name"."""
    return REPOSITORY.fullmatch(spec) is not None


def hub_folder(repository: str, models: Path, progress: Progress) -> Path:
    """The folder of the repository below `models`, downloaded where it is not complete there.

    Raises ModelUnavailable where the hub cannot be reached or has no such model.
    """
    target = models / repository.replace("/", "--")
    complete = target / ".complete"
    if not complete.exists():
        _download(repository, target, progress)
        complete.touch()
    return target


def _download(repository: str, target: Path, progress: Progress) -> None:
    from huggingface_hub import HfApi
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError
    from huggingface_hub.utils import disable_progress_bars, filter_repo_objects

    disable_progress_bars()
    progress(f"looking up {repository}", None)
    api = HfApi()

    failures: list[Exception] = []

    def fetch(revision: str | None) -> None:
        try:
            api.snapshot_download(
                repository,
                revision=revision,
                local_dir=target,
                allow_patterns=PATTERNS,
                etag_timeout=TIMEOUT_SECONDS,
            )
        except Exception as error:
            failures.append(error)

    try:
        # One request with a short timeout first: without a network the downloader would retry for minutes.
        info = api.model_info(repository, files_metadata=True, timeout=TIMEOUT_SECONDS)
        sizes = {file.rfilename: file.size or 0 for file in info.siblings or []}
        total = sum(sizes[name] for name in filter_repo_objects(sizes, allow_patterns=PATTERNS))
        worker = threading.Thread(target=fetch, args=[info.sha], daemon=True)
        worker.start()
        while worker.is_alive():
            progress(f"downloading {repository}", min(0.99, folder_bytes(target) / max(1, total)))
            worker.join(POLL_SECONDS)
        if failures:
            raise failures[0]
    except GatedRepoError as error:
        raise ModelUnavailable(
            f"{repository} is gated: accept its terms on huggingface.co and set HF_TOKEN to your access token"
        ) from error
    except RepositoryNotFoundError as error:
        raise ModelUnavailable(f"The Hugging Face hub has no public model {repository}") from error
    except Exception as error:
        raise ModelUnavailable(
            f"{repository} could not be downloaded from the Hugging Face hub "
            f"({type(error).__name__}: {error}). Without a network use the model 'embedded', "
            "or name the path of an MLX model folder or .gguf file"
        ) from error
    progress(f"downloading {repository}", 1.0)
