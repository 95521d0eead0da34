"""Texts compared: what counts as the same answer."""

from __future__ import annotations

import re
import unicodedata

# Marks that Unicode's compatibility form (NFKC) leaves as they are, by what they count as.
_MARKS = str.maketrans(
    {
        mark: plain
        for plain, marks in {
            ".": "。",
            ",": "、",
            '"': "“”„「」『』《》〈〉",
            "'": "‘’‚",
            "-": "—–−‐",
            "~": "〜",
        }.items()
        for mark in marks
    }
)
_EDGES = " .,;:!?"
_THINKING = re.compile(r"<think>.*?</think>", re.DOTALL)
_WIDE = "[\u2e80-\ua4cf\uac00-\ud7af\uf900-\ufaff]"
# White space counts between two words or two numbers of a script that writes spaces, and after "2," or "2." (to
# tell "2, 5" from "2,5"); not beside wide characters or other punctuation, nor between a number and its unit.
_LOOSE_SPACE = re.compile(
    rf"(?<={_WIDE}) | (?={_WIDE})|(?<=[^\w\s])(?<!\d[.,]) | (?=[^\w\s])|(?<=\d) (?=[^\W\d])|(?<=[^\W\d]) (?=\d)"
)


def normalise(text: str) -> str:
    """Text without the differences that don't make an answer wrong: width, case, quote marks, white space."""
    text = unicodedata.normalize("NFKC", text).translate(_MARKS).casefold()
    return _LOOSE_SPACE.sub("", " ".join(text.split()))


def says_something(text: str) -> bool:
    """Whether a text holds more than punctuation."""
    return bool(normalise(text).strip(_EDGES))


def contains(reply: str, answer: str) -> bool:
    """Whether a reply contains the key phrase, both normalised; what the model says in <think> does not count.

    A number must stand whole: "5 mg" is not in "15 mg" or "2.5 mg".
    """
    phrase = normalise(answer).strip(_EDGES)
    before = r"(?<!\d)(?<!\d[.,])" if phrase[:1].isdigit() else ""
    after = r"(?!\d)(?![.,]\d)" if phrase[-1:].isdigit() else ""
    return re.search(before + re.escape(phrase) + after, normalise(_THINKING.sub(" ", reply))) is not None
