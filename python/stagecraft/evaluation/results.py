"""What an evaluation finds: each model's raw scores row by row, the numbers made of them, all that a report tells."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from stagecraft.generation import Likelihood, Reply


@dataclass
class Scores:
    """One model's raw results, each list in the order of its rows; None where it was not or can't be measured."""

    documents: list[Likelihood] | None = None
    answers: list[Reply] | None = None
    choices: list[list[Likelihood]] | None = None  # of each row's options
    preferences: list[tuple[Likelihood, Likelihood]] | None = None  # chosen, rejected
    pair_replies: list[Reply] | None = (
        None  # to the prompts of the preferences, where a reward model reads them
    )
    rewards: list[float] | None = None  # of pair_replies
    questions: list[Reply] | None = None
    batches: list[tuple[int, float]] = field(default_factory=list)  # (tokens written, seconds), answers only


@dataclass(frozen=True)
class Measure:
    """What a metric is. better: "higher", "lower", or "" where neither is; digits behind the point in tables."""

    title: str
    better: str
    digits: int
    meaning: str


@dataclass(frozen=True)
class Metric:
    """One number of the report. `n`: rows it stands on; low and high: 95 % interval; chance: what guessing gives."""

    metric: str
    split: str | None
    model: str
    value: float
    n: int
    low: float
    high: float
    chance: float | None = None


@dataclass(frozen=True)
class Comparison:
    """A model against the one before it on the same rows: the difference of a metric, its 95 % interval, and p.

    verdict: "better", "worse" or "unclear" (p of 0.05 or more); "higher" and "lower" where a metric has no good side.
    """

    metric: str
    split: str | None
    model: str
    before: str
    difference: float
    low: float
    high: float
    p: float
    n: int
    verdict: str


@dataclass(frozen=True)
class Leak:
    """An evaluation row that training has seen. overlap: share of its n-grams found in that row; 1 for the same text."""

    name: str  # of the set: documents, answers, ...
    where: str  # file:line of the evaluation row
    text: str
    source: str  # file:line of the training row
    overlap: float


@dataclass(frozen=True)
class Subject:
    """A model that is evaluated. kind: folder, adapter, server or reward; template: hash of its chat template."""

    name: str
    path: str
    kind: str
    template: str | None = None


@dataclass
class Outcome:
    """All that the report tells."""

    recipe: str
    subjects: list[Subject]
    metrics: list[Metric]
    comparisons: list[Comparison] = field(default_factory=list)
    distributions: dict[str, dict[str, list[float]]] = field(
        default_factory=dict
    )  # metric -> model -> each row's value
    questions: list[tuple[str, dict[str, str]]] = field(default_factory=list)  # (question, {model: reply})
    leaks: list[Leak] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    settings: dict[str, Any] = field(
        default_factory=dict
    )  # seed, max_new_tokens, engine, dtype, versions ...


MEASURES = {
    "perplexity": Measure(
        "perplexity",
        "lower",
        2,
        "how surprised the model is by held-out documents, per token; 1 is the least. Comparable only between models "
        "with the same tokenizer. Interval: bootstrap over documents.",
    ),
    "bits_per_byte": Measure(
        "bits per byte",
        "lower",
        3,
        "the same surprise per byte of text, comparable between any two models.",
    ),
    "answer_accuracy": Measure(
        "answers: right",
        "higher",
        3,
        "share of greedy replies that contain the right key phrase. `phrasing` asks about facts from training in new "
        "words, `fact` asks for what was seen in the documents only; other splits are the data's own.",
    ),
    "answer_exact": Measure(
        "answers: exact",
        "higher",
        3,
        "share of greedy replies that are the reference answer word for word, width, case and white space aside.",
    ),
    "rouge_l": Measure(
        "answers: ROUGE-L",
        "higher",
        3,
        "longest common subsequence of reply and reference (F1 of words; Chinese counts by characters), mean.",
    ),
    "bleu": Measure(
        "answers: BLEU", "higher", 1, "sacrebleu's corpus BLEU, 0 to 100; its signature is in the settings."
    ),
    "chrf": Measure("answers: chrF", "higher", 1, "sacrebleu's corpus chrF (character n-grams), 0 to 100."),
    "choice_accuracy": Measure(
        "choices: right",
        "higher",
        3,
        "share of questions whose right option has the highest log-probability per character as the assistant's reply. "
        "It needs no free text, so it moves earlier than the answers.",
    ),
    "preference_accuracy": Measure(
        "pairs: right",
        "higher",
        3,
        "share of held-out pairs in which the model finds the chosen answer likelier per token than the rejected one. "
        "Read it beside the answers: preference training can raise it and ruin them.",
    ),
    "implicit_margin": Measure(
        "pairs: margin",
        "higher",
        3,
        "DPO's implicit reward of the chosen answer less the rejected one's, mean: beta times how much further apart "
        "the model holds them than the model before it in the table.",
    ),
    "reward_accuracy": Measure(
        "reward model: right",
        "higher",
        3,
        "share of held-out pairs in which the reward model scores the chosen answer higher.",
    ),
    "reward_win_rate": Measure(
        "reward model: wins",
        "higher",
        3,
        "how often the reward model scores the model's reply above that of the model before it; equal scores count half.",
    ),
    "stops_by_itself": Measure(
        "stops by itself",
        "higher",
        3,
        "share of replies that end with a stop token rather than at the limit.",
    ),
    "end_of_turn": Measure(
        "ends its turn",
        "higher",
        3,
        "probability of the end of turn right after the chosen answers of held-out pairs, mean. Where it is low a model "
        "may stop when it is greedy and run on when it is sampled, which is what servers do unless told otherwise.",
    ),
    "repetition": Measure(
        "repetition",
        "lower",
        3,
        "share of a reply's 4-grams that the reply had before (words; Chinese by characters), mean over replies.",
    ),
    "reply_tokens": Measure("reply length", "", 1, "tokens of a reply, mean."),
    "tokens_per_second": Measure(
        "tokens a second",
        "",
        0,
        "tokens of replies written a second while the answers were evaluated, on this machine.",
    ),
}
