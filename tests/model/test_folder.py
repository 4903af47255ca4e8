"""MLX model folders on disk."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx.utils import tree_flatten
from mlx_lm.models import llama
from mlx_lm.utils import dequantize_model

from agentmem.errors import ModelUnavailable
from agentmem.model.folder import for_device
from agentmem.model.loaded import LoadedModel, load
from agentmem.model.random import TINY, random_model

TOKENS = mx.array([[1, 2, 3, 200, 257]])


def _save(folder: Path, made: LoadedModel, **changes: Any) -> Path:
    """The model as a folder in the form that mlx-lm and transformers write."""
    folder.mkdir()
    mx.save_safetensors(str(folder / "model.safetensors"), dict(tree_flatten(made.model.parameters())))
    config = TINY | {"model_type": made.model.args.model_type} | changes
    (folder / "config.json").write_text(json.dumps(config))
    made.tokenizer._tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return _save(tmp_path / "tiny", random_model("llama", seed=1))


def test_folder_gives_the_saved_model(folder: Path, home: Path) -> None:
    made, loaded = random_model("llama", seed=1), load(str(folder), home)
    assert mx.array_equal(loaded.model(TOKENS), made.model(TOKENS))
    assert (loaded.name, loaded.max_context) == ("tiny", TINY["max_position_embeddings"])
    assert loaded.tokenizer.special == made.tokenizer.special
    assert loaded.tokenizer.chat_template == made.tokenizer.chat_template


@pytest.mark.parametrize("bits", [4, 8])
def test_quantised_narrow_folder_is_widened_on_the_cpu(bits: int, tmp_path: Path, home: Path) -> None:
    made = random_model("qwen3", seed=2)
    made.model.set_dtype(mx.bfloat16)
    nn.quantize(made.model, 64, bits)
    folder = _save(tmp_path / "quantised", made, quantization={"group_size": 64, "bits": bits})
    loaded = load(str(folder), home)
    if mx.default_device().type != mx.cpu:
        assert loaded.dtype == mx.bfloat16
        return
    assert loaded.dtype == mx.float32
    named: list[Any] = list(tree_flatten(loaded.model.parameters()))
    assert {weight.dtype for _, weight in named} == {mx.float32}
    made.model.set_dtype(mx.float32)
    assert mx.allclose(loaded.model(TOKENS), dequantize_model(made.model)(TOKENS), atol=1e-5)


def test_every_eos_of_the_config_ends_a_reply(tmp_path: Path, home: Path) -> None:
    folder = _save(tmp_path / "tiny", random_model("llama", seed=1), eos_token_id=[256, 10])
    assert load(str(folder), home).tokenizer.eos_ids == {10, 256, 257}


def test_missing_folder_names_the_choices(home: Path) -> None:
    with pytest.raises(ModelUnavailable, match=r"'embedded', an MLX model folder, a \.gguf file"):
        load("no such model", home)


def test_file_that_is_no_gguf_is_refused(tmp_path: Path, home: Path) -> None:
    (tmp_path / "model.bin").write_bytes(b"x")
    with pytest.raises(ModelUnavailable, match="neither"):
        load(str(tmp_path / "model.bin"), home)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("config.json", r"no config\.json"),
        ("model.safetensors", "safetensors"),
        ("tokenizer.json", "tokenizer"),
    ],
)
def test_folder_without_a_file_names_it(folder: Path, home: Path, name: str, message: str) -> None:
    (folder / name).unlink()
    with pytest.raises(ModelUnavailable, match=message):
        load(str(folder), home)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json"])
@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff" * 64])
def test_folder_with_an_unsound_file_is_refused(folder: Path, home: Path, name: str, content: bytes) -> None:
    (folder / name).write_bytes(content)
    with pytest.raises(ModelUnavailable):
        load(str(folder), home)


def test_truncated_weights_are_refused(folder: Path, home: Path) -> None:
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    with pytest.raises(ModelUnavailable, match="cannot be loaded"):
        load(str(folder), home)


def test_unknown_architecture_is_named(tmp_path: Path, home: Path) -> None:
    folder = _save(tmp_path / "tiny", random_model("llama", seed=1), model_type="brainwave9")
    with pytest.raises(ModelUnavailable, match="brainwave9"):
        load(str(folder), home)


def test_code_in_the_folder_is_never_run(folder: Path, tmp_path: Path, home: Path) -> None:
    proof = tmp_path / "proof"
    (folder / "custom.py").write_text(f"open({str(proof)!r}, 'w')\n")
    config = json.loads((folder / "config.json").read_text())
    for extra in (
        {"model_file": "custom.py"},
        {"model_type": "custom", "auto_map": {"AutoModelForCausalLM": "custom.Model"}},
    ):
        (folder / "config.json").write_text(json.dumps(config | extra))
        with pytest.raises(ModelUnavailable, match="code"):
            load(str(folder), home)
    (folder / "config.json").write_text(json.dumps(config))
    tokenizer = json.loads((folder / "tokenizer_config.json").read_text())
    tokenizer |= {
        "tokenizer_class": "Custom",
        "auto_map": {"AutoTokenizer": ["custom.Custom", "custom.Custom"]},
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    with pytest.raises(ModelUnavailable, match=r"cannot be loaded"):
        load(str(folder), home)
    assert not proof.exists()


def test_identity_follows_each_part(folder: Path, tmp_path: Path, home: Path) -> None:
    base = load(str(folder), home).identity
    assert load(str(shutil.copytree(folder, tmp_path / "moved")), home).identity == base

    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"rope_theta": 20000.0}))
    assert _changed(base, load(str(folder), home).identity) == {"config", "rope"}
    (folder / "config.json").write_text(json.dumps(config, indent=3, sort_keys=True))
    assert load(str(folder), home).identity == base

    other = dict(tree_flatten(random_model("llama", seed=2).model.parameters()))
    mx.save_safetensors(str(folder / "model.safetensors"), other)
    assert _changed(base, load(str(folder), home).identity) == {"weights"}


def test_identity_follows_the_chat_template(folder: Path, home: Path) -> None:
    base = load(str(folder), home).identity
    template = folder / "chat_template.jinja"
    assert template.exists()
    template.write_text(template.read_text() + "\n{# changed #}x")
    assert _changed(base, load(str(folder), home).identity) == {"chat_template"}


def _changed(before: dict[str, str], after: dict[str, str]) -> set[str]:
    return {name for name in before if before[name] != after[name]}


def test_model_that_no_memory_can_hold_is_refused_before_it_is_made() -> None:
    if mx.default_device().type != mx.cpu:
        pytest.skip("only the CPU widens a model")
    config = TINY | {"model_type": "llama", "vocab_size": 1 << 30, "hidden_size": 1 << 14}
    with pytest.raises(ModelUnavailable, match="float32"):
        for_device(llama.Model(llama.ModelArgs.from_dict(config)))
