"""What is measured: the evaluation rows, one score a row, and metrics with 95 % intervals from the scores.

Scoring functions take (model, tokenizer, rows, ...) and return one result a row, in order; metric functions turn
such results into Metric records. Nothing heavy is imported until a function needs it.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, TypeVar

from stagecraft import generation
from stagecraft.data.rows import Document, Preference
from stagecraft.errors import UserError
from stagecraft.evaluation.results import Metric
from stagecraft.evaluation.sets import Choice, Question
from stagecraft.evaluation.text import contains
from stagecraft.generation import Progress

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Z95 = 1.959963984540054  # normal quantile of a two-sided 95 % interval
RESAMPLES = 1000
T = TypeVar("T")


def score_documents(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    documents: list[Document],
    batch_size: int = 32,
    progress: Progress | None = None,
) -> list[tuple[float, int]]:
    """(negative log-likelihood in nats, scored tokens) of each document."""
    texts = [document.text for document in documents]
    scores = generation.document_logprobs(model, tokenizer, texts, batch_size, progress)
    return [(-nats, count) for nats, count in scores]


def score_answers(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    questions: list[Question],
    max_new_tokens: int = 64,
    batch_size: int = 32,
    progress: Progress | None = None,
) -> list[tuple[str, bool]]:
    """(greedy reply, whether it contains the answer) of each question."""
    prompts = [question.prompt for question in questions]
    replies = generation.generate_replies(model, tokenizer, prompts, max_new_tokens, batch_size, progress)
    return [(reply, contains(reply, q.answer)) for reply, q in zip(replies, questions, strict=True)]


def score_choices(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    choices: list[Choice],
    batch_size: int = 32,
    progress: Progress | None = None,
) -> list[list[float]]:
    """Mean log-probability per token of each option of each row; progress counts options."""
    pairs = [(choice.prompt, option) for choice in choices for option in choice.options]
    scores = iter(generation.reply_logprobs(model, tokenizer, pairs, batch_size, progress))
    return [[next(scores) for _ in choice.options] for choice in choices]


def score_preferences(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    preferences: list[Preference],
    batch_size: int = 32,
    progress: Progress | None = None,
    by_reward: bool = False,
) -> list[tuple[float, float]]:
    """(score of chosen, score of rejected) of each pair; progress counts replies.

    The score is the mean log-probability per token, or with `by_reward` the output of a reward model.
    """
    pairs = [(row.prompt, text) for row in preferences for text in (row.chosen, row.rejected)]
    score = generation.reward_scores if by_reward else generation.reply_logprobs
    scores = score(model, tokenizer, pairs, batch_size, progress)
    return list(zip(scores[::2], scores[1::2], strict=True))


def perplexity(model: str, losses: list[tuple[float, int]], seed: int = 42) -> Metric:
    """exp(total NLL / total tokens); interval: percentile bootstrap over documents, RESAMPLES resamples."""
    import numpy as np

    nats, tokens = np.array(losses, dtype=np.float64).T
    _require_finite(model, "perplexity", nats.tolist())
    drawn = np.random.default_rng(seed).integers(0, len(nats), (RESAMPLES, len(nats)))
    resampled = np.exp(nats[drawn].sum(1) / tokens[drawn].sum(1))
    low, high = np.percentile(resampled, [2.5, 97.5])
    value = math.exp(nats.sum() / tokens.sum())
    return Metric("perplexity", None, model, value, len(losses), float(low), float(high))


def answer_accuracy(model: str, questions: list[Question], scored: list[tuple[str, bool]]) -> list[Metric]:
    """Share of replies that contain the answer, one Metric a split."""
    marks = [(question.split, right, None) for question, (_, right) in zip(questions, scored, strict=True)]
    return _accuracies("answer_accuracy", model, marks)


def choice_accuracy(model: str, choices: list[Choice], scored: list[list[float]]) -> list[Metric]:
    """Share of rows whose right option scores higher than every other one, one Metric a split."""
    marks = []
    for choice, scores in zip(choices, scored, strict=True):
        _require_finite(model, f"choice_accuracy ({choice.where})", scores)
        others = [score for i, score in enumerate(scores) if i != choice.right]
        marks.append((choice.split, scores[choice.right] > max(others), 1 / len(scores)))
    return _accuracies("choice_accuracy", model, marks)


def pair_accuracy(metric: str, model: str, scored: list[tuple[float, float]]) -> Metric:
    """Share of pairs whose chosen answer scores higher than the rejected one; a tie is no success."""
    _require_finite(model, metric, [score for pair in scored for score in pair])
    [result] = _accuracies(metric, model, [(None, chosen > rejected, 0.5) for chosen, rejected in scored])
    return result


def wilson(right: int, n: int) -> tuple[float, float]:
    """95 % interval of a proportion (E. B. Wilson, 1927, JASA 22: 209-212); sound near 0 and 1 and for small n."""
    share, spread = right / n, Z95 * Z95 / n
    centre = (share + spread / 2) / (1 + spread)
    half = Z95 / (1 + spread) * math.sqrt(share * (1 - share) / n + spread / (4 * n))
    # The ends are exact at 0 and n; rounding would leave 1e-17 there.
    return (0.0 if right == 0 else centre - half), (1.0 if right == n else centre + half)


def _accuracies(metric: str, model: str, marks: list[tuple[str | None, bool, float | None]]) -> list[Metric]:
    """(split, right, chance) of each row -> a Metric for each split, in order of appearance."""
    results = []
    for split in dict.fromkeys(split for split, _, _ in marks):
        group = [(right, chance) for s, right, chance in marks if s == split]
        right, n = sum(ok for ok, _ in group), len(group)
        chances = [chance for _, chance in group if chance is not None]
        chance = sum(chances) / n if chances else None
        results.append(Metric(metric, split, model, right / n, n, *wilson(right, n), chance))
    return results


def _require_finite(model: str, what: str, scores: list[float]) -> None:
    if not all(map(math.isfinite, scores)):
        raise UserError(
            f"{model}: {what}: the model gives NaN or infinite scores; its weights are damaged, or its dtype is too "
            "narrow (try --torch_dtype float32)"
        )
