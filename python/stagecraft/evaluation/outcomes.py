"""From the raw scores of all models to what a report tells, and every reply for people to read."""

from __future__ import annotations

import importlib.metadata
import json
import platform
from pathlib import Path
from typing import Any

from stagecraft import files
from stagecraft.evaluation import leaks, metrics, text
from stagecraft.evaluation.results import Leak, Outcome, Scores, Subject
from stagecraft.evaluation.sets import EvalSets
from stagecraft.evaluation.subjects import Place

SHOWN_LEAKS = 10
PACKAGES = ("torch", "transformers", "peft", "vllm", "sacrebleu")


def versions() -> dict[str, str]:
    """Of what the numbers depend on."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def find_leaks(sets: EvalSets, folders: dict[str, str]) -> list[Leak]:
    """The evaluation rows that training has seen; the first SHOWN_LEAKS are printed."""
    from tqdm import tqdm

    if not folders:
        return []
    size = leaks.weigh(folders)
    with tqdm(total=size, desc="training data", unit="B", unit_scale=True, leave=False, disable=None) as bar:
        found = leaks.find(sets, folders, bar.update)
    rows = sum(len(getattr(sets, name)) for name in leaks.SETS)
    data = ", ".join(dict.fromkeys(folders.values()))
    print(
        f"leaks: {len(found):,} of {rows:,} evaluation rows stand in {data}{' and are left out' * bool(found)}"
    )
    for leak in found[:SHOWN_LEAKS]:
        print(f"  {leak.where} is in {leak.source} ({leak.overlap:.0%}): {leak.text[:60]}")
    if len(found) > SHOWN_LEAKS:
        print(f"  ... and {len(found) - SHOWN_LEAKS:,} more, all in the report")
    return found


def built(
    recipe: str, places: list[Place], sets: EvalSets, scores: dict[str, Scores], beta: float, seed: int
) -> Outcome:
    """Metrics of every model, tests against the one before it, replies side by side."""
    outcome = Outcome(recipe, [place.as_subject() for place in places], [])
    before: tuple[str, Scores] | None = None
    for name, own in scores.items():
        outcome.metrics += metrics.measured(name, own, sets, before[1] if before else None, beta, seed)
        if before:
            outcome.comparisons += metrics.compared(name, own, *before, sets, beta, seed)
        before = (name, own)
    outcome.distributions = metrics.distributions(scores, sets, beta)
    outcome.questions = [
        (row.text, {name: own.questions[i].text for name, own in scores.items() if own.questions is not None})
        for i, row in enumerate(sets.questions)
    ]
    outcome.notes = _notes(outcome.subjects, places, scores)
    return outcome


def _notes(subjects: list[Subject], places: list[Place], scores: dict[str, Scores]) -> list[str]:
    """What a reader of the table must know to compare the models."""
    found = []
    counts = {name: sum(row.tokens for row in own.documents) for name, own in scores.items() if own.documents}
    if len(set(counts.values())) > 1:
        told = ", ".join(f"{name} {count:,}" for name, count in counts.items())
        found.append(
            f"the models cut the documents into different tokens ({told}): compare bits per byte, not perplexity"
        )
    templates = {s.name: s.template for s in subjects if s.template}
    if len(set(templates.values())) > 1:
        told = ", ".join(f"{name} {template}" for name, template in templates.items())
        found.append(f"the models have different chat templates ({told}): each was asked in its own")
    servers = [subject.name for subject in subjects if subject.kind == "server"]
    if servers:
        found.append(
            f"{', '.join(servers)}: a server gives replies only, so what needs likelihoods (perplexity, bits per byte, "
            "choices, pairs) is left out; its chat template is its own affair"
        )
    merged = [place.name for place in places if place.merged]
    if merged:
        found.append(f"{', '.join(merged)}: the adapter was merged in memory before it was measured")
    return found


def write_answers(path: Path, sets: EvalSets, scores: dict[str, Scores]) -> None:
    """A line a row of the answers: question, key phrase, reference, each model's reply and whether it is right."""
    lines = []
    for i, row in enumerate(sets.answers):
        said = {name: own.answers[i].text for name, own in scores.items() if own.answers is not None}
        line: dict[str, Any] = {"where": row.where, "split": row.split, "question": row.text}
        line |= {"answer": row.answer, "reference": row.reference, "replies": said}
        line["right"] = {name: text.contains(reply, row.answer) for name, reply in said.items()}
        lines.append(json.dumps(line, ensure_ascii=False) + "\n")
    files.write_text(path, "".join(lines).encode(errors="replace").decode())
