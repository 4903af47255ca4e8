"""Embeddings as OpenAI's client asks for them: texts about the same lie near each other, and both encodings say the same."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

TEXTS = ["The cat sleeps on the sofa.", "A kitten naps on the couch.", "Interest rates rose by half a point."]


@pytest.fixture(scope="module")
def hashed(start, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A daemon whose encoder needs no weights."""
    return start(tmp_path_factory.mktemp("hashed") / "home", "--episode-encoder", "hash512")


def test_both_encodings_hold_the_same_vectors(hashed) -> None:
    client = hashed.openai()
    plain = client.embeddings.create(model="default", input=TEXTS, encoding_format="float")
    packed = client.embeddings.create(
        model="hash512", input=TEXTS
    )  # the client asks for base64, and unpacks it
    rows = np.array([one.embedding for one in plain.data])
    assert np.allclose(rows, [one.embedding for one in packed.data], atol=1e-7)
    assert [one.index for one in plain.data] == [0, 1, 2]
    assert plain.model == "hash512"
    assert rows.shape == (3, 512)
    assert np.allclose(np.linalg.norm(rows, axis=1), 1, atol=1e-5)
    assert plain.usage.prompt_tokens == sum(len(text.split()) for text in TEXTS)


def test_one_text_is_a_list_of_one(hashed) -> None:
    (one,) = hashed.openai().embeddings.create(model="default", input=TEXTS[0]).data
    (same, _) = hashed.openai().embeddings.create(model="default", input=TEXTS[:2]).data
    assert one.embedding == same.embedding


@pytest.mark.slow
def test_the_embedded_encoder_knows_meanings(daemon) -> None:
    found = daemon.openai().embeddings.create(model="minilm", input=TEXTS)
    cat, kitten, money = (np.array(one.embedding) for one in found.data)
    assert cat @ kitten > 0.4 > cat @ money


@pytest.mark.parametrize(
    ("fields", "status", "param"),
    [
        ({"input": []}, 400, "input"),
        ({"input": ""}, 400, "input.0"),
        ({"input": [1, 2, 3]}, 400, "input"),
        ({"input": [[1, 2]]}, 400, "input"),
        ({"input": "x", "dimensions": 7}, 400, "dimensions"),
        ({"input": "x", "encoding_format": "hex"}, 400, "encoding_format"),
        ({"input": "x", "model": "text-embedding-3-small"}, 404, "model"),
        ({}, 400, "input"),
    ],
)
def test_what_cannot_be_done_is_said(hashed, fields: dict[str, Any], status: int, param: str) -> None:
    reply = hashed.http.post("/v1/embeddings", json=fields)
    assert reply.status_code == status, reply.text
    assert reply.json()["error"]["param"] == param
