"""GGUF file to MLX model folder, done once. Weights stay packed as they are; names and row order change."""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import mlx.core as mx
from filelock import FileLock
from mlx_lm.models.rope_utils import Llama3RoPE

from agentmem.errors import ModelUnavailable
from agentmem.model.gguf import Header, read_header
from agentmem.model.progress import Progress
from agentmem.model.unsound import unsound
from agentmem.model.vocabulary import build_tokenizer, eos_ids, tokenizer_config

VERSION = 1
"""Part of the mark in a converted folder; a folder of another version is converted again."""
MARK = "agentmem.json"
BITS = {"Q4_0": 4, "Q4_1": 4, "Q8_0": 8}
GROUP = 32
NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
ARCHITECTURES = ("llama", "qwen2", "qwen3")
ROPE_FACTORS = "rope_freqs.weight"
LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


def converted(source: Path, sha256: str, target: Path, progress: Progress) -> Path:
    """`target`, an MLX folder with the content of the GGUF file `source`, made when it is not there yet.

    The folder appears whole or not at all. Raises ModelUnavailable for a file that cannot be converted.
    """
    if is_converted(target, sha256):
        return target
    target.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    with FileLock(target.parent / f".{target.name}.lock"):
        if is_converted(target, sha256):
            return target
        for left in target.parent.glob(f".{target.name}.new-*"):
            shutil.rmtree(left, ignore_errors=True)
        unfinished = Path(mkdtemp(prefix=f".{target.name}.new-", dir=target.parent))
        try:
            with unsound(f"{source.name} cannot be converted"):
                _write(source, sha256, unfinished, progress)
            if target.exists():
                shutil.rmtree(target)
            unfinished.rename(target)
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)
    return target


def is_converted(target: Path, sha256: str) -> bool:
    """True where `target` holds the conversion of the file with that hash."""
    try:
        mark = json.loads((target / MARK).read_text())
    except (OSError, ValueError):
        return False
    return mark == {"source_sha256": sha256, "version": VERSION}


def _write(source: Path, sha256: str, folder: Path, progress: Progress) -> None:
    header = read_header(source)
    progress("converting the vocabulary", None)
    config = model_config(header)
    build_tokenizer(header).save(str(folder / "tokenizer.json"))
    progress("converting the weights", None)
    tensors = mx.load(str(source), format="gguf")
    assert isinstance(tensors, dict)
    if ROPE_FACTORS in tensors:
        config["rope_scaling"] = _llama3_scaling(config, tensors.pop(ROPE_FACTORS))
    weights = mlx_weights(header, tensors)
    quantization = _quantization(header)
    if quantization:
        config["quantization"] = quantization
    mx.save_safetensors(str(folder / "model.safetensors"), weights, metadata={"format": "mlx"})
    for name, content in (
        ("tokenizer_config.json", tokenizer_config(header)),
        ("config.json", config),
        (MARK, {"source_sha256": sha256, "version": VERSION}),
    ):
        (folder / name).write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    for file in folder.iterdir():
        with file.open("rb") as handle:
            os.fsync(handle.fileno())


def model_config(header: Header) -> dict[str, Any]:
    """config.json for mlx-lm. Raises ModelUnavailable for what does not map cleanly."""
    kind = header.architecture
    if kind not in ARCHITECTURES:
        raise ModelUnavailable(
            f"GGUF files of architecture {kind!r} are not supported; only {', '.join(ARCHITECTURES)} are"
        )
    if header.get("expert_count"):
        raise ModelUnavailable("GGUF files of mixtures of experts are not supported")
    scaling = header.get("rope.scaling.type", "none")
    if scaling not in ("none", "linear"):
        raise ModelUnavailable(f"GGUF files with {scaling!r} RoPE scaling are not supported")
    heads = int(header.need("attention.head_count"))
    config = {
        "model_type": kind,
        "hidden_size": header.need("embedding_length"),
        "num_hidden_layers": header.need("block_count"),
        "intermediate_size": header.need("feed_forward_length"),
        "num_attention_heads": heads,
        "num_key_value_heads": header.get("attention.head_count_kv", heads),
        "head_dim": header.get("attention.key_length", header.need("embedding_length") // heads),
        "rms_norm_eps": header.need("attention.layer_norm_rms_epsilon"),
        "vocab_size": len(header.metadata["tokenizer.ggml.tokens"]),
        "max_position_embeddings": header.need("context_length"),
        "rope_theta": header.get("rope.freq_base", 10000.0),
        "tie_word_embeddings": "output.weight" not in header.tensors,
        "eos_token_id": eos_ids(header),
    }
    if header.get("rope.dimension_count", config["head_dim"]) != config["head_dim"]:
        raise ModelUnavailable("GGUF files whose RoPE covers a part of each head are not supported")
    if scaling == "linear":
        config["rope_scaling"] = {"type": "linear", "factor": header.need("rope.scaling.factor")}
    return config


def mlx_weights(header: Header, tensors: dict[str, mx.array]) -> dict[str, mx.array]:
    """The tensors under mlx-lm's names. Raises ModelUnavailable for a tensor that has no place there."""
    heads = int(header.need("attention.head_count"))
    kv_heads = int(header.get("attention.head_count_kv", heads))
    weights = {}
    for name, tensor in tensors.items():
        found = re.fullmatch(r"(?:blk\.(\d+)\.)?(\w+)\.(weight|bias|scales|biases)", name)
        if not found or found[2] not in NAMES:
            raise ModelUnavailable(f"{header.path.name} holds a tensor {name!r}, which is not supported")
        layer, part, suffix = found.groups()
        if header.architecture == "llama" and part in ("attn_q", "attn_k"):
            tensor = _half_rotated(tensor, heads if part == "attn_q" else kv_heads)
        if tensor.ndim == 1:
            tensor = _narrowed(tensor)
        prefix = f"model.layers.{layer}." if layer else ""
        weights[f"{prefix}{NAMES[part]}.{suffix}"] = tensor
    return weights


def _narrowed(vector: mx.array) -> mx.array:
    """The vector in float16 where that is exact: a float32 norm would widen every activation behind it."""
    narrow = vector.astype(mx.float16)
    return narrow if mx.array_equal(narrow.astype(mx.float32), vector.astype(mx.float32)) else vector


def _llama3_scaling(config: dict[str, Any], factors: mx.array) -> dict[str, Any]:
    """The RoPE scaling of Llama 3.1 and later, of which GGUF keeps only the factor of every frequency.

    Raises ModelUnavailable where the factors are not those of that scaling.
    """
    scaling = {"rope_type": "llama3", "factor": float(factors.max()), **LLAMA3}
    dims, base = config["head_dim"], config["rope_theta"]
    scaled = Llama3RoPE(dims, base=base, scaling_config=scaling)._freqs
    if not mx.allclose(scaled / base ** (mx.arange(0, dims, 2) / dims), factors, rtol=1e-3):
        raise ModelUnavailable("GGUF files with RoPE factors other than those of Llama 3.1 are not supported")
    return scaling


def _half_rotated(rows: mx.array, heads: int) -> mx.array:
    """Rows of a query or key projection, from RoPE pairs side by side to pairs half a head apart."""
    shape = rows.shape
    return rows.reshape(heads, shape[0] // heads // 2, 2, *shape[1:]).swapaxes(1, 2).reshape(shape)


def _quantization(header: Header) -> dict[str, Any] | None:
    bits = {BITS[kind] for kind in header.tensors.values() if kind in BITS}
    return {"group_size": GROUP, "bits": min(bits)} if bits else None
