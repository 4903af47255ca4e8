"""`explain`: why the last turn was remembered as far as it was."""

from __future__ import annotations

from typing import Any

import click

from agentmem.cli.output import format_count, format_ms, json_option, print_facts, print_json
from agentmem.client import AgentMemClient

REASONS = {
    "new_session": "the session was new",
    "extended": "it goes on from all that was remembered",
    "input_changed": "the messages differ from those of the session",
    "system_changed": "the system prompt differs from that of the session",
    "tools_changed": "the tools differ from those of the turn before",
    "quarantined": "its state was damaged and is put aside; its tokens were read again",
    "evicted": "its state had left the disk, to make room or by prune; its tokens were read again",
    "expired": "its state had left the disk after the time it was to be kept for; its tokens were read again",
    "model_changed": "its state is that of another model",
    "composed": "an earlier turn was composed; such state is not kept, so its tokens were read or composed again",
    "compressed": "an earlier turn saw a shortened past; such state is not exact, so its tokens were read again",
    "off": "nothing that is remembered was to be used",
    "no_checkpoint": "its layers carry state along, and no checkpoint of that was left this far",
    "fingerprint_changed": "its state is that of another tokenizer, template, KV format or page size",
}


@click.command()
@click.argument("agent")
@click.option("--session", help="Session of the agent. Default: the one used last.")
@json_option
def explain(agent: str, session: str | None, as_json: bool) -> None:
    """Say why an agent's last turn was, or was not, taken from memory, and what it cost."""
    with AgentMemClient() as client:
        told = client.explain(agent, session)
    if as_json:
        print_json(told)
        return
    print_facts(
        [
            ("agent", f"{told['agent']}, turn {told['turn']}"),
            ("named by", told["identity_source"] or "nobody"),
            ("reason", f"{told['reason']}: {REASONS[told['reason']]}"),
            ("session before", f"{format_count(told['session_tokens_before'])} tokens, "
                               f"{format_count(told['kept_tokens'])} of them kept"),
            ("state before", told["state_before"]),
            ("prompt", f"{format_count(told['prompt_tokens'])} tokens: {format_count(told['exact_tokens'])} remembered, "
                       f"{_some(told, 'composed')}{_some(told, 'compressed')}{format_count(told['prefilled_tokens'])} read"),
            *(("composed" if told.get("composed_tokens") else "reuse", line) for line in told.get("composition", ())),
            *(("memory", line) for line in told.get("memory", ())),
            *_place(told.get("diverged")),
            ("cost", f"{format_ms(told['restore_ms'])} restored, {format_ms(told['prefill_ms'])} read"),
            *_lost(told),
        ]
    )  # fmt: skip


def _place(diverged: dict[str, Any] | None) -> list[tuple[str, str]]:
    """Where the messages left those of the session."""
    if diverged is None:
        return []
    where = f"message {diverged['message'] + 1} ({diverged['role']}), line {diverged['line']}"
    return [("diverged", where), ("  before", repr(diverged["before"])), ("  now", repr(diverged["after"]))]


def _lost(told: dict[str, Any]) -> list[tuple[str, str]]:
    lost = told.get("lost_tokens")
    return (
        [("lost", f"{format_count(lost)} tokens, about {format_ms(told['lost_ms'])} to read")] if lost else []
    )


def _some(told: dict[str, Any], kind: str) -> str:
    count = told.get(f"{kind}_tokens")
    return f"{format_count(count)} {kind}, " if count else ""
