"""Words of a text, as far as topics need them: lower case, without the most frequent ones, without their endings."""

from __future__ import annotations

import re

_APOSTROPHE = "\u2019"
_WORD = re.compile(r"\w+(?:'\w+)?")
_STOP = """
a about after again all also always am an and any anything are as at away back be because been before being both but by can
can't come could did didn't do does doesn't doing don't done down each else even ever every everything few for from get
gets getting give go goes going gone gonna good got great had has have haven't having he he's her here hers him his hope how
i i'd i'll i'm i've if in into is isn't it it's its just know last let let's like little look lot lots made make makes many
maybe me mine more most much must my myself never new next no not nothing now of off oh ok okay on one only or other our
ours out over own please put quite really right said same say says see she she's should since so some something soon still
such sure take than thank thanks that that's the their theirs them then there there's these they they're thing things think
this those though thought through time to today too tomorrow totally two under until up upon us use used very want wanted
was wasn't way we we're we've well went were what what's when where which while who whom whose why will with won't wow would
yeah yes yesterday yet you you'd you'll you're you've your yours
"""
STOP = frozenset(_STOP.split())
_ENDINGS = ("ingly", "edly", "ings", "ing", "ies", "ied", "ely", "ers", "ed", "er", "es", "ly", "s")
SHORTEST_STEM = 3


def words(text: str) -> list[str]:
    """Every word of a text in lower case, in order."""
    return _WORD.findall(text.lower().replace(_APOSTROPHE, "'"))


def content_words(text: str) -> list[str]:
    """Words that say what a text is about, in order: neither stop words nor single letters."""
    return [w for w in words(text) if w not in STOP and (len(w) > 1 or w.isdigit() or not w.isascii())]


def stem(word: str) -> str:
    """The word without a possessive and one common English ending, where three letters are left: crude, and quick."""
    word = word.removesuffix("'s")
    if not word.isascii():
        return word
    for ending in _ENDINGS:
        left = word.removesuffix(ending)
        if left != word and len(left) >= SHORTEST_STEM:
            word = left + "y" if ending in ("ies", "ied") else left
            break
    return word.removesuffix("e") if len(word) > SHORTEST_STEM else word
