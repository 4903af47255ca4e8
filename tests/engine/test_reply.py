"""A reply as it grows: nothing of a stop string is ever shown, and the tokens that count are known."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from agentmem.engine.reply import Reply
from agentmem.engine.request import TokenLogprob


class Pieces:
    """A detokenizer whose token n is the n-th piece of text; `rest` comes at the end."""

    def __init__(self, pieces: list[str], rest: str = "") -> None:
        self._pieces, self._rest = pieces, rest

    def add(self, token: int) -> str:
        return self._pieces[token]

    def finish(self) -> str:
        return self._rest


def run(pieces: list[str], stop: list[str], rest: str = "") -> tuple[Reply, list[str]]:
    """Feed the pieces until the reply stops; returns it and what it showed, step by step."""
    reply, shown = Reply(Pieces(pieces, rest), stop), []
    for token in range(len(pieces)):
        shown.append(reply.add(token))
        if reply.stopped:
            break
    shown.append(reply.finish())
    return reply, shown


def test_text_without_stop_strings_is_shown_at_once() -> None:
    reply, shown = run(["He", "llo", "", " you"], [])
    assert shown == ["He", "llo", "", " you", ""]
    assert (reply.text, reply.stopped, reply.kept(), reply.kept_text()) == (
        "Hello you",
        False,
        4,
        "Hello you",
    )


def test_text_that_may_begin_a_stop_string_is_held_back() -> None:
    _, shown = run(["ab", "c", "x"], ["bcd"])
    assert shown == ["a", "", "bcx", ""]


def test_the_stop_string_and_what_follows_are_not_shown() -> None:
    reply, shown = run(["one\n", "Us", "er: two", "never"], ["\nUser:"])
    assert "".join(shown) == reply.text == "one"
    assert reply.stopped
    assert reply.tokens == [0, 1, 2]
    assert reply.kept() == 0
    assert reply.kept_text() == ""


def test_only_tokens_wholly_in_the_shown_text_are_kept() -> None:
    reply, _ = run(["one ", "two", " thr", "ee STOP x"], ["STOP"])
    assert reply.text == "one two three "
    assert reply.kept() == 3
    assert reply.kept_text() == "one two thr"


def test_a_stop_string_that_ends_a_token_boundary_keeps_all_before_it() -> None:
    reply, _ = run(["one ", "two ", "STOP"], ["STOP"])
    assert (reply.kept(), reply.kept_text(), reply.text) == (2, "one two ", "one two ")


def test_the_earliest_of_several_stop_strings_wins() -> None:
    reply, _ = run(["a XX b YY"], ["YY", "XX", ""])
    assert reply.text == "a "


def test_held_back_text_is_shown_when_the_reply_ends() -> None:
    reply, shown = run(["ab", "bc"], ["bcd"])
    assert shown == ["a", "b", "bc"]
    assert reply.text == "abbc"


def test_the_detokenizers_rest_counts_too() -> None:
    assert run(["ab"], [], rest="é")[0].text == "abé"
    reply, shown = run(["ab", "c"], ["cé"], rest="éd")
    assert (reply.text, reply.stopped) == ("ab", True)
    assert "".join(shown) == "ab"
    assert reply.kept() == 1


def test_tokens_without_text_are_kept() -> None:
    reply, _ = run(["", "a", "", "STOP"], ["STOP"])
    assert reply.kept() == 3
    assert reply.kept_text() == "a"


@given(
    pieces=st.lists(st.text("abX", max_size=4), max_size=12),
    stop=st.lists(st.text("abX", min_size=1, max_size=4), max_size=3),
    rest=st.text("abX", max_size=2),
)
@settings(max_examples=400, deadline=None)
def test_what_is_shown_is_the_text_before_the_first_stop(
    pieces: list[str], stop: list[str], rest: str
) -> None:
    reply, shown = run(pieces, stop, rest)
    whole = "".join(pieces) + rest
    ends = [i for i in range(len(whole) + 1) if any(whole[:i].endswith(s) for s in stop)]
    seen = "".join(shown)
    assert seen == reply.text
    assert whole.startswith(seen)
    assert reply.stopped == bool(ends)
    assert not any(s in seen for s in stop)
    if not ends:
        assert seen == whole
    if reply.stopped:
        assert any(whole[len(seen) :].startswith(s) for s in stop)
    kept = "".join(pieces[t] for t in reply.tokens[: reply.kept()])
    if reply.kept() < len(reply.tokens):
        assert reply.kept_text() == kept
    else:
        assert reply.kept_text() == seen
    assert seen.startswith(kept)
    for n in range(len(shown) + 1):
        assert whole.startswith("".join(shown[:n]))


def logprob(token: int) -> TokenLogprob:
    return TokenLogprob(token, b"", -float(token))


def releases(pieces: list[str], stop: list[str], rest: str = "") -> list[tuple[str, list[int]]]:
    """Text and tokens with log probabilities, step by step."""
    reply, out = Reply(Pieces(pieces, rest), stop), []
    for token in range(len(pieces)):
        text = reply.add(token, logprob(token))
        out.append((text, [one.token for one in reply.release()]))
        if reply.stopped:
            break
    text = reply.finish()
    out.append((text, [one.token for one in reply.release()]))
    assert [one.token for one in reply.released()] == [t for _, tokens in out for t in tokens]
    assert reply.release() == ()
    return out


def test_log_probabilities_come_with_the_text_of_their_token() -> None:
    assert releases(["a", "b"], []) == [("a", [0]), ("b", [1]), ("", [])]


def test_log_probabilities_wait_with_text_that_is_held_back() -> None:
    assert releases(["ab", "c", "x"], ["bcd"]) == [("a", []), ("", []), ("bcx", [0, 1, 2]), ("", [])]
    assert releases(["ab", "bc"], ["bcd"]) == [("a", []), ("b", [0]), ("bc", [1])]


def test_parts_of_a_character_come_out_with_it() -> None:
    assert releases(["a", "", "", "é"], []) == [("a", [0]), ("", []), ("", []), ("é", [1, 2, 3]), ("", [])]
    assert releases(["a", "", ""], [], rest="\ufffd") == [("a", [0]), ("", []), ("", []), ("\ufffd", [1, 2])]
    assert releases(["", "a"], []) == [("", []), ("a", [0, 1]), ("", [])]
    assert releases(["a", ""], []) == [("a", [0]), ("", []), ("", [1])]


def test_tokens_of_the_stop_string_have_no_log_probabilities() -> None:
    assert releases(["one", "\nUs", "er: two", "never"], ["\nUser:"]) == [
        ("one", [0]),
        ("", []),
        ("", []),
        ("", []),
    ]
    assert releases(["one S", "TOP two"], ["STOP"]) == [("one ", []), ("", []), ("", [0])]
    assert releases(["one STOP"], ["one"]) == [("", []), ("", [])]


def test_a_reply_without_log_probabilities_releases_none() -> None:
    reply = Reply(Pieces(["a", "b"]), [])
    reply.add(0)
    assert reply.release() == reply.released() == ()


@given(
    pieces=st.lists(st.text("abX", max_size=4), max_size=12),
    stop=st.lists(st.text("abX", min_size=1, max_size=4), max_size=3),
    rest=st.text("abX", max_size=2),
)
@settings(max_examples=100, deadline=None)
def test_log_probabilities_cover_exactly_the_shown_text(
    pieces: list[str], stop: list[str], rest: str
) -> None:
    out = releases(pieces, stop, rest)
    whole = "".join(pieces) + rest
    shown, tokens = "", list[int]()
    for text, new in out[:-1]:
        shown += text
        tokens += new
        assert shown.startswith("".join(pieces[: len(tokens)])), "none is ahead of its text"
    shown += out[-1][0]
    tokens += out[-1][1]
    assert tokens == list(range(len(tokens)))
    if not any(s in whole for s in stop):
        assert len(tokens) == len(pieces)
        return
    assert len("".join(pieces[: len(tokens)]) + rest) >= len(shown), "none is missing"
    assert shown.startswith("".join(pieces[: max(0, len(tokens) - 1)])), (
        "only the last one reaches into the stop"
    )
