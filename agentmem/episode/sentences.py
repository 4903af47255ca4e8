"""Sentence encoders: a folder with a BERT, its tokenizer, and how its states become one vector."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from agentmem.episode.bert import Bert, BertConfig
from agentmem.errors import ModelUnavailable
from agentmem.model.unsound import unsound
from agentmem.quant.device import backend

WINDOW = 256
"""Tokens of a text that are read, for folders that name no number."""
BATCH_TOKENS = {"cpu": 1024, "metal": 8192, "cuda": 8192}
"""Tokens of one batch, padding too. What a CPU's cache does not hold of a batch makes it slower, not faster."""
_POOLING = {"pooling_mode_mean_tokens": "mean", "pooling_mode_cls_token": "first"}


@dataclass(frozen=True, slots=True)
class Reading:
    """How texts are read: at most `window` tokens, pooled by "mean" or "first", behind a prefix for each kind of text."""

    window: int
    pooling: str
    query_prefix: str = ""
    text_prefix: str = ""

    @classmethod
    def of(cls, folder: Path, config: BertConfig) -> Reading:
        """What the folder's files say; without them the mean over 256 tokens. Raises ModelUnavailable for another pooling."""
        window = _json(folder / "sentence_bert_config.json").get("max_seq_length") or WINDOW
        pooling = _json(folder / "1_Pooling" / "config.json") or {"pooling_mode_mean_tokens": True}
        chosen = [name for name, on in pooling.items() if name.startswith("pooling_mode_") and on is True]
        if len(chosen) != 1 or chosen[0] not in _POOLING:
            raise ModelUnavailable(
                f"{folder} pools by {', '.join(chosen) or 'nothing'}, which is not supported"
            )
        prompts = _json(folder / "config_sentence_transformers.json").get("prompts") or {}
        query = prompts.get("query") or ""
        text = prompts.get("document") or prompts.get("passage") or ""
        return cls(min(int(window), config.max_position_embeddings), _POOLING[chosen[0]], query, text)


class SentenceEncoder:
    """Texts to unit vectors. Engine thread only, from loading on: it is an MLX object, like the model.

    A text's vector does not depend on the texts beside it, but for the rounding of float32.
    """

    def __init__(self, name: str, network: Bert, tokenizer: Tokenizer, reading: Reading) -> None:
        self.name, self.dims, self.reading = name, network.config.hidden_size, reading
        tokenizer.no_padding()
        tokenizer.enable_truncation(reading.window)
        self._network, self._tokenizer = network, tokenizer

    @classmethod
    def load(cls, folder: Path, name: str) -> SentenceEncoder:
        """Raises ModelUnavailable, naming what is missing or not supported. No code of the folder is run."""
        weights = sorted(folder.glob("model*.safetensors"))
        for needed in ("config.json", "tokenizer.json"):
            if not (folder / needed).is_file():
                raise ModelUnavailable(f"{folder} is no sentence encoder: it holds no {needed}")
        if not weights:
            raise ModelUnavailable(f"{folder} is no sentence encoder: it holds no model*.safetensors")
        with unsound(f"The sentence encoder in {folder} cannot be loaded"):
            config = BertConfig.of(_json(folder / "config.json"))
            reading = Reading.of(folder, config)
            loaded: dict[str, mx.array] = {}
            for file in weights:
                part = mx.load(str(file))
                assert isinstance(part, dict)
                loaded.update(part)
            network = Bert(config, loaded)
            return cls(name, network, Tokenizer.from_file(str(folder / "tokenizer.json")), reading)

    def encode(self, texts: Sequence[str], query: bool = False) -> NDArray[np.float32]:
        """Unit rows float32 [len(texts), dims]. `query`: the texts are questions, which some encoders read another way."""
        prefix = self.reading.query_prefix if query else self.reading.text_prefix
        ids = [e.ids for e in self._tokenizer.encode_batch([prefix + text for text in texts])]
        rows = np.zeros((len(texts), self.dims), np.float32)
        for batch in _batches([len(i) for i in ids], BATCH_TOKENS[backend()]):
            rows[batch] = np.array(self._pooled([ids[i] for i in batch]))
        return rows

    def lengths(self, texts: Sequence[str]) -> list[int]:
        """How many tokens of each text are read: at most those of the window."""
        return [len(e.ids) for e in self._tokenizer.encode_batch(list(texts))]

    def _pooled(self, ids: Sequence[Sequence[int]]) -> mx.array:
        """Unit rows [n, dims] of texts that are padded to the longest."""
        padded = np.zeros((len(ids), max(map(len, ids))), np.int32)
        mask = np.zeros(padded.shape, bool)
        for row, there, text in zip(padded, mask, ids, strict=True):
            row[: len(text)], there[: len(text)] = text, True
        hidden = self._network(mx.array(padded), mx.array(mask))
        if self.reading.pooling == "first":
            pooled = hidden[:, 0]
        else:
            weight = mx.array(mask, dtype=mx.float32)[..., None]
            pooled = (hidden * weight).sum(axis=1) / weight.sum(axis=1)
        pooled = pooled / mx.maximum(mx.linalg.norm(pooled, axis=-1, keepdims=True), 1e-12)
        mx.eval(pooled)
        return pooled


def _batches(lengths: Sequence[int], room: int) -> list[list[int]]:
    """Numbers of texts that go together: of about one length, so that little is padded."""
    batches: list[list[int]] = []
    for number in sorted(range(len(lengths)), key=lambda i: lengths[i]):
        if batches and lengths[number] * (len(batches[-1]) + 1) <= room:
            batches[-1].append(number)
        else:
            batches.append([number])
    return batches


def _json(file: Path) -> dict[str, Any]:
    """The file's object; empty where there is no such file."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise ModelUnavailable(f"{file} cannot be read: {error}") from error
    return found if isinstance(found, dict) else {}
