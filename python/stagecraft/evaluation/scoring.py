"""A model's raw scores on the evaluation rows, task by task; whatever was finished before is not measured again."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, astuple, dataclass
from pathlib import Path
from typing import Any

from stagecraft import generation, models
from stagecraft.evaluation.engines import Model, Settings, open_model
from stagecraft.evaluation.kept import Kept, Task, key_of
from stagecraft.evaluation.results import Scores
from stagecraft.evaluation.sets import EvalSets
from stagecraft.evaluation.subjects import REWARD, fingerprint_of
from stagecraft.generation import Keep, Likelihood, Progress, Reply
from stagecraft.places import Place

# What measures a task, given what keeps its batches and whom to tell of the progress.
Run = Callable[[Keep, Progress], list[Any]]


@dataclass(frozen=True)
class Measuring:
    """What all models are measured on, and where finished batches are kept."""

    sets: EvalSets
    settings: Settings
    output: Path
    versions: dict[str, Any]

    def scores_of(self, place: Place, with_pair_replies: bool) -> Scores:
        """All that the model can be asked. `with_pair_replies`: a reward model is going to read replies.

        Replies come first: vLLM gives the card back before transformers takes it.
        """
        sets, found = self.sets, Scores()
        kept = self._kept(place.name, fingerprint_of(place), asdict(sets))
        with contextlib.closing(open_model(place, self.settings)) as model:

            def task(name: str, asked: list[Any], ask: Callable[..., list[Any]]) -> Task:
                return _measure(place.name, name, len(asked), kept, lambda *how: ask(asked, *how))

            def replies(name: str, rows: list[Any]) -> Task:
                return task(name, [row.prompt for row in rows], model.replies)

            if sets.answers:
                done = replies("answers", sets.answers)
                found.answers = [Reply(*row) for row in done.results]
                found.batches = [
                    (sum(found.answers[i].tokens for i in batch.rows), batch.seconds)
                    for batch in done.batches
                ]
            if sets.preferences and with_pair_replies:
                found.pair_replies = [Reply(*row) for row in replies("replies", sets.preferences).results]
            if sets.questions:
                found.questions = [Reply(*row) for row in replies("questions", sets.questions).results]
            if not isinstance(model, Model):  # a server says nothing of texts that it is given
                return found
            if sets.documents:
                done = task("documents", [row.text for row in sets.documents], model.documents)
                found.documents = [Likelihood(*row) for row in done.results]
            if sets.choices:
                options = [(row.prompt, option) for row in sets.choices for option in row.options]
                each = iter(task("choices", options, model.pairs).results)
                found.choices = [[Likelihood(*next(each)) for _ in row.options] for row in sets.choices]
            if sets.preferences:
                each = task("preferences", _both(sets), model.pairs).results
                pairs = zip(each[::2], each[1::2], strict=True)
                found.preferences = [
                    (Likelihood(*chosen), Likelihood(*rejected)) for chosen, rejected in pairs
                ]
        return found

    def judge(self, path: str, scored: dict[str, Scores]) -> list[tuple[float, float]] | None:
        """A reward model's (score of chosen, of rejected) of each pair; every model's `rewards` are filled in."""
        place, loaded = Place(REWARD, path, "--reward_model", path), []
        if not self.sets.preferences:
            return None

        def scores(name: str, pairs: list[Any]) -> list[float]:
            def ask(keep: Keep, progress: Progress) -> list[float]:
                if not loaded:
                    how = (models.load_reward, path, self.settings.dtype, "--reward_model")
                    loaded.extend(generation.load(*how))
                return generation.reward_scores(*loaded, pairs, self.settings.batch_size, progress, keep)

            return _measure(REWARD, name, len(pairs), self._kept(fingerprint_of(place), pairs), ask).results

        each = scores("preferences", _both(self.sets))
        for name, own in scored.items():
            if own.pair_replies is not None:
                said = zip(self.sets.preferences, own.pair_replies, strict=True)
                own.rewards = scores(f"replies of {name}", [(row.prompt, reply.text) for row, reply in said])
        return list(zip(each[::2], each[1::2], strict=True))

    def _kept(self, *what: Any) -> Kept:
        return Kept(self.output, key_of(*what, asdict(self.settings), self.versions))


def _both(sets: EvalSets) -> list[tuple[Any, str]]:
    """The chosen and the rejected answer of each pair, one after the other."""
    return [(row.prompt, text) for row in sets.preferences for text in (row.chosen, row.rejected)]


def _measure(model: str, name: str, rows: int, kept: Kept, ask: Run) -> Task:
    """One task with a bar on a terminal while it lasts, and a line when it is done."""
    began = time.monotonic()

    def run(keep: Keep) -> list[Any]:
        with _bar(f"{model} {name}", rows) as progress:
            return [row if isinstance(row, float) else astuple(row) for row in ask(keep, progress)]

    task = kept.task(name, run)
    before = sum(len(batch.rows) for batch in task.batches[: task.kept])
    note = f" ({before:,} of them kept from the interrupted run)" if before else ""
    print(f"{model}: {name}, {rows:,} rows in {time.monotonic() - began:.1f} s{note}", flush=True)
    return task


@contextlib.contextmanager
def _bar(title: str, rows: int) -> Iterator[Progress]:
    from tqdm import tqdm

    with tqdm(total=rows, desc=title, leave=False, disable=not sys.stderr.isatty()) as bar:
        yield bar.update
