"""What changed between two replies: words, and in scripts without spaces characters."""

from __future__ import annotations

import re
from difflib import SequenceMatcher

SAME, GONE, NEW = "same", "gone", "new"
_WIDE = "\u2e80-\ua4cf\uac00-\ud7af\uf900-\ufaff"
_UNIT = re.compile(rf"[{_WIDE}]|[^\W{_WIDE}]+|\s+|.", re.DOTALL)
_SENTENCE = re.compile(r"[^\n。！？.!?]*[\n。！？.!?]*")
LARGEST = (
    160_000  # units times units: 0.6 s where a text repeats itself; longer ones are compared by the sentence
)
LEAST_ALIKE = 0.3  # below this almost every word would be marked, which shows nothing


def marked(before: str, after: str) -> list[tuple[str, str]] | None:
    """[(SAME, GONE or NEW, text)]: all but GONE are `after`, all but NEW are `before`. None: hardly anything alike."""
    head, tail = _shared(before, after)
    old, new = before[head : len(before) - tail], after[head : len(after) - tail]
    parts = [(SAME, after[:head]), *_middle(old, new), (SAME, after[len(after) - tail :])]
    parts = [(kind, text) for kind, text in parts if text]
    alike = sum(len(text.strip()) for kind, text in parts if kind == SAME)
    longest = max(len(before.strip()), len(after.strip()), 1)
    return parts if before.strip() == after.strip() or alike / longest >= LEAST_ALIKE else None


def _shared(before: str, after: str) -> tuple[int, int]:
    """Characters that both begin with and end with, up to the edge of a unit."""
    old, new = _UNIT.findall(before), _UNIT.findall(after)
    most = min(len(old), len(new))
    head = next((i for i in range(most) if old[i] != new[i]), most)
    most -= head
    tail = next((i for i in range(most) if old[-1 - i] != new[-1 - i]), most)
    return sum(map(len, new[:head])), sum(map(len, new[len(new) - tail :]))


def _middle(old: str, new: str) -> list[tuple[str, str]]:
    a, b = _UNIT.findall(old), _UNIT.findall(new)
    if len(a) * len(b) > LARGEST:
        a, b = (list(filter(None, _SENTENCE.findall(text))) for text in (old, new))
    parts: list[tuple[str, str]] = []
    for kind, i, j, k, end in SequenceMatcher(None, a, b, autojunk=False).get_opcodes():
        if kind == "equal":
            parts.append((SAME, "".join(b[k:end])))
        else:
            parts += [(GONE, "".join(a[i:j])), (NEW, "".join(b[k:end]))]
    return parts
