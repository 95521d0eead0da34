"""What is measured: metrics with 95 % intervals from a model's raw scores, and tests against the model before it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

from stagecraft.errors import UserError
from stagecraft.evaluation import statistics, text
from stagecraft.evaluation.results import MEASURES, Comparison, Metric, Scores
from stagecraft.evaluation.sets import EvalSets, Question
from stagecraft.generation import Likelihood, Reply

if TYPE_CHECKING:
    import numpy as np

BETA = 0.1  # DPO's usual one
SURE = 0.05  # a p below it is called a difference
ROUNDING = 1e-5  # relative: one model computed in another order of sums differs by up to 1e-6 in float32
# Whose values of single rows are worth a histogram.
SPREAD = ("bits_per_byte", "rouge_l", "implicit_margin", "reply_tokens")


@dataclass(frozen=True)
class View:
    """What a metric stands on: numbers of each row, and what their sums make.

    share: rows are right (1) or wrong (0). against: the metric compares two models already; no difference is this.
    """

    metric: str
    rows: np.ndarray  # (rows, columns)
    of_sums: statistics.OfSums
    split: str | None = None
    chance: float | None = None
    share: bool = False
    against: float | None = None

    @property
    def value(self) -> float:
        return float(self.of_sums(self.rows.sum(0)[None])[0])

    @property
    def each(self) -> list[float]:
        """The metric of each row alone."""
        return self.of_sums(self.rows).tolist()

    def interval(self, seed: int) -> tuple[float, float]:
        if self.share:
            return statistics.wilson(float(self.rows[:, 0].sum()), len(self.rows))
        return statistics.bootstrap(self.rows, self.of_sums, seed)


def measured(
    model: str,
    scores: Scores,
    sets: EvalSets,
    before: Scores | None = None,
    beta: float = BETA,
    seed: int = 42,
) -> list[Metric]:
    """Every metric that the scores allow, in the order of MEASURES. `before`: of the model to compare with."""
    return [_metric(model, view, seed) for view in _views(model, scores, sets, before, beta)]


def reward_accuracy(model: str, scored: list[tuple[float, float]]) -> Metric:
    """Share of pairs whose chosen answer a reward model scores higher than the rejected one; a tie is no success."""
    _require_finite(model, "reward_accuracy", (score for pair in scored for score in pair))
    right = [chosen > rejected for chosen, rejected in scored]
    return _metric(model, _share("reward_accuracy", right, chance=0.5), seed=0)


def compared(
    model: str,
    scores: Scores,
    before_name: str,
    before: Scores,
    sets: EvalSets,
    beta: float = BETA,
    seed: int = 42,
) -> list[Comparison]:
    """Tests of a model against the one before it on the same rows, metric by metric, in the order of MEASURES.

    Right or wrong: McNemar's exact test. Else: randomisation, and a paired bootstrap. Speed is not compared, nor
    perplexity where the two cut the documents into different tokens.
    """
    earlier = {(view.metric, view.split): view for view in _views(before_name, before, sets, None, beta)}
    found = []
    for view in _views(model, scores, sets, before, beta):
        old = earlier.get((view.metric, view.split))
        if view.against is not None:
            result = _against(view, seed)
        elif old is None or not _comparable(view, old):
            continue
        else:
            result = _paired(view, old, seed)
        verdict = _verdict(MEASURES[view.metric].better, *result[::3])
        found.append(
            Comparison(view.metric, view.split, model, before_name, *result, len(view.rows), verdict)
        )
    return found


def distributions(
    model_scores: dict[str, Scores], sets: EvalSets, beta: float = BETA
) -> dict[str, dict[str, list[float]]]:
    """metric -> model -> each row's value, of SPREAD's metrics; a model's margin is against the model before it."""
    found: dict[str, dict[str, list[float]]] = {}
    before = None
    for model, scores in model_scores.items():
        for view in _views(model, scores, sets, before, beta, only=SPREAD):
            found.setdefault(view.metric, {})[model] = view.each
        before = scores
    return {name: found[name] for name in MEASURES if name in found}


def signatures(sets: EvalSets) -> dict[str, str]:
    """How BLEU and chrF of these answers are computed, as sacrebleu says it; empty without answers."""
    return text.signatures([_reference(row) for row in sets.answers]) if sets.answers else {}


# From raw scores to numbers of each row


def _views(
    model: str,
    scores: Scores,
    sets: EvalSets,
    before: Scores | None,
    beta: float,
    only: Iterable[str] = tuple(MEASURES),
) -> list[View]:
    made = {
        "perplexity": partial(_perplexity, model, scores),
        "bits_per_byte": partial(_bits_per_byte, model, scores, sets),
        "answer_accuracy": partial(_answer_accuracy, scores, sets),
        "answer_exact": partial(_answer_exact, scores, sets),
        "rouge_l": partial(_rouge_l, scores, sets),
        "bleu": partial(_corpus_metric, "bleu", scores, sets),
        "chrf": partial(_corpus_metric, "chrf", scores, sets),
        "choice_accuracy": partial(_choice_accuracy, model, scores, sets),
        "preference_accuracy": partial(_preference_accuracy, model, scores),
        "implicit_margin": partial(_implicit_margin, model, scores, before, beta),
        "reward_win_rate": partial(_reward_win_rate, model, scores, before),
        "stops_by_itself": partial(_stops, scores),
        "end_of_turn": partial(_end_of_turn, model, scores),
        "repetition": partial(_of_answers, "repetition", scores, lambda reply: text.repetition(reply.text)),
        "reply_tokens": partial(_of_answers, "reply_tokens", scores, lambda reply: reply.tokens),
        "tokens_per_second": partial(_speed, scores),
    }
    return [view for name in MEASURES if name in only and name in made for view in made[name]()]


def _perplexity(model: str, scores: Scores) -> Iterator[View]:
    if scores.documents:
        _require_finite(model, "perplexity", _nats(scores.documents))
        rows = [(row.nats, row.tokens) for row in scores.documents]
        yield View("perplexity", _array(rows), _exp_of_loss)


def _bits_per_byte(model: str, scores: Scores, sets: EvalSets) -> Iterator[View]:
    if scores.documents:
        _require_finite(model, "bits_per_byte", _nats(scores.documents))
        bits = [-row.nats / math.log(2) for row in scores.documents]
        sizes = [len(row.text.encode("utf-8")) for row in sets.documents]
        yield View("bits_per_byte", _array(list(zip(bits, sizes, strict=True))), _ratio)


def _answer_accuracy(scores: Scores, sets: EvalSets) -> Iterator[View]:
    replies = zip(sets.answers, scores.answers or [], strict=bool(scores.answers))
    right = [(row.split, text.contains(reply.text, row.answer), None) for row, reply in replies]
    yield from _by_split("answer_accuracy", right)


def _answer_exact(scores: Scores, sets: EvalSets) -> Iterator[View]:
    if scores.answers:
        yield _share("answer_exact", [text.exact(*pair) for pair in _with_references(scores, sets)])


def _rouge_l(scores: Scores, sets: EvalSets) -> Iterator[View]:
    if scores.answers:
        yield _mean("rouge_l", [text.rouge_l(*pair) for pair in _with_references(scores, sets)])


def _corpus_metric(name: str, scores: Scores, sets: EvalSets) -> Iterator[View]:
    import numpy as np

    if scores.answers:
        metric = text.corpus_metrics([_reference(row) for row in sets.answers])[name]
        # What sacrebleu's own tests use: counts of each row, whose sums make the score.
        counts = metric._extract_corpus_statistics([text.said(reply.text) for reply in scores.answers], None)
        score = metric._compute_score_from_stats
        yield View(name, _array(counts), lambda sums: np.array([score(row).score for row in sums]))


def _choice_accuracy(model: str, scores: Scores, sets: EvalSets) -> Iterator[View]:
    right = []
    for row, options in zip(sets.choices, scores.choices or [], strict=bool(scores.choices)):
        _require_finite(model, f"choice_accuracy ({row.where})", _nats(options))
        # By characters, as lm-evaluation-harness does in acc_norm: a count that does not depend on the tokenizer.
        found = [score.nats / len(option) for score, option in zip(options, row.options, strict=True)]
        best = found.pop(row.right)
        right.append((row.split, best > max(found), 1 / len(options)))
    yield from _by_split("choice_accuracy", right)


def _preference_accuracy(model: str, scores: Scores) -> Iterator[View]:
    if scores.preferences:
        _require_finite(
            model, "preference_accuracy", _nats(row for pair in scores.preferences for row in pair)
        )
        pairs = [[row.nats / row.tokens for row in pair] for pair in scores.preferences]
        yield _share("preference_accuracy", [chosen > rejected for chosen, rejected in pairs], chance=0.5)


def _implicit_margin(model: str, scores: Scores, before: Scores | None, beta: float) -> Iterator[View]:
    if scores.preferences and before and before.preferences:
        for pairs in (scores.preferences, before.preferences):
            _require_finite(model, "implicit_margin", (row.nats + row.end for pair in pairs for row in pair))
        ours, theirs = (
            _array([[_whole(row) for row in pair] for pair in s.preferences]) for s in (scores, before)
        )
        moved = ours - _settled(theirs, ours)
        margins = (beta * (moved[:, 0] - moved[:, 1])).tolist()
        yield _mean("implicit_margin", margins, against=0.0)


def _reward_win_rate(model: str, scores: Scores, before: Scores | None) -> Iterator[View]:
    import numpy as np

    if scores.rewards and before and before.rewards:
        _require_finite(model, "reward_win_rate", [*scores.rewards, *before.rewards])
        ours = _array(scores.rewards)
        wins = (np.sign(ours - _settled(_array(before.rewards), ours)) / 2 + 0.5).tolist()
        yield _share("reward_win_rate", wins, chance=0.5, against=0.5)


def _stops(scores: Scores) -> Iterator[View]:
    if scores.answers:
        yield _share("stops_by_itself", [reply.stopped for reply in scores.answers])


def _end_of_turn(model: str, scores: Scores) -> Iterator[View]:
    ends = [chosen.end for chosen, _ in scores.preferences or []]
    if any(ends):  # none: a template without such a token
        _require_finite(model, "end_of_turn", ends)
        yield _mean("end_of_turn", map(math.exp, ends))


def _of_answers(metric: str, scores: Scores, number: Callable[[Reply], float]) -> Iterator[View]:
    if scores.answers:
        yield _mean(metric, list(map(number, scores.answers)))


def _speed(scores: Scores) -> Iterator[View]:
    timed = [(tokens, seconds) for tokens, seconds in scores.batches if seconds > 0]
    if timed:
        yield View("tokens_per_second", _array(timed), _ratio)


# Small parts


def _metric(model: str, view: View, seed: int) -> Metric:
    value = view.value
    _require_finite(model, view.metric, [value])
    low, high = view.interval(seed)
    _require_finite(model, view.metric, [low, high])
    return Metric(view.metric, view.split, model, value, len(view.rows), low, high, view.chance)


def _comparable(view: View, old: View) -> bool:
    """Whether row i of both stands for the same: a batch is none, documents have to be cut into the same tokens."""
    if view.metric == "perplexity":
        return bool((view.rows[:, 1] == old.rows[:, 1]).all())
    return view.metric != "tokens_per_second"


def _against(view: View, seed: int) -> tuple[float, float, float, float]:
    """(difference, low, high, p) of a metric that compares two models already."""
    no_difference = view.against or 0.0
    low, high = view.interval(seed)
    values = view.rows[:, 0] - no_difference
    if view.share:
        p = statistics.mcnemar(int((values > 0).sum()), int((values < 0).sum()))
    else:
        p = statistics.randomisation(view.rows, -view.rows * [1, -1], view.of_sums, seed)
    return view.value - no_difference, low - no_difference, high - no_difference, p


def _paired(view: View, old: View, seed: int) -> tuple[float, float, float, float]:
    """(difference, low, high, p) of two models' metric on the same rows; rows that differ by rounding are equal."""
    old = replace(old, rows=_settled(old.rows, view.rows))
    difference = view.value - old.value
    if view.share:
        gained, lost = (int((a.rows[:, 0] > b.rows[:, 0]).sum()) for a, b in ((view, old), (old, view)))
        interval = statistics.paired_shares(gained, lost, len(view.rows))
        return difference, *interval, statistics.mcnemar(gained, lost)
    interval = statistics.paired_bootstrap(view.rows, old.rows, view.of_sums, seed)
    return difference, *interval, statistics.randomisation(view.rows, old.rows, view.of_sums, seed)


def _settled(rows: np.ndarray, by: np.ndarray) -> np.ndarray:
    """The rows, with the numbers of `by` where they are equal but for rounding."""
    import numpy as np

    return np.where(np.isclose(rows, by, rtol=ROUNDING, atol=0), by, rows)


def _verdict(better: str, difference: float, p: float) -> str:
    if p >= SURE or difference == 0:
        return "unclear"
    way = "higher" if difference > 0 else "lower"
    return way if not better else "better" if way == better else "worse"


def _by_split(metric: str, marks: list[tuple[str | None, bool, float | None]]) -> Iterator[View]:
    """(split, right, chance) of each row -> a View for each split, in order of appearance."""
    for split in dict.fromkeys(split for split, _, _ in marks):
        group = [(right, chance) for s, right, chance in marks if s == split]
        chances = [chance for _, chance in group if chance is not None]
        chance = sum(chances) / len(group) if chances else None
        yield _share(metric, [right for right, _ in group], split, chance)


def _share(
    metric: str,
    right: Iterable[float],
    split: str | None = None,
    chance: float | None = None,
    against: float | None = None,
) -> View:
    return View(metric, _array([(mark, 1) for mark in right]), _ratio, split, chance, True, against)


def _mean(metric: str, values: Iterable[float], against: float | None = None) -> View:
    return View(metric, _array([(value, 1) for value in values]), _ratio, against=against)


def _ratio(sums: np.ndarray) -> np.ndarray:
    return sums[:, 0] / sums[:, 1]


def _exp_of_loss(sums: np.ndarray) -> np.ndarray:
    import numpy as np

    with np.errstate(over="ignore"):  # infinity is refused where the metric is made
        return np.exp(-_ratio(sums))


def _array(rows: Any) -> np.ndarray:
    import numpy as np

    return np.array(rows, dtype=np.float64)


def _with_references(scores: Scores, sets: EvalSets) -> list[tuple[str, str]]:
    """(reply, reference) of each row of the answers."""
    pairs = zip(scores.answers or [], sets.answers, strict=True)
    return [(reply.text, _reference(row)) for reply, row in pairs]


def _reference(row: Question) -> str:
    return row.reference or row.answer


def _whole(row: Likelihood) -> float:
    """Log-probability of words and end of turn, which is what DPO compares."""
    return row.nats + row.end


def _nats(rows: Iterable[Likelihood]) -> Iterator[float]:
    return (row.nats for row in rows)


def _require_finite(model: str, what: str, scores: Iterable[float]) -> None:
    if not all(map(math.isfinite, scores)):
        raise UserError(
            f"{model}: {what}: the model gives NaN or infinite scores; its weights are damaged, or its dtype is too "
            "narrow (try --torch_dtype float32)"
        )
