"""A Hugging Face tokenizer rebuilt from the tokens that a GGUF file carries."""

from __future__ import annotations

from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

from agentmem.errors import ModelUnavailable
from agentmem.model.gguf import Header

NORMAL, UNKNOWN, CONTROL, USER_DEFINED = 1, 2, 3, 4
ENDS = (
    "<|im_end|>",
    "<|endoftext|>",
    "<|eot_id|>",
    "<|end_of_text|>",
    "<|eom_id|>",
    "<|end|>",
    "<end_of_turn>",
    "</s>",
)
"""Tokens that end a reply wherever a vocabulary has them as control tokens."""

_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|%s"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def _split(digits: str) -> Any:
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_WORDS % digits), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


def _pre_tokenizer(name: str) -> Any:
    """How text is cut into words before merging, by the name that llama.cpp gives to the kind."""
    if name == "smollm":
        return pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )
    if name == "gpt-2":
        return pre_tokenizers.ByteLevel(add_prefix_space=False)
    if name == "llama-bpe":
        return _split(r"\p{N}{1,3}")
    if name == "qwen2":
        return _split(r"\p{N}")
    raise ModelUnavailable(f"GGUF vocabularies cut into words the {name!r} way are not supported")


def build_tokenizer(header: Header) -> Tokenizer:
    """The tokenizer of the file; it adds nothing by itself. Raises ModelUnavailable for an unknown kind."""
    kind = header.metadata.get("tokenizer.ggml.model")
    if kind == "gpt2":
        tokenizer = _byte_level(header)
    elif kind == "llama":
        tokenizer = _sentencepiece(header)
    else:
        raise ModelUnavailable(f"GGUF vocabularies of kind {kind!r} are not supported (gpt2, llama are)")
    for text, control in _added(header):
        tokenizer.add_tokens([AddedToken(text, special=control, normalized=False)])
    return tokenizer


def _byte_level(header: Header) -> Tokenizer:
    pre = header.metadata.get("tokenizer.ggml.pre", "missing")
    merges = [tuple(pair.split(" ", 1)) for pair in header.metadata["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE(vocab=_vocab(header), merges=merges, ignore_merges=pre == "llama-bpe"))
    tokenizer.pre_tokenizer = _pre_tokenizer(pre)
    if pre == "qwen2":
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _sentencepiece(header: Header) -> Tokenizer:
    """SentencePiece's BPE merges the pair whose union scores best, so scores give the order of the merges."""
    vocab = _vocab(header)
    tokens = header.metadata["tokenizer.ggml.tokens"]
    unknown = tokens[header.metadata.get("tokenizer.ggml.unknown_token_id", 0)]
    merges = _merges(
        vocab, header.metadata["tokenizer.ggml.scores"], header.metadata["tokenizer.ggml.token_type"]
    )
    tokenizer = Tokenizer(
        models.BPE(vocab=vocab, merges=merges, unk_token=unknown, fuse_unk=True, byte_fallback=True)
    )
    prefix = header.metadata.get("tokenizer.ggml.add_space_prefix", True)
    spaces = [normalizers.Replace(" ", "▁")]
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), *spaces] if prefix else spaces)
    parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*parts, decoders.Strip(" ", 1, 0)] if prefix else parts)
    return tokenizer


def _merges(vocab: dict[str, int], scores: list[float], types: list[int]) -> list[tuple[str, str]]:
    ranked = []
    for piece, number in vocab.items():
        if types[number] != NORMAL:
            continue
        for cut in range(1, len(piece)):
            left, right = piece[:cut], piece[cut:]
            if left in vocab and right in vocab:
                ranked.append((-scores[number], vocab[left], vocab[right], left, right))
    return [(left, right) for *_, left, right in sorted(ranked)]


def _vocab(header: Header) -> dict[str, int]:
    tokens = header.metadata["tokenizer.ggml.tokens"]
    vocab = {token: number for number, token in enumerate(tokens)}
    if len(vocab) != len(tokens):
        raise ModelUnavailable(f"{header.path.name} gives the same token twice")
    return vocab


def _added(header: Header) -> list[tuple[str, bool]]:
    """Tokens that are found in text before anything else: (text, is a control token)."""
    tokens, types = header.metadata["tokenizer.ggml.tokens"], header.metadata["tokenizer.ggml.token_type"]
    return [
        (token, kind != USER_DEFINED)
        for token, kind in zip(tokens, types, strict=True)
        if kind in (UNKNOWN, CONTROL, USER_DEFINED)
    ]


def tokenizer_config(header: Header) -> dict[str, Any]:
    """The content of tokenizer_config.json: class, chat template, named special tokens."""
    metadata = header.metadata
    tokens = metadata["tokenizer.ggml.tokens"]
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "add_prefix_space": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": header.need("context_length"),
    }
    if "tokenizer.chat_template" in metadata:
        config["chat_template"] = metadata["tokenizer.chat_template"]
    for name, key in (
        ("bos_token", "bos"),
        ("eos_token", "eos"),
        ("pad_token", "padding"),
        ("unk_token", "unknown"),
    ):
        number = metadata.get(f"tokenizer.ggml.{key}_token_id")
        if number is not None and number < len(tokens):
            config[name] = tokens[number]
    return config


def eos_ids(header: Header) -> list[int]:
    """Ids that end a reply: the file's own, then the control tokens of `ENDS`."""
    tokens = header.metadata["tokenizer.ggml.tokens"]
    controls = {text for text, control in _added(header) if control}
    named = [header.metadata.get(f"tokenizer.ggml.{key}_token_id") for key in ("eos", "eot", "eom")]
    found = [number for number in named if number is not None]
    return list(dict.fromkeys([*found, *(tokens.index(text) for text in ENDS if text in controls)]))
