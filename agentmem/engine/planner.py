"""The exact planner: which remembered prefix a request starts from, and what its turn adds to the session."""

from __future__ import annotations

import json
import random
import time
from typing import Any

import xxhash

from agentmem.blockpool.index import TurnRow
from agentmem.blockpool.pool import Pool
from agentmem.compose.reuse import Reuse
from agentmem.engine.admission import Admission
from agentmem.engine.checkpoints import Checkpoints, stops
from agentmem.engine.conversation import Alignment, Conversation
from agentmem.engine.episodes import Episodes
from agentmem.engine.memory import Agent, Memory, Session
from agentmem.engine.past import NOTHING, Past
from agentmem.engine.reply import Reply
from agentmem.engine.request import Started
from agentmem.engine.sampler import Sampler
from agentmem.engine.sequence import Sequence
from agentmem.episode.policy import Episodic, Full, Window, most_rows, stretch
from agentmem.errors import BadRequest, ContextOverflow
from agentmem.model.chat import ChatTokenizer


class Planner:
    """Plans one request at a time. Engine thread only."""

    def __init__(
        self, memory: Memory, pool: Pool, tokenizer: ChatTokenizer, admission: Admission, episodes: Episodes, *,
        max_context: int, max_reply: int, model: str = "", plain: bool = True, checkpoints: Checkpoints | None = None,
        part: int = 2048,
    ) -> None:  # fmt: skip
        """`plain`: all layers are plain attention; only then can the past be shortened, or state be moved. `part`: tokens after
        which what is read for a job is committed."""
        self._model, self._plain, self._checkpoints = model, plain, checkpoints
        self._episodes = episodes
        self._memory = memory
        self._pool = pool
        self._tokenizer = tokenizer
        self._admission = admission
        self._max_context = max_context
        self._max_reply = max_reply
        self._part = part

    def admit(self, sequence: Sequence, active: list[Sequence]) -> bool:
        """Plan `sequence` when its slots and its memory fit beside those of `active`. Precondition: its session is not busy.

        Raises BadRequest or ContextOverflow for what can never run.
        """
        request = sequence.request
        agent, session = self._memory.open(
            request.namespace, request.agent, request.session, request.persist, request.parents
        )
        if sequence.session is not session:
            sequence.agent, sequence.session = agent, session
            self._render(sequence)
        whole = isinstance(self._policy(agent), Full) and not sequence.background
        past = None if whole else self._past(sequence)
        if past is not None and not (past.ready and self._has_room(sequence, past)):
            return False
        need = sequence.worst_slots(self._pool.geometry)
        taken = sum(s.worst_slots(self._pool.geometry) for s in active)
        if taken and need + taken > self._pool.slots.count:
            return False
        totals = [total for s in active for total in s.totals]
        composing = sum(s.composing for s in (sequence, *active))
        if totals and not self._admission.fits([*sequence.totals, *totals], composing):
            return False
        session.busy = True
        sequence.planned = time.perf_counter()
        self._start_from(sequence, past or self._past(sequence))
        return True

    def _has_room(self, sequence: Sequence, past: Past) -> bool:
        """Whether a prompt that is read in stretches may go on: what is not on disk yet cannot leave RAM."""
        end = self._end(sequence, past.match.tokens)
        return end == len(sequence.ids) or not self._memory.unwritten

    def _past(self, sequence: Sequence) -> Past:
        """The remembered prefix, or what stands for one."""
        assert sequence.agent is not None
        assert sequence.session is not None
        if sequence.reuse == "off":
            return NOTHING
        agent, session = sequence.agent, sequence.session
        if self._checkpoints is not None:
            most = len(sequence.ids) - int(sequence.generate)
            match, checkpoint, remembered = self._checkpoints.match(agent, session, sequence.ids, most)
            page = self._pool.geometry.page_tokens
            sequence.stops = stops(page, match.tokens, remembered, len(sequence.ids))
            return Past(match, checkpoint=checkpoint, remembered=remembered)
        if not self._plain:
            return Past(self._memory.match(agent, session, sequence.ids))
        return self._episodes.past(sequence, lambda: self._memory.match(agent, session, sequence.ids))

    def _render(self, sequence: Sequence) -> None:
        """Messages -> canonical token ids of the prompt; checks that prompt and reply fit."""
        request, session = sequence.request, sequence.session
        assert session is not None
        old = session.conversation.messages if request.history == "server" else []
        sequence.messages = [*old, *request.messages]
        sequence.reuse = self._reuse(sequence)
        alignment = sequence.alignment = self._aligned(sequence, session.conversation)
        sequence.ids = session.conversation.ids[: alignment.keep] + alignment.ids
        if not sequence.ids:
            raise BadRequest("the messages hold no text", param="messages")
        assert sequence.agent is not None
        sequence.most = most_rows(self._policy(sequence.agent), self._pool.geometry.page_tokens)
        self._fit(sequence)
        if any(not 0 <= token < self._tokenizer.vocab_size for token in request.sampling.logit_bias):
            raise BadRequest(
                f"logit_bias names token ids from 0 to {self._tokenizer.vocab_size - 1}", param="logit_bias"
            )
        if sequence.generate:
            sequence.reply = Reply(self._tokenizer.detokenizer(), request.stop)
            sequence.sampler = Sampler(
                request.sampling, random.SystemRandom().getrandbits(62), sequence.ids, request.constraint
            )

    def _aligned(self, sequence: Sequence, conversation: Conversation) -> Alignment:
        """The prompt over what the session holds. Replies that called tools stand as they were said, if a template can."""
        request, prompt = sequence.request, sequence.request.prompt
        if isinstance(prompt, str):
            return conversation.align(prompt)
        if prompt is not None:
            if any(not 0 <= token < self._tokenizer.vocab_size for token in prompt):
                raise BadRequest(f"token ids are from 0 to {self._tokenizer.vocab_size - 1}", param="prompt")
            return conversation.align_ids(prompt)
        sent, tools = sequence.messages, request.tools
        said = self._tokenizer.tools.as_said(sent, conversation.messages, tools) if tools else sent
        for messages in (said, sent):
            try:
                text = self._tokenizer.render(messages, tools=tools, generation=sequence.generate)
            except BadRequest:
                if messages is sent:
                    raise
                continue
            sequence.messages = messages
            break
        return conversation.align(text)

    def _policy(self, agent: Agent) -> Full | Episodic | Window:
        """How much of its past an agent keeps at hand: all of it, where the model's layers allow nothing else."""
        return agent.memory if self._plain else Full()

    def _reuse(self, sequence: Sequence) -> Reuse:
        """As the request says, or else the agent. What an agent says that is encrypted or off the disk stays apart."""
        agent = sequence.agent
        assert agent is not None
        wanted = sequence.request.reuse or agent.reuse
        if wanted not in ("composed", "auto"):
            return wanted
        if not (agent.persist and agent.encrypted == "off"):
            sequence.notes = ("not composed: the agent is encrypted, or kept off the disk",)
            return "exact"
        if not self._plain:
            sequence.notes = ("not composed: the layers of this model are not all plain attention",)
            return "exact"
        if not isinstance(agent.memory, Full):
            sequence.notes = ("not composed: the agent's memory is not kept whole",)
            return "exact"
        return wanted

    def _fit(self, sequence: Sequence) -> None:
        prompt, asked = len(sequence.ids), sequence.request.max_tokens
        room = self._max_context - prompt
        wanted = (
            (asked if asked is not None else min(self._max_reply, max(room, 1))) if sequence.generate else 0
        )
        if wanted > room:
            raise ContextOverflow(
                f"the prompt has {prompt} tokens and the reply may have {wanted}; the context holds {self._max_context}. "
                "Shorten the conversation or lower max_tokens.",
                param="messages" if prompt > self._max_context else "max_tokens",
            )
        sequence.max_tokens = wanted
        need = sequence.worst_slots(self._pool.geometry)
        if need > self._pool.slots.count:
            raise ContextOverflow(
                f"{prompt} + {wanted} tokens need {need * self._pool.geometry.slot_bytes} bytes of KV state; ram_budget holds "
                f"{self._pool.capacity_bytes}. Raise ram_budget or lower max_tokens{' or n' if sequence.request.n > 1 else ''}.",
                param="max_tokens",
            )

        self._admission.check(sequence.totals)
        if sequence.may_compose and not self._admission.fits(sequence.totals, sequence.composing):
            sequence.reuse, sequence.notes = (
                "exact",
                ("not composed: memory_limit has no room for its state",),
            )

    def stretch(self, sequence: Sequence) -> Sequence | None:
        """The beginning of an admitted prompt that is too long to be read before the past is cut down; None for most."""
        end = self._end(sequence, sequence.reused)
        if end >= len(sequence.ids) or sequence.reuse == "off":
            return None
        return sequence.stretch(self._cut_short(sequence, end), end)

    def _end(self, sequence: Sequence, known: int) -> int:
        """Tokens of a prompt up to which it is read at once, `known` of them remembered. For a job that is a checkpoint, too."""
        assert sequence.agent is not None
        end = stretch(self._policy(sequence.agent), known, len(sequence.ids))
        return min(end, (known // self._part + 1) * self._part) if sequence.background else end

    def need(self, sequence: Sequence) -> int:
        """Slots that a request can take at most; of one that is not rendered yet, with a letter a token."""
        request = sequence.request
        if sequence.ids:
            return sequence.worst_slots(self._pool.geometry)
        agent = self._memory.agent(request.namespace, request.agent)
        session = agent.sessions.get(request.session) if agent is not None else None
        known = session.conversation.length if session is not None else 0
        letters = sum(len(str(m.get("content") or "")) for m in request.messages)
        reply = request.max_tokens if request.max_tokens is not None else self._max_reply
        return self._pool.geometry.worst_slots(min(self._max_context, known + letters + reply))

    def room(self, active: list[Sequence]) -> int:
        """Slots that none of `active` can need."""
        return self._pool.slots.count - sum(s.worst_slots(self._pool.geometry) for s in active)

    def replan(self, sequence: Sequence) -> None:
        """Choose the remembered prefix again: some of it turned out damaged."""
        self._start_from(sequence, self._past(sequence))

    def _start_from(self, sequence: Sequence, past: Past) -> None:
        """The pages of the past stay pinned until the table holds them. At least one token is left to feed."""
        match = past.match
        reuse = min(match.tokens, len(sequence.ids) - int(sequence.generate))
        sequence.past, sequence.match, sequence.reused = past, match, reuse
        own = 0 if past.shown is not None else sum(p.rows for p in match.pages if not p.veiled)
        sequence.compressed = max(0, reuse - own)
        self._episodes.began(sequence, past)
        in_ram = all(p.slots is not None for p in match.pages)
        sequence.state_before = (
            "cold" if not reuse else "hot" if in_ram and not sequence.prefetched else "warm"
        )
        self._pool.pin(match.pages)
        sequence.pinned = list(match.pages)

    def unpin(self, sequence: Sequence) -> None:
        """The table holds the pages now, or they turned out damaged."""
        self._pool.unpin(sequence.pinned)
        sequence.pinned = []

    def drop(self, sequence: Sequence) -> None:
        """A request ended without a turn."""
        self.unpin(sequence)
        if sequence.session is not None and sequence.agent is not None:
            if sequence.match is not None:
                sequence.session.busy = False
            self._memory.close_unused(sequence.agent, sequence.session)

    @staticmethod
    def announce(sequence: Sequence) -> None:
        """Tell the client, once, how much of the prompt is remembered, and how much composed."""
        if sequence.announced:
            return
        sequence.announced = True
        r = sequence.request
        prompt, reused, composed = len(sequence.ids), sequence.exact, sequence.composed
        sequence.sink(Started(r.agent, r.session, prompt, reused, sequence.state_before, composed))

    def record(self, sequence: Sequence, fed: int) -> TurnRow:
        """Add the turn to the session's conversation; returns its log entry. A cancelled prefill keeps the `fed` tokens."""
        session, alignment = sequence.session, sequence.alignment
        assert session is not None
        assert sequence.agent is not None
        assert alignment is not None
        messages, cut = sequence.messages, fed < len(sequence.ids)
        if sequence.background and cut:  # it gave way: its figures are of what it read
            sequence.ids, sequence.before, sequence.part = sequence.ids[:fed], None, True
        before = len(session.conversation.ids)
        spans = sequence.spans(self._tokenizer.special)
        if cut:
            alignment, spans, messages = self._cut_short(sequence, fed), [], session.conversation.messages
        elif sequence.generate:
            assert sequence.reply is not None
            messages = [*messages, {"role": "assistant", "content": sequence.reply.text}]
        known = session.conversation.messages
        turn = session.conversation.record(alignment, spans, messages)
        turn.stats = self._stats(sequence, before)
        if turn.stats["reason"] == "input_changed":
            turn.stats["reason"] = self._change(sequence, known, turn)
        if not sequence.part:
            self._count(sequence, sequence.agent.row.totals)
        if sequence.request.keep_s:
            until = max(sequence.agent.keep_until, time.time() + sequence.request.keep_s)
            sequence.agent.row.policy = {**sequence.agent.row.policy, "keep_until": until}
        return turn

    def _cut_short(self, sequence: Sequence, fed: int) -> Alignment:
        assert sequence.alignment is not None
        keep = min(sequence.alignment.keep, fed)
        ids = sequence.ids[keep:fed]
        return Alignment(keep, self._tokenizer.decode(ids), ids)

    def _foreign(self, session: Session) -> str:
        """Why the state of a session is not this daemon's."""
        models = [t.stats["model"] for t in session.row.turns if "model" in t.stats]
        return "model_changed" if models and models[-1] != self._model else "fingerprint_changed"

    def _reason(self, sequence: Sequence, before: int, kept: int) -> str:
        """Why as much was reused as was, in a word; the session had `before` tokens, and `kept` of them.

        `new_session`: nothing was remembered. `extended`: all of it goes on. `input_changed`: the messages are not those of the
        session. The others say why there was no state of tokens that stayed the same: `quarantined` (damaged), `evicted` (it had
        left the disk), `expired` (the same, after the time it was to be kept for), `composed` or `compressed` (an earlier turn
        was, and such state counts for nothing else), `off` (none was to be used), `model_changed` (it is another model's),
        `fingerprint_changed` (it is that of another tokenizer, template, format or page size), `no_checkpoint` (rows are there,
        and not what the layers without rows carry along).
        """
        session, reused = sequence.session, (sequence.before or sequence).reused
        assert session is not None
        if not before:
            whole = [t for t in session.row.turns if not t.stats.get("part")]
            return self._foreign(session) if whole else "new_session"
        # The last token of a reply was sampled, not fed: it never has state.
        if sequence.lost or reused + 1 < kept:
            if sequence.lost or session.damaged:
                return "quarantined"
            if session.row.foreign:
                return self._foreign(session)
            if sequence.reuse == "off":
                return "off"
            for word in ("composed", "compressed"):
                if any(t.stats.get(f"{word}_tokens") for t in session.row.turns):
                    return word
            if self._checkpoints is not None and sequence.past.remembered + 1 >= kept:
                return "no_checkpoint" if kept >= before else "input_changed"
            assert sequence.agent is not None
            return "expired" if 0 < sequence.agent.keep_until < time.time() else "evicted"
        return "extended" if kept >= before else "input_changed"

    @staticmethod
    def _change(sequence: Sequence, known: list[dict[str, Any]], turn: TurnRow) -> str:
        """What of the input changed, in a word: `tools_changed`, `system_changed`, or another message: `input_changed`."""
        assert sequence.session is not None
        past = [t.stats["tools"] for t in sequence.session.row.turns if "tools" in t.stats]
        if past and past[-1] != turn.stats["tools"]:
            return "tools_changed"
        at = turn.keep_messages
        pair = [*known[at : at + 1], *turn.messages[:1]]
        return "system_changed" if any(m["role"] == "system" for m in pair) else "input_changed"

    def _stats(self, sequence: Sequence, before: int) -> dict[str, Any]:
        """What `explain` tells of this turn."""
        assert sequence.alignment is not None
        assert sequence.session is not None
        known = sequence.before
        before, kept = (known.held, known.kept) if known is not None else (before, sequence.alignment.keep)
        reason = self._reason(sequence, before, kept)
        sequence.session.damaged = sequence.session.row.foreign = False
        usage = sequence.usage(0, False)
        return {
            "reason": reason,
            "session_tokens_before": before,
            "kept_tokens": kept,
            "identity_source": sequence.request.identity_source,
            "finish": sequence.finish,
            "model": self._model,
            "tools": xxhash.xxh3_64_hexdigest(json.dumps(sequence.request.tools or []).encode()),
            "reuse": sequence.reuse,
            **({"planner": sequence.course.planner} if sequence.course is not None else {}),
            **({"composition": list(sequence.notes)} if sequence.notes else {}),
            **({"memory": list(sequence.past.notes)} if sequence.past.notes else {}),
            **({"part": True} if sequence.part else {}),
            **({"job": sequence.request.job} if sequence.background else {}),
            "prompt_tokens": len(sequence.ids),
            "completion_tokens": usage["completion_tokens"],
            **{
                k: v
                for k, v in usage["agentmem"].items()
                if k not in ("agent", "session", "bytes_written", "committed")
            },
        }

    @staticmethod
    def _count(sequence: Sequence, totals: dict[str, Any]) -> None:
        for name, value in (
            ("turns", 1),
            ("prompt_tokens", len(sequence.ids)),
            ("cached_tokens", sequence.reused),
        ):
            totals[name] = totals.get(name, 0) + value
