"""Ids of the Hugging Face hub."""

from __future__ import annotations

from pathlib import Path

import pytest

from agentmem.errors import ModelUnavailable
from agentmem.model.hub import hub_folder, is_repository
from agentmem.model.loaded import load
from agentmem.model.progress import silent


@pytest.mark.parametrize("spec", ["mlx-community/Qwen3-0.6B-4bit", "a/b", "org_1/name.v2"])
def test_ids(spec: str) -> None:
    assert is_repository(spec)


@pytest.mark.parametrize(
    "spec", ["embedded", "a/b/c", "/a/b", "../b", "a/..", "a b/c", "a/", "a/b\n", "https://x/y"]
)
def test_what_is_no_id(spec: str) -> None:
    assert not is_repository(spec)


def test_model_that_cannot_be_had_is_a_clear_error_and_leaves_no_mark(home: Path) -> None:
    with pytest.raises(ModelUnavailable, match="agentmem-tests/there-is-no-such-model"):
        load("agentmem-tests/there-is-no-such-model", home)
    assert not list((home / "models").rglob(".complete"))


def test_downloaded_model_needs_no_network(tmp_path: Path) -> None:
    target = tmp_path / "org--name"
    target.mkdir()
    (target / ".complete").touch()
    assert hub_folder("org/name", tmp_path, silent) == target
