r"""Public benchmarks by lm-evaluation-harness: any number of models, each asked through its chat template.

    python python/bench_evaluation.py --models base=outputs-base/tiny/model sft=outputs-sft/tiny/model \
        --tasks ceval-valid,cmmlu,mmlu --output_dir outputs-eval/tiny/bench

Prints a table and leaves OUTPUT_DIR/NAME/TASK.json. What is there already, of the same weights, template and settings,
is not measured again: the same command goes on after an interruption.
"""

import multiprocessing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from stagecraft import naming
from stagecraft.arguments import parse
from stagecraft.errors import Stopped, UserError, run_main
from stagecraft.evaluation import benchmarks


@dataclass
class BenchArguments:
    """Benchmarks"""

    output_dir: str = field(metadata={"help": "folder that gets NAME/TASK.json"})
    tasks: list[str] = field(
        default_factory=list, metadata={"help": "names of the harness's tasks and groups, commas between"}
    )
    models: list[str] | None = field(
        default=None,
        metadata={
            "help": "stages, folders or name=folder, in the order of the columns; unset: the newest stage"
        },
    )
    recipe: str = field(default_factory=naming.default_recipe, metadata={"help": "whose stages are meant"})
    include_path: str = field(default="data/eval", metadata={"help": "folder with tasks of your own"})
    backend: str = field(
        default="auto",
        metadata={
            "help": "what runs the model [vllm where it and CUDA are]",
            "choices": ("auto", "hf", "vllm"),
        },
    )
    limit: int | None = field(default=None, metadata={"help": "at most so many rows of each task"})
    num_fewshot: int | None = field(
        default=None, metadata={"help": "examples in the prompt [the task's own number]"}
    )
    batch_size: int | None = field(default=None, metadata={"help": "rows in a batch [what memory allows]"})


def main() -> None:
    [args] = parse(__doc__, BenchArguments)
    models, tasks = check(args)
    backend = benchmarks.backend_of(args.backend)
    wanted = benchmarks.prepare(tasks, args.include_path)
    asked = {"backend": backend, "limit": args.limit, "num_fewshot": args.num_fewshot}
    folder = Path(args.output_dir)
    todo: dict[str, list[str]] = {}
    heads: dict[str, dict[str, Any]] = {}
    for name, path in models:
        heads[name] = benchmarks.head_of(path) | asked
        todo[name] = [
            task for task in tasks if not benchmarks.is_done(folder / name, task, heads[name] | wanted[task])
        ]
        for task in set(tasks) - set(todo[name]):
            print(f"{name}: {task} is there already ({benchmarks.file_of(folder / name, task)})")
    try:
        for name, path in models:
            if todo[name]:
                in_own_process(folder / name, name, path, todo[name], heads[name], wanted, args)
    except KeyboardInterrupt:
        left = [
            f"{name} {task}"
            for name in todo
            for task in todo[name]
            if not benchmarks.is_done(folder / name, task, heads[name] | wanted[task])
        ]
        raise Stopped(
            f"interrupted; left: {', '.join(left)}. What is measured stays, and the same command goes on",
            status=130,
        ) from None
    print(f"\n{benchmarks.table(folder, [name for name, _ in models], tasks)}\n")
    print(f"in {folder}/NAME/TASK.json, with the hash of the chat template; ± is half a 95 % interval")


def in_own_process(folder: Path, name: str, *what: Any) -> None:
    """benchmarks.measure in a process that gives its memory back when it ends, a card's as well."""
    process = multiprocessing.get_context("spawn").Process(
        target=benchmarks.measure, args=(folder, name, *what)
    )
    process.start()
    try:
        process.join()
    except KeyboardInterrupt:
        process.join(5)  # Ctrl-C reaches both, and it ends by itself
        process.terminate()
        process.join()
        raise
    if process.exitcode in (130, -2):
        raise KeyboardInterrupt
    if process.exitcode:
        raise Stopped(f"{name}: ended with status {process.exitcode} (see above); what is measured stays")


def check(args: BenchArguments) -> tuple[list[tuple[str, str]], list[str]]:
    """[(name, folder)] and the tasks' names. Raises UserError listing every fault that shows without a library."""
    faults: list[str] = []
    for flag in ("limit", "batch_size"):
        if getattr(args, flag) is not None and getattr(args, flag) < 1:
            faults.append(f"--{flag} must be at least 1, not {getattr(args, flag)}")
    if (args.num_fewshot or 0) < 0:
        faults.append(f"--num_fewshot must be at least 0, not {args.num_fewshot}")
    tasks = list(dict.fromkeys(name for word in args.tasks for name in word.split(",") if name))
    if not tasks:
        faults.append(
            "TASKS is empty: name benchmarks, e.g. TASKS=ceval-valid,cmmlu,mmlu (lm_eval ls tasks lists them)"
        )
    if not Path(args.include_path).is_dir():
        faults.append(f"--include_path {args.include_path}: no such folder")
    models: list[tuple[str, str]] = []
    try:
        for place in naming.find_all(args.models or naming.newest(args.recipe, 1), args.recipe, "--models"):
            if place.kind == "folder":
                models.append((place.name, place.path))
            else:
                faults.append(f"--models {place.path}: the harness wants a complete model's folder")
    except UserError as error:
        faults += str(error).splitlines()
    if faults:
        raise UserError(*faults)
    return models, tasks


if __name__ == "__main__":
    run_main(main)
