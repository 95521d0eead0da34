"""Texts compared: what counts as the same answer, how near a reply comes to its reference, how much it repeats."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sacrebleu.metrics.base import Metric as CorpusMetric

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
EDGES = " .,;:!?"
# Up to a </think> whose <think> was part of the prompt; or a thought, which the limit of a reply may have cut off.
_THINKING = re.compile(r"\A(?:(?!<think>).)*?</think>|<think>.*?(?:</think>|\Z)", re.DOTALL)
_WIDE_RANGES = "\u2e80-\ua4cf\uac00-\ud7af\uf900-\ufaff\U00020000-\U0003ffff"
_WIDE = f"[{_WIDE_RANGES}]"
_HAN = re.compile("[\u3400-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]")
_UNIT = re.compile(rf"(?=\w){_WIDE}|\d+|[^\W\d{_WIDE_RANGES}]+")
REPEATED = 4  # units of what counts as repeated: three words in a row recur in good answers too
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
    return bool(normalise(text).strip(EDGES))


def contains(reply: str, answer: str) -> bool:
    """Whether a reply contains the key phrase, both normalised; what the model says in <think> does not count.

    A number must stand whole: "5 mg" is not in "15 mg" or "2.5 mg".
    """
    phrase = normalise(answer).strip(EDGES)
    before = r"(?<!\d)(?<!\d[.,])" if phrase[:1].isdigit() else ""
    after = r"(?!\d)(?![.,]\d)" if phrase[-1:].isdigit() else ""
    return re.search(before + re.escape(phrase) + after, normalise(said(reply))) is not None


def said(reply: str) -> str:
    """A reply without what the model thought before it."""
    return _THINKING.sub(" ", reply).strip()


def exact(reply: str, reference: str) -> bool:
    """Whether a reply is the reference, both normalised, without punctuation at their edges."""
    return normalise(said(reply)).strip(EDGES) == normalise(reference).strip(EDGES)


def units(text: str) -> list[str]:
    """The text's words, normalised; scripts written without spaces (and Hangul) count by characters."""
    return units_of_normal(normalise(text))


def units_of_normal(normal: str) -> list[str]:
    """The units of a text that is normalised already."""
    return _UNIT.findall(normal)


def rouge_l(reply: str, reference: str) -> float:
    """ROUGE-L (Lin, 2004): F1 of the longest common subsequence of units."""
    ours, theirs = units(said(reply)), units(reference)
    shared = _longest_common(ours, theirs)
    return 2 * shared / (len(ours) + len(theirs)) if shared else 0.0


def repetition(reply: str) -> float:
    """Share of a reply's runs of REPEATED units that stood earlier in it; thoughts count, as they may loop too."""
    found = units(reply)
    runs = list(zip(*(found[i:] for i in range(REPEATED)), strict=False))
    return 1 - len(set(runs)) / len(runs) if runs else 0.0


def corpus_metrics(references: Sequence[str]) -> dict[str, CorpusMetric]:
    """sacrebleu's BLEU and chrF with these references; BLEU cuts Chinese into characters where there is any."""
    from sacrebleu.metrics import BLEU, CHRF

    tokenizer = "zh" if any(map(_HAN.search, references)) else "13a"
    kept = [list(references)]
    # force: no warning about replies that end in " ."
    return {"bleu": BLEU(tokenize=tokenizer, force=True, references=kept), "chrf": CHRF(references=kept)}


def signatures(references: Sequence[str]) -> dict[str, str]:
    """What sacrebleu wants named beside its scores: tokenizer, smoothing, version and so on, for bleu and chrf."""
    return {name: metric.get_signature().format() for name, metric in corpus_metrics(references).items()}


def _longest_common(a: Sequence[str], b: Sequence[str]) -> int:
    """Length of the longest common subsequence, a bit for each unit of `a` (Hyyrö, 2004).

    ROUGE-L of 500 words takes 1 ms; rouge_score, which fills a table of all pairs, took 38 ms.
    """
    places: dict[str, int] = {}
    for i, unit in enumerate(a):
        places[unit] = places.get(unit, 0) | 1 << i
    whole = free = (1 << len(a)) - 1
    for unit in b:
        hit = free & places.get(unit, 0)
        free = ((free + hit) | (free - hit)) & whole
    return len(a) - free.bit_count()
