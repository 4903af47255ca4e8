"""The model as a body and a head, so that logits are made of the rows that choose a token, not of all rows of a prompt."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any

import mlx.core as mx
import mlx.nn as nn

log = logging.getLogger(__name__)

Head = Callable[[mx.array], mx.array]


class Network:
    """Runs a model over token ids. Engine thread only.

    mlx-lm's models return logits of every row. Where the model's own layers can be told apart, `splits`, the head sees only
    the rows that are asked for; elsewhere it sees all of them.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model: Any = model
        self._head = _head(model)

    @property
    def splits(self) -> bool:
        return self._head is not None

    def logits(self, ids: mx.array, views: Sequence[Any], rows: Sequence[int]) -> mx.array:
        """ids int32 [n, tokens], `views` a cache for each layer -> logits [len(rows), vocab], lazily.

        `rows` count tokens, row after row of `ids`. The views have their rows in any case, even with no `rows` at all.
        """
        body: Any = self._model if self._head is None else self._model.model
        out = body(ids, cache=views)
        out = out.reshape(-1, out.shape[-1])
        if len(rows) < out.shape[0]:
            out = out[mx.array(list(rows), dtype=mx.int32)]
        return out if self._head is None else self._head(out)

    @cached_property
    def walks(self) -> bool:
        """Whether `embedded`, every `layer` and `finished` in turn are the whole model; tried on three tokens."""
        ids = mx.array([[0, 1, 2]])
        try:
            if self._head is None:
                return False
            hidden = self.embedded(ids)
            for number in range(len(self._model.layers)):
                hidden = self.layer(number, hidden, None, mask="causal")
            return bool(mx.allclose(self.finished(hidden), self._model(ids), rtol=1e-3, atol=1e-3).item())
        except (AttributeError, TypeError, ValueError, RuntimeError) as error:
            log.info("the layers of this model cannot be run one by one: %s", error)
            return False

    def embedded(self, ids: mx.array) -> mx.array:
        """ids int32 [n, tokens] -> what goes into the first layer, [n, tokens, width]. Precondition: `walks`, here and below."""
        return self._model.model.embed_tokens(ids)

    def layer(self, number: int, hidden: mx.array, view: Any, mask: str | None = None) -> mx.array:
        """One layer over hidden [n, tokens, width]; its cache is `view`."""
        return self._model.layers[number](hidden, mask, cache=view)

    def finished(self, hidden: mx.array) -> mx.array:
        """What leaves the last layer -> logits [..., vocab]."""
        out = self._model.model.norm(hidden)
        assert self._head is not None
        return self._head(out)


def _head(model: Any) -> Head | None:
    """What makes logits of the body's output, if it is one of the model's layers and nothing else; tried on two tokens."""
    body = getattr(model, "model", None)
    if body is None:
        return None
    heads = [getattr(model, "lm_head", None), getattr(getattr(body, "embed_tokens", None), "as_linear", None)]
    ids = mx.array([[0, 1]])
    try:
        want, hidden = model(ids), body(ids)
        for head in heads:
            if head is not None and mx.array_equal(head(hidden), want).item():
                return head
    except (TypeError, ValueError, RuntimeError) as error:
        log.info("logits are made of all rows of a prompt: %s", error)
    return None
