"""Why a response did not reuse what another one had read, in the words of OpenAI's prompt cache diagnostics."""

from __future__ import annotations

from typing import Any

CHANGES = (
    ("model_changed", "model"),
    ("prompt_cache_key_changed", "prompt_cache_key"),
    ("tools_changed", "tools"),
    ("text_format_changed", "text"),
)
"""Reasons, the strongest first, and the field of a response that tells of each."""


def diagnosed(response: dict[str, Any], other: dict[str, Any] | None) -> dict[str, Any]:
    """The diagnostics of a complete response; `other` is the one it is compared with, None where that is not kept."""
    if other is None or other["usage"] is None:
        return {"type": "comparison_response_not_found"}
    usage = response["usage"]
    cached, reusable = usage["input_tokens_details"]["cached_tokens"], other["usage"]["input_tokens"]
    # The last token of a prompt is read again whenever a reply is wanted.
    if cached >= min(reusable, usage["input_tokens"]) - 1:
        return {"type": "cache_hit"}
    reason = next((word for word, name in CHANGES if response[name] != other[name]), "input_changed")
    return {
        "type": "cache_miss",
        "reason": reason,
        "cache_missed_tokens": usage["input_tokens"] - cached,
        "comparison_reusable_tokens": reusable,
    }
