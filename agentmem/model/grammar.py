"""Constrained decoding: which tokens a reply may go on with, so that it is what its request asked for."""

from __future__ import annotations

import json
import threading
from collections.abc import Collection
from functools import cached_property
from typing import Any

import numpy as np
from llguidance import LLMatcher, LLTokenizer
from numpy.typing import NDArray

from agentmem.errors import AgentMemError, BadRequest

COMPACT = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
"""One way to write a value down: the way most models were trained on, and no endless white space."""
MOST_CHARACTERS = 256 * 1024
MOST_DEPTH = 64


class Constraint:
    """What one reply may still say. Not thread-safe; `fork` gives another reply one of its own."""

    def __init__(self, matcher: Any, vocab: int) -> None:
        self._matcher, self._vocab = matcher, vocab

    def fork(self) -> Constraint:
        """The same, for another reply that has said as much."""
        return Constraint(self._matcher.deep_copy(), self._vocab)

    def allowed(self) -> NDArray[np.bool_]:
        """Whether each token may come next: bool [vocab]. Raises AgentMemError where the grammar grows too complex."""
        bits = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
        if self._matcher.is_error():
            raise AgentMemError(f"the reply cannot be constrained any further: {self._matcher.get_error()}")
        return np.unpackbits(bits, bitorder="little")[: self._vocab].astype(bool)

    def saw(self, token: int) -> None:
        """`token`, one of those allowed, is said."""
        self._matcher.consume_token(token)


class Grammars:
    """Makes constraints for one tokenizer. Thread-safe; a grammar may take a second to compile: not for the engine's thread."""

    def __init__(self, backend: Any, vocab: int, ends: Collection[int], special: dict[int, str]) -> None:
        """`backend`: the tokenizer; `ends` are the ids that end a reply, `special` the texts of special tokens."""
        self._backend, self._vocab, self._ends = backend, vocab, sorted(ends)
        self._special = {text: token for token, text in special.items()}
        self._lock = threading.Lock()

    @cached_property
    def _tokenizer(self) -> Any:
        return LLTokenizer(self._backend.to_str(), n_vocab=self._vocab, eos_token=self._ends)

    def constraint(self, lark: str, param: str) -> Constraint:
        """The constraint of a grammar in llguidance's Lark. Raises BadRequest for one that cannot be compiled."""
        with self._lock:
            tokenizer = self._tokenizer
        grammar = LLMatcher.grammar_from_lark(lark)
        flaw = LLMatcher.validate_grammar(grammar, tokenizer)
        if flaw and not flaw.startswith("WARNING"):
            raise BadRequest(f"this schema cannot be used: {flaw[:400]}", param=param, code="invalid_schema")
        return Constraint(LLMatcher(tokenizer, grammar, log_level=0), self._vocab)

    def marker(self, text: str) -> str:
        """`text` in a Lark rule: as its special token where it is one."""
        token = self._special.get(text)
        return f"<[{token}]>" if token is not None else json.dumps(text)


def json_rule(schema: dict[str, Any], param: str) -> str:
    """A Lark expression for the values of a JSON schema. Raises BadRequest for a schema that is too large or too deep."""
    if _depth(schema) > MOST_DEPTH:
        raise BadRequest(f"the schema is nested deeper than {MOST_DEPTH}", param=param, code="invalid_schema")
    text = json.dumps({**schema, "x-guidance": COMPACT})
    if len(text) > MOST_CHARACTERS:
        raise BadRequest(
            f"the schema has more than {MOST_CHARACTERS} characters", param=param, code="invalid_schema"
        )
    return f"%json {text}"


def _depth(value: Any) -> int:
    deepest, level = 0, [value]
    while level and deepest <= MOST_DEPTH:
        deepest += 1
        level = [
            inner
            for outer in level
            if isinstance(outer, dict | list)
            for inner in (outer.values() if isinstance(outer, dict) else outer)
        ]
    return deepest
