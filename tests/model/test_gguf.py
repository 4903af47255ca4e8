"""GGUF files: what is read, what it becomes, what is refused."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
import sentencepiece
from gguf_file import byte_vocabulary, pack, write_gguf, write_model
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mlx.utils import tree_flatten, tree_unflatten
from mlx_lm.models.rope_utils import Llama3RoPE
from mlx_lm.tokenizer_utils import TokenizerWrapper
from transformers import PreTrainedTokenizerFast

from agentmem.errors import ModelUnavailable
from agentmem.model.chat import ChatTokenizer
from agentmem.model.convert import converted
from agentmem.model.gguf import read_header
from agentmem.model.identity import file_sha256
from agentmem.model.loaded import LoadedModel, load
from agentmem.model.progress import silent
from agentmem.model.random import CHATML, byte_tokenizer, random_model
from agentmem.model.vocabulary import build_tokenizer

TEXT = "A tiny model reads 3 words.\n"


def _logits(model: Any) -> mx.array:
    return model(mx.array([byte_tokenizer().encode(TEXT)]))


def _check_same(loaded: LoadedModel, made: LoadedModel, meaning: dict[str, mx.array]) -> None:
    """The loaded model's logits are those of the made model with the weights that the file stands for."""
    made.model.update(tree_unflatten(list(meaning.items())))
    assert mx.allclose(_logits(loaded.model), _logits(made.model), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3"])
def test_architecture_gives_the_logits_of_the_original(architecture: str, tmp_path: Path, home: Path) -> None:
    made = random_model(architecture, seed=3, num_attention_heads=2, num_key_value_heads=2, rope_theta=5000.0)
    path, meaning = write_model(tmp_path / f"{architecture}.gguf", made)
    loaded = load(str(path), home)
    _check_same(loaded, made, meaning)
    assert loaded.name == architecture
    assert (loaded.dtype, loaded.max_context) == (mx.float32, made.max_context)
    assert loaded.tokenizer.encode("<|im_start|>ab") == [256, 97, 98]
    assert loaded.tokenizer.eos_ids == {257}


@pytest.mark.parametrize("kind", ["F16", "BF16", "Q4_0", "Q4_1", "Q8_0"])
def test_packing_keeps_every_number(kind: str, tmp_path: Path, home: Path) -> None:
    made = random_model("llama", seed=4)
    path, meaning = write_model(tmp_path / "model.gguf", made, kind=kind)
    loaded = load(str(path), home)
    weights = dict(tree_flatten(loaded.model.parameters()))
    assert weights.keys() == meaning.keys()
    for name, expected in meaning.items():
        # Sub-normal numbers of bfloat16 have no exact half: nothing else may differ.
        assert mx.allclose(weights[name], expected, rtol=0, atol=6e-8 if kind == "BF16" else 0), name
    _check_same(loaded, made, meaning)


def test_converted_folder_is_reused(tmp_path: Path, home: Path) -> None:
    path, _ = write_model(tmp_path / "model.gguf", random_model("llama", seed=5))
    first = load(str(path), home)
    folder = next((home / "models").glob("gguf-*"))
    made_at = folder.stat().st_mtime_ns
    assert load(str(path), home).identity == first.identity
    assert folder.stat().st_mtime_ns == made_at


def test_llama3_rope_factors_become_the_scaling(tmp_path: Path, home: Path) -> None:
    scaling = {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    made = random_model("llama", seed=6, rope_scaling=scaling, rope_theta=500000.0)
    path, meaning = write_model(tmp_path / "plain.gguf", made)
    factors = Llama3RoPE(64, base=500000.0, scaling_config=scaling)._freqs / 500000.0 ** (
        mx.arange(0, 64, 2) / 64
    )
    assert factors.max() == 8
    path = _with_rope_factors(tmp_path / "scaled.gguf", made, np.array(factors))
    _check_same(load(str(path), home), made, meaning)
    with pytest.raises(ModelUnavailable, match="RoPE factors"):
        load(str(_with_rope_factors(tmp_path / "other.gguf", made, np.array(factors)[::-1].copy())), home)


def _with_rope_factors(path: Path, made: LoadedModel, factors: np.ndarray) -> Path:
    write_model(path, made, extra_tensors={"rope_freqs.weight": pack("F32", factors)[0]})
    return path


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"general__architecture": "mamba"}, "architecture 'mamba'"),
        ({"llama__expert_count": 8}, "mixtures of experts"),
        ({"llama__rope__scaling__type": "yarn"}, "'yarn' RoPE scaling"),
        ({"llama__rope__dimension_count": 32}, "part of each head"),
        ({"tokenizer__ggml__model": "bert"}, "kind 'bert'"),
        ({"tokenizer__ggml__pre": "chatglm-bpe"}, "'chatglm-bpe'"),
        ({"tokenizer__ggml__tokens": ["a"] * 258}, "twice"),
    ],
)
def test_what_does_not_map_is_refused_by_name(
    changes: dict[str, Any], message: str, tmp_path: Path, home: Path
) -> None:
    path, _ = write_model(tmp_path / "model.gguf", random_model("llama", seed=7), **changes)
    with pytest.raises(ModelUnavailable, match=message):
        load(str(path), home)
    assert not list((home / "models").glob("gguf-*"))


@pytest.mark.parametrize(("kind", "size"), [("Q4_K", 144), ("Q5_0", 8 * 22)])
def test_packing_that_cannot_be_read_is_refused_by_name(kind: str, size: int, tmp_path: Path) -> None:
    path = write_gguf(
        tmp_path / "k.gguf",
        {"general.architecture": "llama"},
        {"output.weight": (kind, (1, 256), bytes(size))},
    )
    with pytest.raises(ModelUnavailable, match=kind):
        read_header(path)


def test_tensor_that_the_architecture_lacks_is_refused(tmp_path: Path, home: Path) -> None:
    path = tmp_path / "model.gguf"
    extra = {"blk.0.attn_sinks.weight": pack("F32", np.ones(4, np.float32))[0]}
    write_model(path, random_model("llama", seed=7), extra_tensors=extra)
    with pytest.raises(ModelUnavailable, match=r"blk\.0\.attn_sinks\.weight"):
        load(str(path), home)


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path, _ = write_model(
        tmp_path_factory.mktemp("gguf") / "m.gguf", random_model("llama", seed=8), kind="Q4_0"
    )
    return path.read_bytes()


def _read(data: bytes, folder: Path) -> None:
    path = folder / "damaged.gguf"
    path.write_bytes(data)
    read_header(path)


@given(share=st.floats(0, 0.999))
@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_truncated_file_is_refused(sound: bytes, tmp_path: Path, share: float) -> None:
    with pytest.raises(ModelUnavailable):
        _read(sound[: int(len(sound) * share)], tmp_path)


@given(position=st.integers(0, 9000), value=st.binary(min_size=1, max_size=8))
@settings(deadline=None, max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_damaged_header_is_read_or_refused_but_never_crashes(
    sound: bytes, tmp_path: Path, position: int, value: bytes
) -> None:
    with suppress(ModelUnavailable):
        _read(sound[:position] + value + sound[position + len(value) :], tmp_path)


def test_interrupted_conversion_leaves_nothing(tmp_path: Path, home: Path) -> None:
    path, _ = write_model(tmp_path / "model.gguf", random_model("llama", seed=9))
    sha256, target = file_sha256(path), home / "models" / "target"

    def interrupted(stage: str, fraction: float | None) -> None:
        if "weights" in stage:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        converted(path, sha256, target, interrupted)
    assert not target.exists()
    assert not list(target.parent.glob("*.new-*"))
    assert (converted(path, sha256, target, silent) / "config.json").exists()


def test_sentencepiece_vocabulary_cuts_text_as_sentencepiece_does(tmp_path: Path) -> None:
    corpus = tmp_path / "corpus.txt"
    corpus.write_text(Path(__file__).read_text() + "Grüße aus Köln, naïve façade.\n" * 20)
    sentencepiece.SentencePieceTrainer.train(
        input=str(corpus),
        model_prefix=str(tmp_path / "sp"),
        model_type="bpe",
        vocab_size=600,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        split_digits=True,
        user_defined_symbols=["<|user|>"],
        minloglevel=2,
    )
    reference = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "sp.model"))
    numbers = range(reference.vocab_size())
    kinds = [
        2 if reference.is_unknown(n)
        else 3 if reference.is_control(n)
        else 6 if reference.is_byte(n)
        else 4 if reference.id_to_piece(n) == "<|user|>"
        else 1
        for n in numbers
    ]  # fmt: skip
    metadata = {
        "general.architecture": "llama",
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": [reference.id_to_piece(n) for n in numbers],
        "tokenizer.ggml.scores": [float(reference.get_score(n)) for n in numbers],
        "tokenizer.ggml.token_type": kinds,
        "tokenizer.ggml.unknown_token_id": reference.unk_id(),
    }
    tokenizer = build_tokenizer(read_header(write_gguf(tmp_path / "sp.gguf", metadata, {})))
    for text in (
        TEXT,
        "def test(a: int) -> None:  # 2026",
        "Grüße  aus   Köln\n\n🙂 漢",
        " lead",
        "x",
        "\tassert\t",
    ):
        ids = tokenizer.encode(text, add_special_tokens=False).ids
        assert ids == reference.encode(text)
        assert tokenizer.decode(ids, skip_special_tokens=False) == text
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, chat_template=CHATML)
    chat = ChatTokenizer(TokenizerWrapper(fast))
    stream = chat.detokenizer()
    ids = chat.encode("Grüße 🙂 漢\n  x")
    assert [chat.special[n] for n in chat.encode("a<|user|></s>") if n in chat.special] == [
        "<|user|>",
        "</s>",
    ]
    assert "".join([stream.add(n) for n in ids]) + stream.finish() == "Grüße 🙂 漢\n  x" == chat.decode(ids)


def test_byte_vocabulary_needs_every_key(tmp_path: Path, home: Path) -> None:
    made = random_model("llama", seed=10)
    for key in byte_vocabulary(CHATML):
        if key in ("tokenizer.ggml.eos_token_id", "tokenizer.ggml.pre"):
            continue
        path, _ = write_model(tmp_path / "model.gguf", made, dropped=key)
        with pytest.raises(ModelUnavailable):
            load(str(path), home)
