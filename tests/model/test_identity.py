"""Hashes that tell models apart, and the cache that keeps start-up quick."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import pytest

from agentmem.model.identity import HashCache, digest, file_sha256, rope_part


def test_file_hash_is_sha256_and_reports_progress(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(bytes(range(256)) * 40_000)
    shares: list[float | None] = []
    assert (
        file_sha256(path, lambda _, share: shares.append(share))
        == hashlib.sha256(path.read_bytes()).hexdigest()
    )
    assert len(shares) == 3
    assert shares[-1] == 1


def test_digest_ignores_the_order_of_keys_only() -> None:
    assert digest({"a": 1, "b": [1, 2]}) == digest({"b": [1, 2], "a": 1})
    assert digest({"a": [1, 2]}) != digest({"a": [2, 1]})
    assert digest({"a": 1}) != digest({"a": "1"})


def test_known_file_is_not_read_again(tmp_path: Path) -> None:
    path = tmp_path / "weights"
    path.write_bytes(b"one")
    reads: list[str] = []
    cache_file = tmp_path / "cache" / "hashes.json"
    first = HashCache(cache_file).sha256(path, lambda stage, _: reads.append(stage))
    again = HashCache(cache_file).sha256(path, lambda stage, _: reads.append(stage))
    assert first == again == hashlib.sha256(b"one").hexdigest()
    assert len(reads) == 1


def test_changed_file_is_read_again_even_with_its_old_time(tmp_path: Path) -> None:
    path = tmp_path / "weights"
    path.write_bytes(b"one")
    stat = path.stat()
    cache = HashCache(tmp_path / "hashes.json")
    cache.sha256(path)
    path.write_bytes(b"two")
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert cache.sha256(path) == hashlib.sha256(b"two").hexdigest()


@pytest.mark.parametrize("content", ["", "[]", '{"x": 1}', "\x00"])
def test_unsound_cache_is_only_a_slow_start(tmp_path: Path, content: str) -> None:
    (tmp_path / "hashes.json").write_text(content)
    path = tmp_path / "weights"
    path.write_bytes(b"one")
    assert HashCache(tmp_path / "hashes.json").sha256(path) == hashlib.sha256(b"one").hexdigest()


def test_rope_part_holds_what_places_tokens() -> None:
    config = {
        "rope_theta": 1.0,
        "partial_rotary_factor": 0.5,
        "hidden_size": 8,
        "text_config": {"rope_scaling": None},
    }
    part = rope_part(config)
    assert part == {"rope_theta": 1.0, "partial_rotary_factor": 0.5, "text_config": {"rope_scaling": None}}
