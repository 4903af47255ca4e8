"""A GGUF writer: enough of the format to make whole tiny models, in every packing that the reader accepts."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten

from agentmem.model.convert import NAMES
from agentmem.model.loaded import LoadedModel
from agentmem.model.random import BYTES, END, START

ALIGNMENT = 32
CODES = {"F32": 0, "F16": 1, "Q4_0": 2, "Q4_1": 3, "Q5_0": 6, "Q8_0": 8, "Q4_K": 12, "BF16": 30}
Packed = tuple[str, tuple[int, ...], bytes]


def write_gguf(path: Path, metadata: dict[str, Any], tensors: dict[str, Packed]) -> Path:
    """Write version 3 of the format. A tensor is (type, shape with rows first, bytes)."""
    out = [b"GGUF", struct.pack("<IQQ", 3, len(tensors), len(metadata))]
    for key, value in metadata.items():
        out += [_string(key), _value(value)]
    offset = 0
    for name, (kind, shape, data) in tensors.items():
        out += [_string(name), struct.pack("<I", len(shape))]
        out += [struct.pack("<Q", size) for size in reversed(shape)]
        out.append(struct.pack("<IQ", CODES[kind], offset))
        offset += len(data) + -len(data) % ALIGNMENT
    header = b"".join(out)
    body = b"".join(data + bytes(-len(data) % ALIGNMENT) for _, _, data in tensors.values())
    path.write_bytes(header + bytes(-len(header) % ALIGNMENT) + body)
    return path


def _string(text: str) -> bytes:
    data = text.encode()
    return struct.pack("<Q", len(data)) + data


def _value(value: Any) -> bytes:
    if isinstance(value, bool):
        return struct.pack("<I?", 7, value)
    if isinstance(value, int):
        return struct.pack("<II", 4, value)
    if isinstance(value, float):
        return struct.pack("<If", 6, value)
    if isinstance(value, str):
        return struct.pack("<I", 8) + _string(value)
    if not value or isinstance(value[0], str):
        return struct.pack("<IIQ", 9, 8, len(value)) + b"".join(map(_string, value))
    if isinstance(value[0], float):
        return struct.pack("<IIQ", 9, 6, len(value)) + struct.pack(f"<{len(value)}f", *value)
    return struct.pack("<IIQ", 9, 5, len(value)) + struct.pack(f"<{len(value)}i", *value)


def pack(kind: str, weights: np.ndarray) -> tuple[Packed, np.ndarray]:
    """The weights in a GGUF packing, and the float32 numbers that the packed bytes stand for."""
    if kind == "F32":
        return (kind, weights.shape, weights.astype("<f4").tobytes()), weights.astype(np.float32)
    if kind == "F16":
        half = weights.astype("<f2")
        return (kind, weights.shape, half.tobytes()), half.astype(np.float32)
    if kind == "BF16":
        raw = (weights.astype("<f4").view("<u4") >> 16).astype("<u2")
        return (kind, weights.shape, raw.tobytes()), (raw.astype("<u4") << 16).view("<f4")
    blocks = weights.astype(np.float32).reshape(-1, 32)
    data, meaning = {"Q8_0": _q8_0, "Q4_0": _q4_0, "Q4_1": _q4_1}[kind](blocks)
    return (kind, weights.shape, data), meaning.reshape(weights.shape)


def _q8_0(blocks: np.ndarray) -> tuple[bytes, np.ndarray]:
    scale = (np.abs(blocks).max(-1, keepdims=True) / 127).astype("<f2")
    codes = np.clip(np.round(blocks * _inverse(scale)), -127, 127).astype(np.int8)
    return np.concatenate([scale.view(np.uint8), codes.view(np.uint8)], -1).tobytes(), codes * scale.astype(
        np.float32
    )


def _q4_0(blocks: np.ndarray) -> tuple[bytes, np.ndarray]:
    scale = (np.abs(blocks).max(-1, keepdims=True) / 7).astype("<f2")
    codes = np.clip(np.round(blocks * _inverse(scale)) + 8, 0, 15).astype(np.uint8)
    data = np.concatenate([scale.view(np.uint8), _nibbles(codes)], -1).tobytes()
    return data, (codes.astype(np.float32) - 8) * scale.astype(np.float32)


def _q4_1(blocks: np.ndarray) -> tuple[bytes, np.ndarray]:
    low = blocks.min(-1, keepdims=True).astype("<f2")
    scale = ((blocks.max(-1, keepdims=True) - low.astype(np.float32)) / 15).astype("<f2")
    codes = np.clip(np.round((blocks - low.astype(np.float32)) * _inverse(scale)), 0, 15).astype(np.uint8)
    data = np.concatenate([scale.view(np.uint8), low.view(np.uint8), _nibbles(codes)], -1).tobytes()
    return data, codes * scale.astype(np.float32) + low.astype(np.float32)


def _inverse(scale: np.ndarray) -> np.ndarray:
    return np.divide(1, scale, out=np.zeros(scale.shape, np.float32), where=scale != 0)


def _nibbles(codes: np.ndarray) -> np.ndarray:
    return codes[:, :16] | codes[:, 16:] << 4


def byte_vocabulary(template: str) -> dict[str, Any]:
    """Metadata of a vocabulary of bytes and two special tokens, as in `agentmem.model.random`."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(BYTES) if byte not in printable]
    chars = {byte: chr(byte) for byte in printable} | {byte: chr(0x100 + n) for n, byte in enumerate(others)}
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": [*(chars[byte] for byte in range(BYTES)), START, END],
        "tokenizer.ggml.token_type": [1] * BYTES + [3, 3],
        "tokenizer.ggml.merges": [],
        "tokenizer.ggml.eos_token_id": BYTES + 1,
        "tokenizer.chat_template": template,
    }


def write_model(
    path: Path,
    made: LoadedModel,
    *,
    kind: str = "F32",
    extra_tensors: dict[str, Packed] | None = None,
    dropped: str | None = None,
    **changes: Any,
) -> tuple[Path, dict[str, mx.array]]:
    """A random model as a GGUF file with llama.cpp's names and row order, and the weights that it stands for.

    `changes` overwrite metadata; a key "general__name" stands for "general.name". `dropped` is left out.
    """
    args = made.model.args
    family = args.model_type
    metadata = {
        "general.architecture": family,
        f"{family}.context_length": made.max_context,
        f"{family}.embedding_length": args.hidden_size,
        f"{family}.block_count": args.num_hidden_layers,
        f"{family}.feed_forward_length": args.intermediate_size,
        f"{family}.attention.head_count": args.num_attention_heads,
        f"{family}.attention.head_count_kv": args.num_key_value_heads,
        f"{family}.attention.layer_norm_rms_epsilon": args.rms_norm_eps,
        f"{family}.rope.freq_base": args.rope_theta,
        **byte_vocabulary(made.tokenizer.chat_template),
    }
    if getattr(args, "head_dim", None):
        metadata[f"{family}.attention.key_length"] = args.head_dim
    metadata |= {key.replace("__", "."): value for key, value in changes.items()}
    metadata.pop(dropped or "", None)
    theirs = {ours: name for name, ours in NAMES.items()}
    tensors, meaning = {}, {}
    named: list[Any] = list(tree_flatten(made.model.parameters()))
    for name, weight in named:
        module, suffix = name.rsplit(".", 1)
        prefix, layer = "", module.split(".")
        if layer[:2] == ["model", "layers"]:
            prefix, module = f"blk.{layer[2]}.", ".".join(layer[3:])
        packed, stands_for = pack(kind if weight.ndim == 2 else "F32", np.array(weight))
        meaning[name] = mx.array(stands_for)
        if family == "llama" and module in ("self_attn.q_proj", "self_attn.k_proj"):
            heads = args.num_attention_heads if "q_proj" in module else args.num_key_value_heads
            packed, _ = pack(kind if weight.ndim == 2 else "F32", _interleaved(np.array(weight), heads))
        tensors[f"{prefix}{theirs[module]}.{suffix}"] = packed
    return write_gguf(path, metadata, tensors | (extra_tensors or {})), meaning


def _interleaved(rows: np.ndarray, heads: int) -> np.ndarray:
    """llama.cpp's order: the two rows that RoPE turns together lie side by side."""
    halves = rows.reshape(heads, 2, rows.shape[0] // heads // 2, *rows.shape[1:])
    return halves.swapaxes(1, 2).reshape(rows.shape)
