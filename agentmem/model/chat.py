"""Chat messages to token ids and back."""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterable, Sequence
from functools import cached_property
from typing import Any

from mlx_lm.tokenizer_utils import TokenizerWrapper

from agentmem.errors import BadRequest, ModelUnavailable
from agentmem.model.grammar import Constraint, Grammars, json_rule
from agentmem.model.tools import ToolFormat, knows_tools

PROBE = 'Zwei  Spaces,\n\ttabs; naïve café 漢字 🙂👩‍💻 x_1 = {"a": [1.5, -2]}  # done\n'


class Detokenizer:
    """Text of a stream of ids: whatever was returned so far, joined, is `decode` of the ids so far.

    Bytes of a character that is not complete yet are held back. One stream each; not thread-safe.
    """

    def __init__(self, pieces: Sequence[bytes], *, trim: bool = False) -> None:
        self._pieces = pieces
        self._trim = trim
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def add(self, token: int) -> str:
        """The text that `token` completes; may be ""."""
        return self._trimmed(self._decoder.decode(_piece(self._pieces, token)))

    def finish(self) -> str:
        """What was held back: "" or replacement characters. The stream is over."""
        return self._trimmed(self._decoder.decode(b"", final=True))

    def _trimmed(self, text: str) -> str:
        if self._trim and text:
            self._trim = False
            return text.removeprefix(" ")
        return text


class ChatTokenizer:
    """A tokenizer with its chat template. Every method is thread-safe.

    `special` maps the id of each token that is recognised wherever its text occurs to that text.
    `eos_ids` end a reply. `vocab_size` is one more than the greatest id.
    """

    special: dict[int, str]
    eos_ids: frozenset[int]
    vocab_size: int

    def __init__(self, tokenizer: TokenizerWrapper) -> None:
        """Raises ModelUnavailable for a tokenizer without chat template or of a kind not supported."""
        if not tokenizer.has_chat_template:
            raise ModelUnavailable("The model has no chat template; choose one that was trained to chat")
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if backend is None:
            raise ModelUnavailable("The model has no fast tokenizer (tokenizer.json); convert it first")
        # Set once: the calls of transformers change these at every use, which is not thread-safe.
        backend.no_truncation()
        backend.no_padding()
        self._tokenizer, self._backend = tokenizer, backend
        self.special = {
            number: token.content for number, token in sorted(backend.get_added_tokens_decoder().items())
        }
        vocab = backend.get_vocab(with_added_tokens=True)
        self.vocab_size = 1 + max(vocab.values())
        self._pieces, self._trim = _pieces(_decoder(backend), vocab, self.special)
        self._check()
        self.tools = ToolFormat(tokenizer, native=knows_tools(self._template))
        self.eos_ids = frozenset(tokenizer.eos_token_ids) | self._ends_of_turn()
        self._grammars = Grammars(backend, self.vocab_size, self.eos_ids, self.special)

    def render(
        self, messages: list[dict[str, Any]], *, tools: list[Any] | None = None, generation: bool = True
    ) -> str:
        """The conversation as the model's chat template writes it; `generation` adds the head of a reply.

        Raises BadRequest where the template refuses the messages.
        """
        try:
            written = self.tools.written(messages, tools)
            return self._template(written, tools if self.tools.native else None, generation=generation)
        except BadRequest:
            raise
        except Exception as error:  # a template is a program of its own
            message = f"The model's chat template refuses these messages: {error}"
            raise BadRequest(message, param="messages") from error

    def _template(self, messages: Any, tools: Any, *, generation: bool = True) -> str:
        return self._tokenizer.apply_chat_template(
            messages, tools=tools or None, tokenize=False, add_generation_prompt=generation
        )

    def constraint(
        self,
        schema: dict[str, Any] | None,
        tools: list[dict[str, Any]],
        name: str | None = None,
        *,
        parallel: bool = True,
    ) -> Constraint:
        """For replies that are a value of a JSON schema, or call `tools`: any of them, or the one of that `name`.

        Takes up to a second. Raises BadRequest for schemas that cannot be used. Precondition: there is one or the other.
        """
        said = ["calls"] * bool(tools) + ["answer"] * (schema is not None)
        lark = f"start: {' | '.join(said)}\n"
        if tools:
            lark += self.tools.rules(tools, name, parallel=parallel, grammars=self._grammars)
        if schema is not None:
            lark += f"answer: {json_rule(schema, 'response_format')}\n"
        return self._grammars.constraint(lark, "tools" if schema is None else "response_format")

    def encode(self, text: str) -> list[int]:
        """Ids of the text. Nothing is added; the text of a special token becomes that token.

        Raises BadRequest for text that is no Unicode: half a surrogate pair.
        """
        try:
            return self._backend.encode(text, add_special_tokens=False).ids
        except TypeError as error:
            raise BadRequest("The text holds half a surrogate pair", param="messages") from error

    def decode(self, ids: Sequence[int]) -> str:
        """Text of the ids, special tokens shown, spaces as they are.

        Gives back what a byte-level tokenizer encoded, but for bytes that its vocabulary lacks.
        """
        stream = self.detokenizer()
        return "".join([stream.add(token) for token in ids]) + stream.finish()

    def piece(self, token: int) -> bytes:
        """The bytes of one token, which may be a part of a character; none for an id that stands for nothing."""
        return _piece(self._pieces, token)

    def detokenizer(self) -> Detokenizer:
        """A new stream."""
        return Detokenizer(self._pieces, trim=self._trim)

    @cached_property
    def chat_template(self) -> str:
        """Source of the template, or the name of the code that stands for it."""
        template = self._tokenizer.chat_template
        if template is None:
            return str(self._tokenizer.init_kwargs.get("chat_template_type"))
        return template if isinstance(template, str) else json.dumps(template, sort_keys=True)

    def _ends_of_turn(self) -> frozenset[int]:
        """The special token that the template puts right behind a reply."""
        reply = "reply"
        turn = [{"role": "user", "content": "question"}, {"role": "assistant", "content": reply}]
        try:
            text = self.render(turn, generation=False)
        except BadRequest:
            return frozenset()
        behind = self.encode(text.rpartition(reply)[2])
        return frozenset(behind[:1]) & self.special.keys()

    def _check(self) -> None:
        """Raises ModelUnavailable where the model's own tokenizer class does more than its tokenizer.json."""
        ids = self._tokenizer.encode(PROBE, add_special_tokens=False)
        text = self._tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        if self.encode(PROBE) != ids or self.decode(ids) != text:
            raise ModelUnavailable("The model's tokenizer works in a way that is not supported")


def _piece(pieces: Sequence[bytes], token: int) -> bytes:
    return pieces[token] if 0 <= token < len(pieces) else b""


def _pieces(decoder: Any, vocab: dict[str, int], special: dict[int, str]) -> tuple[list[bytes], bool]:
    """Bytes of every id, and whether the text loses its first space."""
    steps = list(_steps(decoder))
    kinds = {step["type"] for step in steps}
    pieces = [b""] * (1 + max(vocab.values()))
    if "ByteLevel" in kinds:
        table = _byte_of_char()
        for token, number in vocab.items():
            known = [table.get(char) for char in token]
            pieces[number] = token.encode() if None in known else bytes(known)  # type: ignore[arg-type]
    elif "ByteFallback" in kinds or "Metaspace" in kinds:
        for token, number in vocab.items():
            is_byte = "ByteFallback" in kinds and len(token) == 6 and token.startswith("<0x")
            pieces[number] = bytes.fromhex(token[3:5]) if is_byte else token.replace("▁", " ").encode()
    else:
        raise ModelUnavailable(f"Tokenizers that decode by {sorted(kinds)} are not supported")
    for number, text in special.items():
        pieces[number] = text.encode()
    trim = any(
        step["type"] == "Strip" or (step["type"] == "Metaspace" and step.get("prepend_scheme") != "never")
        for step in steps
    )
    return pieces, trim


def _decoder(backend: Any) -> Any:
    return None if backend.decoder is None else json.loads(backend.decoder.__getstate__())


def _steps(decoder: Any) -> Iterable[dict[str, Any]]:
    if decoder is None:
        return
    if decoder["type"] == "Sequence":
        for part in decoder["decoders"]:
            yield from _steps(part)
    else:
        yield decoder


def _byte_of_char() -> dict[str, int]:
    """GPT-2's alphabet: printable Latin-1 bytes are themselves, the others are characters from U+0100 on."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in printable]
    shifted = {chr(0x100 + rank): byte for rank, byte in enumerate(others)}
    return {chr(byte): byte for byte in printable} | shifted
