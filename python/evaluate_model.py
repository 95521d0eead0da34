r"""Evaluation: any number of models on the same rows, each number with a 95 % interval and a test against its neighbour.

    python python/evaluate_model.py --config recipes/tiny/eval.yaml --models base=outputs-base/tiny/model \
        sft=outputs-sft/tiny/model dpo=outputs-dpo/tiny/model --reward_model outputs-rm/tiny/model \
        --eval_dir data/eval --output_dir outputs-eval/tiny
    python python/evaluate_model.py --from_config evaluation.yaml

A model is a complete folder, BASE+ADAPTER, an adapter's folder, or the URL of an OpenAI-compatible server (URL#MODEL).
Prints the table and leaves OUTPUT_DIR/report.html, report.md, report.json, answers.jsonl and DONE. An evaluation that
was interrupted goes on with the same command.
"""

import sys
from dataclasses import dataclass, field
from pathlib import Path

from stagecraft import generation, run
from stagecraft.arguments import DTYPES, parse
from stagecraft.errors import Stopped, UserError, run_main
from stagecraft.evaluation import from_config, kept, leaks, metrics, outcomes, report, scoring
from stagecraft.evaluation.engines import ENGINES, Settings, choose_engine
from stagecraft.evaluation.results import Subject
from stagecraft.evaluation.sets import EvalSets, read_eval_sets
from stagecraft.evaluation.subjects import REWARD, Place, collect, read_places
from stagecraft.interrupts import Interrupted, Interrupts

RECORDED = ("eval_dir", "max_eval_samples", "max_new_tokens", "batch_size", "torch_dtype", "beta", "seed")


@dataclass
class EvaluationArguments:
    """Evaluation"""

    models: list[str] = field(
        metadata={
            "help": "name=PLACE of each model, in the order of the columns: a folder, BASE+ADAPTER, a URL"
        }
    )
    output_dir: str = field(metadata={"help": "folder that gets the report, answers.jsonl and DONE"})
    from_config: str | None = field(
        default=None,
        metadata={"help": "YAML of flags whose models have model_path, is_lora, base_model, merge_lora"},
    )
    merge_lora: list[str] = field(
        default_factory=list, metadata={"help": "names of models whose adapter is merged in memory first"}
    )
    reward_model: str | None = field(
        default=None,
        metadata={"help": "reward model, scored on preferences and judge of the models' replies"},
    )
    eval_dir: str = field(default="data/eval", metadata={"help": "folder of the evaluation rows"})
    train_data: list[str] = field(
        default_factory=list,
        metadata={"help": "stage=folder of training rows (pt sft rm dpo): rows found there are left out"},
    )
    recipe: str | None = field(default=None, metadata={"help": "name in the report [name of OUTPUT_DIR]"})
    max_new_tokens: int = field(default=64, metadata={"help": "tokens of a reply at most"})
    batch_size: int = field(default=32, metadata={"help": "rows in a batch at most"})
    max_eval_samples: int | None = field(default=None, metadata={"help": "at most so many rows of each set"})
    torch_dtype: str = field(default="auto", metadata={"help": "dtype of the weights", "choices": DTYPES})
    engine: str = field(
        default="auto",
        metadata={"help": "who writes replies; auto: vLLM where it and CUDA are there", "choices": ENGINES},
    )
    beta: float = field(default=metrics.BETA, metadata={"help": "DPO's beta, for the implicit margin"})
    seed: int = field(default=42, metadata={"help": "seed of the bootstrap and of --max_eval_samples"})
    overwrite_output_dir: bool = field(default=False, metadata={"help": "replace a finished report"})


def main() -> None:
    argv = from_config.as_config(sys.argv[1:])
    [args] = parse(__doc__, EvaluationArguments, argv=argv, translate=from_config.translated)
    places, sets, folders, settings = check(args)
    folder = Path(args.output_dir)
    with run.lock(folder), run.tee(folder / "logs" / "eval.log"):
        try:
            with Interrupts():
                (folder / "DONE").unlink(missing_ok=True)  # it spoke of the report that is replaced
                evaluate(places, sets, folders, settings, args)
        except Interrupted as signal:
            line = (
                f"eval: stopped by {signal}; what was measured is kept, the same command goes on from there"
            )
            raise Stopped(line, status=run.INTERRUPTED) from None
        except UserError:
            raise
        except Exception as error:
            raise explained(error, args) from error


def evaluate(
    places: list[Place],
    sets: EvalSets,
    folders: dict[str, str],
    settings: Settings,
    args: EvaluationArguments,
) -> None:
    """Measure every model on the rows that training has not seen, and report."""
    folder, versions = Path(args.output_dir), outcomes.versions()
    for name in sets.missing:
        print(f"skipped: {Path(args.eval_dir) / name}.jsonl is not there")
    seen = outcomes.find_leaks(sets, folders)
    sets = leaks.without(sets, seen)
    measuring = scoring.Measuring(sets, settings, folder, versions)
    scores = {place.name: measuring.scores_of(place, args.reward_model is not None) for place in places}
    judged = measuring.judge(args.reward_model, scores) if args.reward_model else None
    outcome = outcomes.built(args.recipe or folder.resolve().name, places, sets, scores, args.beta, args.seed)
    outcome.leaks = seen
    if judged:
        outcome.subjects.append(Subject(REWARD, args.reward_model, "reward"))
        outcome.metrics.append(metrics.reward_accuracy(REWARD, judged))
    outcome.settings = {name: getattr(args, name) for name in RECORDED} | {
        "engine": settings.engine,
        "versions": versions,
        "signatures": metrics.signatures(sets),
    }
    outcomes.write_answers(folder / "answers.jsonl", sets, scores)
    report.write(folder, outcome)
    kept.clear(folder)
    print(f"\n{report.table(outcome)}\n")
    if outcome.comparisons:
        print(f"{report.comparisons(outcome)}\n")
    for note in outcome.notes:
        print(f"note: {note}")
    print(f"read:  {folder / 'report.html'} or report.md; every reply: {folder / 'answers.jsonl'}")
    print(f"talk:  make chat RECIPE={outcome.recipe}")
    print(f"serve: make serve RECIPE={outcome.recipe}")


def explained(error: Exception, args: EvaluationArguments) -> Exception:
    """A line to mend it by, where that is known of an error from below."""
    from stagecraft.watching import is_full_disk, is_out_of_memory

    if is_out_of_memory(error):
        return UserError(
            f"out of memory with --batch_size {args.batch_size} and --max_new_tokens {args.max_new_tokens}: lower one of "
            "them, or give --torch_dtype bfloat16"
        )
    if is_full_disk(error, Path(args.output_dir)):
        return UserError(
            f"--output_dir {args.output_dir}: the disk is full; make room, then the same command goes on"
        )
    return error


def check(args: EvaluationArguments) -> tuple[list[Place], EvalSets, dict[str, str], Settings]:
    """Places, rows, folders of training data, settings. Raises UserError listing every fault at once."""
    faults: list[str] = []
    folder = Path(args.output_dir)
    for flag in ("max_new_tokens", "batch_size", "max_eval_samples"):
        if getattr(args, flag) is not None and getattr(args, flag) < 1:
            faults.append(f"--{flag} must be at least 1, not {getattr(args, flag)}")
    if not 0 < args.beta < float("inf"):
        faults.append(f"--beta must be above 0, not {args.beta}")
    if args.from_config:
        faults.append("from_config stands in a file: give it on the command line")
    places = read_places(args.models, args.merge_lora, REWARD if args.reward_model else None, faults)
    if args.reward_model:
        collect(faults, generation.require_usable, args.reward_model, "--reward_model", True)
    engine = collect(faults, choose_engine, args.engine)
    at_most = args.max_eval_samples if (args.max_eval_samples or 0) > 0 else None
    sets = collect(faults, read_eval_sets, args.eval_dir, at_most, args.seed) or EvalSets()
    if args.reward_model and "preferences" in sets.missing:
        faults.append(f"--reward_model needs {Path(args.eval_dir) / 'preferences.jsonl'}, which is not there")
    folders = dict(word.partition("=")[::2] for word in args.train_data if "=" in word)
    faults += [f'--train_data "{word}": write stage=folder' for word in args.train_data if "=" not in word]
    collect(faults, leaks.weigh, folders)
    if folder.exists() and not folder.is_dir():
        faults.append(f"--output_dir {folder}: is a file; name a folder")
    if (folder / "DONE").exists() and not args.overwrite_output_dir:
        faults.append(
            f"--output_dir {folder}: holds a finished report (DONE); --overwrite_output_dir replaces it"
        )
    if faults:
        raise UserError(*faults)
    settings = Settings(args.max_new_tokens, args.batch_size, args.torch_dtype, engine, args.seed)
    return places, sets, folders, settings


if __name__ == "__main__":
    run_main(main)
