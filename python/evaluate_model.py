r"""Evaluation: any number of models on the same rows, in one table with 95 % intervals.

    python python/evaluate_model.py --config recipes/tiny/eval.yaml --models base=outputs-base/tiny/model \
        sft=outputs-sft/tiny/model dpo=outputs-dpo/tiny/model --reward_model outputs-rm/tiny/model \
        --eval_dir data/eval --output_dir outputs-eval/tiny

Prints the table and leaves OUTPUT_DIR/report.md, report.json and DONE.
"""

import contextlib
import re
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from stagecraft import generation, models, run
from stagecraft.arguments import DTYPES, parse
from stagecraft.errors import UserError, run_main
from stagecraft.evaluation import metrics, report
from stagecraft.evaluation.results import Metric
from stagecraft.evaluation.sets import EvalSets, read_eval_sets

REWARD = "rm"  # the reward model's column
NAME = re.compile(r"[\w.+-]+")
EXAMPLE = "e.g. sft=outputs-sft/tiny/model"


@dataclass
class EvaluationArguments:
    """Evaluation"""

    models: list[str] = field(metadata={"help": "name=folder of each model, in the order of the columns"})
    output_dir: str = field(metadata={"help": "folder that gets report.md, report.json and DONE"})
    reward_model: str | None = field(default=None, metadata={"help": "reward model, scored on preferences"})
    eval_dir: str = field(default="data/eval", metadata={"help": "folder of the evaluation rows"})
    recipe: str | None = field(default=None, metadata={"help": "name in the report [name of OUTPUT_DIR]"})
    max_new_tokens: int = field(default=64, metadata={"help": "tokens of a reply at most"})
    batch_size: int = field(default=32, metadata={"help": "rows in a batch at most"})
    max_eval_samples: int | None = field(default=None, metadata={"help": "at most so many rows of each set"})
    torch_dtype: str = field(default="auto", metadata={"help": "dtype of the weights", "choices": DTYPES})
    seed: int = field(default=42, metadata={"help": "seed of the bootstrap and of --max_eval_samples"})
    overwrite_output_dir: bool = field(default=False, metadata={"help": "replace a finished report"})


def main() -> None:
    [args] = parse(__doc__, EvaluationArguments)
    named, sets = check(args)
    folder = Path(args.output_dir)
    with run.lock(folder), run.tee(folder / "logs" / "eval.log"):
        (folder / "DONE").unlink(missing_ok=True)  # it spoke of the report that is replaced below
        for name in sets.missing:
            print(f"skipped: {Path(args.eval_dir) / name}.jsonl is not there")
        results: list[Metric] = []
        tokens: dict[str, int] = {}
        replies: dict[str, list[str]] = {}
        for name, path in named:
            found, replies[name], tokens[name] = evaluate(name, path, sets, args)
            results += found
        if args.reward_model:
            results.append(evaluate_reward(args.reward_model, sets, args))
            named.append((REWARD, args.reward_model))
        notes = []
        if len(set(tokens.values())) > 1:
            counts = ", ".join(f"{name} {count:,}" for name, count in tokens.items())
            notes.append(
                f"the models cut the documents into different tokens ({counts}): don't compare perplexity"
            )
        recipe = args.recipe or folder.resolve().name
        asked = [(q.text, {name: replies[name][i] for name in replies}) for i, q in enumerate(sets.questions)]
        report.write(folder, recipe, named, results, asked, notes)
        print(f"\n{report.table(results)}\n")
        for note in notes:
            print(f"note: {note}")
        print(f"read:  {folder / 'report.md'} (how to read the table, and each model's answers side by side)")
        print(f"talk:  make chat RECIPE={recipe}")
        print(f"serve: make serve RECIPE={recipe}")


def evaluate(
    name: str, path: str, sets: EvalSets, args: EvaluationArguments
) -> tuple[list[Metric], list[str], int]:
    """(metrics, replies to the fixed questions, tokens of the documents) of one model."""
    model, tokenizer = generation.load(models.load_causal, path, args.torch_dtype, f"--models {name}")
    results: list[Metric] = []
    tokens = 0
    if sets.documents:
        with step(name, "perplexity", len(sets.documents)) as progress:
            losses = metrics.score_documents(model, tokenizer, sets.documents, args.batch_size, progress)
        results.append(metrics.perplexity(name, losses, args.seed))
        tokens = sum(count for _, count in losses)
    if sets.answers:
        with step(name, "answer_accuracy", len(sets.answers)) as progress:
            scored = metrics.score_answers(
                model, tokenizer, sets.answers, args.max_new_tokens, args.batch_size, progress
            )
        results += metrics.answer_accuracy(name, sets.answers, scored)
    if sets.choices:
        with step(name, "choice_accuracy", sum(len(row.options) for row in sets.choices)) as progress:
            scored = metrics.score_choices(model, tokenizer, sets.choices, args.batch_size, progress)
        results += metrics.choice_accuracy(name, sets.choices, scored)
    if sets.preferences:
        with step(name, "preference_accuracy", 2 * len(sets.preferences)) as progress:
            scored = metrics.score_preferences(model, tokenizer, sets.preferences, args.batch_size, progress)
        results.append(metrics.pair_accuracy("preference_accuracy", name, scored))
    prompts = [question.prompt for question in sets.questions]
    replies = generation.generate_replies(model, tokenizer, prompts, args.max_new_tokens, args.batch_size)
    return results, replies, tokens


def evaluate_reward(path: str, sets: EvalSets, args: EvaluationArguments) -> Metric:
    """How often the reward model scores the chosen answer higher."""
    model, tokenizer = generation.load(models.load_reward, path, args.torch_dtype, "--reward_model")
    with step(REWARD, "reward_accuracy", 2 * len(sets.preferences)) as progress:
        scored = metrics.score_preferences(
            model, tokenizer, sets.preferences, args.batch_size, progress, by_reward=True
        )
    return metrics.pair_accuracy("reward_accuracy", REWARD, scored)


def check(args: EvaluationArguments) -> tuple[list[tuple[str, str]], EvalSets]:
    """[(name, folder)] of the models and the evaluation rows. Raises UserError listing every fault at once."""
    faults: list[str] = []
    folder, sets = Path(args.output_dir), EvalSets()
    for flag in ("max_new_tokens", "batch_size", "max_eval_samples"):
        if getattr(args, flag) is not None and getattr(args, flag) < 1:
            faults.append(f"--{flag} must be at least 1, not {getattr(args, flag)}")
    if not args.models:
        faults.append(f"--models: name at least one model, {EXAMPLE}")
    named: list[tuple[str, str]] = []
    for word in args.models:
        name, _, path = word.partition("=")
        if not path or not NAME.fullmatch(name) or report.display_width(name) > 24:
            faults.append(
                f'--models "{word}": write name=folder, {EXAMPLE}; a name has up to 24 letters and digits'
            )
        elif name in dict(named) or (name == REWARD and args.reward_model):
            faults.append(f'--models "{word}": the name "{name}" is taken; give each model a name of its own')
        else:
            named.append((name, path))
            collect(faults, generation.require_usable, path, f"--models {name}")
    if args.reward_model:
        collect(faults, generation.require_usable, args.reward_model, "--reward_model", True)
    at_most = args.max_eval_samples if (args.max_eval_samples or 0) > 0 else None
    sets = collect(faults, read_eval_sets, args.eval_dir, at_most, args.seed) or sets
    if args.reward_model and "preferences" in sets.missing:
        faults.append(f"--reward_model needs {Path(args.eval_dir) / 'preferences.jsonl'}, which is not there")
    if folder.exists() and not folder.is_dir():
        faults.append(f"--output_dir {folder}: is a file; name a folder")
    if (folder / "DONE").exists() and not args.overwrite_output_dir:
        faults.append(
            f"--output_dir {folder}: holds a finished report (DONE); --overwrite_output_dir replaces it"
        )
    if faults:
        raise UserError(*faults)
    return named, sets


def collect(faults: list[str], function: Callable[..., Any], *arguments: Any) -> Any:
    """What the function returns; where it raises a UserError, the error's lines join `faults`."""
    try:
        return function(*arguments)
    except UserError as error:
        faults += str(error).splitlines()
        return None


@contextlib.contextmanager
def step(model: str, metric: str, rows: int) -> Iterator[generation.Progress]:
    """A bar on a terminal while it lasts, a line when it is done."""
    from tqdm import tqdm

    started = time.monotonic()
    on_terminal = sys.stderr.isatty()
    with tqdm(total=rows, desc=f"{model} {metric}", leave=False, disable=not on_terminal) as bar:
        yield bar.update
    print(f"{model}: {metric}, {rows:,} rows in {time.monotonic() - started:.1f} s", flush=True)


if __name__ == "__main__":
    run_main(main)
