"""The kit's multiple choice and questions as tasks of lm-evaluation-harness; the YAML files here name these classes.

Rows, prompts and verdicts are those of python/evaluate_model.py, and so are the accuracies.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lm_eval.api.instance import Instance
from lm_eval.api.task import ConfigurableTask

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1] / "python"))

from stagecraft import generation  # noqa: E402
from stagecraft.errors import UserError, first_faults  # noqa: E402
from stagecraft.evaluation.sets import Choice, Question, read_eval_sets  # noqa: E402
from stagecraft.evaluation.text import contains  # noqa: E402

if TYPE_CHECKING:
    from datasets import DatasetDict


def load(name: str, split: str | None = None, **_: Any) -> DatasetDict:
    """The rows of one file of this folder, of one split or all. Raises UserError, with all faults as file:line."""
    from datasets import Dataset, DatasetDict

    found = [row for row in getattr(read_eval_sets(str(HERE)), name) if split in (None, row.split)]
    long = [row.where for row in found if len(row.prompt) > 1]
    if long:
        raise UserError(
            *first_faults(
                [
                    f'{where}: "system" and "history" are for evaluate_model.py; these tasks ask one question'
                    for where in long
                ],
                len(long),
            )
        )
    if not found:
        raise UserError(f'{HERE / name}.jsonl: no row there has "split": "{split}"')
    return DatasetDict({"test": Dataset.from_list([_flat(row) for row in found])})


def _flat(row: Question | Choice) -> dict[str, Any]:
    told = {"options": row.options, "right": row.right} if isinstance(row, Choice) else {"answer": row.answer}
    return {"question": row.prompt[-1]["content"], **told}


class _Task(ConfigurableTask):
    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__(config={key: value for key, value in config.items() if key != "class"})


class Choices(_Task):
    """Options by their likelihood a character (acc_norm), or as a whole (acc).

    The harness moves white space from the end of a prompt ("assistant\\n") to each option, so that its
    likelihood joins theirs, and does not shrink with their length. It is asked for once more, alone, and taken out.
    """

    def construct_requests(self, doc: dict[str, Any], ctx: str, **kwargs: Any) -> list[Instance]:
        found = super().construct_requests(doc, ctx, **kwargs)
        words = ctx.rstrip()
        if words == ctx:
            return found
        kept = {key: kwargs[key] for key in ("metadata",) if key in kwargs}
        alone = Instance("loglikelihood", doc, (words, ctx[len(words) :]), idx=len(found), **kept)
        return [*found, alone]

    def process_results(self, doc: dict[str, Any], results: list[tuple[float, bool]]) -> dict[str, float]:
        options = results[: len(doc["options"])]
        if len(results) > len(options):
            options = [(nats - results[-1][0], greedy) for nats, greedy in options]
        return super().process_results(doc, options)


class Answers(_Task):
    """Greedy replies that end where evaluate_model.py ends them; right when they hold the key phrase."""

    def construct_requests(self, doc: dict[str, Any], ctx: str, **kwargs: Any) -> Instance:
        lm = getattr(kwargs.get("chat_template"), "__self__", None)
        found = super().construct_requests(doc, ctx, **kwargs)
        # Base models know no end of turn of themselves. As ids: the harness cuts texts without their special tokens.
        if lm is not None and hasattr(lm, "model"):
            prompt, settings = found.arguments
            name, ids = (
                ("eos_token_id", generation.stop_ids(lm.model, lm.tokenizer))
                if hasattr(lm.model, "generation_config")
                else ("stop_token_ids", generation.end_of_turn(lm.tokenizer))  # vLLM's
            )
            found.arguments = (prompt, settings | {name: ids})
        return found


def contained(doc: dict[str, Any], results: list[str]) -> dict[str, float]:
    """Whether the reply holds the key phrase, as answer_accuracy counts it."""
    return {"answer_accuracy": float(contains(results[0], doc["answer"]))}
