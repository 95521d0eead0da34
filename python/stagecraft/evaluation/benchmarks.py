"""Tasks of lm-evaluation-harness: found, fetched, run on one model, kept as a file each, and shown as a table."""

from __future__ import annotations

import contextlib
import difflib
import hashlib
import importlib.util
import json
import logging
import math
import os
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

from stagecraft import lineage
from stagecraft.console import settle_libraries
from stagecraft.errors import UserError
from stagecraft.evaluation.report import display_width
from stagecraft.files import write_json
from stagecraft.manifest import now

HUB = "https://huggingface.co"
LONGEST = 2048  # tokens of prompt and answer that a batch on a CPU is made for
LOGITS = 1 << 28  # float32 numbers that a batch's logits may have on a CPU: 1 GB


def backend_of(asked: str) -> str:
    """hf or vllm. Raises UserError where vLLM is asked for and not there."""
    if asked == "hf":
        return asked
    installed = importlib.util.find_spec("vllm") is not None
    with contextlib.suppress(OSError):
        cards = subprocess.run(["nvidia-smi", "-L"], check=False, capture_output=True, text=True).stdout
        if installed and "GPU " in cards:
            return "vllm"
    if asked == "vllm":
        raise UserError(
            f"--backend vllm: {'no CUDA device' if installed else 'vLLM is not installed'} here; use hf"
        )
    return "hf"


def prepare(tasks: list[str], include_path: str) -> dict[str, dict[str, Any]]:
    """Find every task and have its data here; of each, what tells its rows and prompts from another version's.

    Raises UserError naming every task that there is not, or whose data can't be had.
    """
    manager = _manager(include_path, tasks)
    known = manager.task_index
    faults = [
        f"TASKS: no task is called {name}{_nearest(name, known)}" for name in tasks if name not in known
    ]
    if faults:
        raise UserError(*faults)
    ours = {name for name in tasks if (path := known[name].yaml_path) and Path(include_path) in path.parents}
    offline = ours != set(tasks) and not _hub_answers()
    for name in tasks:
        try:
            manager.load([name])
        except KeyboardInterrupt:
            raise
        except (
            Exception
        ) as error:  # whatever a data set's loader may raise: it is told, not shown as a traceback
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            faults.append(f"TASKS: {name}: its data can't be loaded: {reason}")
    if faults and offline:
        faults.append(
            f"{os.environ.get('HF_ENDPOINT', HUB)} does not answer: set HF_ENDPOINT to a mirror, or fetch the data where "
            "there is a network and copy its cache (HF_HOME, ~/.cache/huggingface)"
        )
    if faults:
        raise UserError(*faults)
    return {
        name: {
            "task": name,
            "lm_eval": version("lm-eval"),
            "rows": _hash_of(include_path) if name in ours else None,
        }
        for name in tasks
    }


def _manager(include_path: str, tasks: list[str]) -> Any:
    """What knows the tasks. The harness's own 14,000 files are read, 5 s, only when not all tasks lie in the folder."""
    settle_libraries()
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    from lm_eval.tasks import TaskManager

    ours = TaskManager(include_path=include_path, include_defaults=False)
    return ours if set(tasks) <= set(ours.task_index) else TaskManager(include_path=include_path)


def _nearest(name: str, known: Any) -> str:
    found = difflib.get_close_matches(name, known, 3) or sorted(word for word in known if name in word)[:3]
    return f"; did you mean {' or '.join(found)}?" if found else "; `lm_eval ls tasks` lists them"


def _hub_answers() -> bool:
    """Whether the hub does; if not, libraries are told, or they ask six times for each file, a minute a task."""
    import requests

    if os.environ.get("HF_HUB_OFFLINE") != "1":
        with contextlib.suppress(requests.RequestException):
            requests.head(os.environ.get("HF_ENDPOINT", HUB), timeout=5)
            return True
    import datasets.config
    import huggingface_hub.constants

    os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}  # for the processes that measure
    huggingface_hub.constants.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE = True
    return False


def _hash_of(folder: str) -> str:
    found = hashlib.sha256()
    for file in sorted(Path(folder).iterdir()):
        if file.is_file():
            found.update(file.read_bytes())
    return found.hexdigest()


def head_of(model: str) -> dict[str, Any]:
    """What a result depends on beside its task: the weights and the chat template."""
    folder = Path(model)
    file = folder / "chat_template.jinja"
    if file.exists():
        template = file.read_text(encoding="utf-8")
    else:
        template = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))["chat_template"]
    sha = hashlib.sha256(
        (template if isinstance(template, str) else json.dumps(template)).encode()
    ).hexdigest()
    return {"weights": lineage.weights_in(folder), "chat_template_sha256": sha}


def file_of(folder: Path, task: str) -> Path:
    """Where a task's result lies."""
    return folder / f"{task.replace('/', '_')}.json"


def is_done(folder: Path, task: str, head: dict[str, Any]) -> bool:
    """Whether this result is there, of the same weights, template, task and settings."""
    kept = _read(folder, task)
    return all(kept.get(key) == value for key, value in head.items())


def _read(folder: Path, task: str) -> dict[str, Any]:
    try:
        return json.loads(file_of(folder, task).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}


def measure(
    folder: Path,
    name: str,
    path: str,
    tasks: list[str],
    head: dict[str, Any],
    wanted: dict[str, dict[str, Any]],
    args: Any,
) -> None:
    """Ask one model all tasks; each leaves its file when it is done. For a process of its own."""
    try:
        _no_bars_but_on_terminals()
        manager = _manager(args.include_path, tasks)
        import lm_eval

        lm = _load(path, head["backend"], args.batch_size)
        for task in tasks:
            began = time.monotonic()
            found = lm_eval.simple_evaluate(
                model=lm,
                tasks=[task],
                task_manager=manager,
                limit=head["limit"],
                num_fewshot=head["num_fewshot"],
                apply_chat_template=True,
                fewshot_as_multiturn=True,
                log_samples=False,
            )
            seconds = round(time.monotonic() - began, 1)
            write_json(
                file_of(folder, task),
                {**head, **wanted[task], "model": path, "time": now(), "seconds": seconds, **_results(found)},
            )
            print(f"{name}: {task} in {seconds:.1f} s", flush=True)
    except KeyboardInterrupt:
        sys.exit(130)


def _no_bars_but_on_terminals() -> None:
    """The harness shows bars whatever TQDM_DISABLE says. Before it is imported, in a process of its own."""
    import tqdm

    if sys.stderr.isatty():
        return
    begin = tqdm.tqdm.__init__
    tqdm.tqdm.__init__ = lambda self, *words, **named: begin(self, *words, **(named | {"disable": True}))


def _load(path: str, backend: str, batch_size: int | None) -> Any:
    from lm_eval.api.registry import get_model
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    settings: dict[str, Any] = {"pretrained": path}
    if backend == "vllm":
        settings |= {"dtype": "auto", "gpu_memory_utilization": float(os.environ.get("GPU_SHARE") or 0.9)}
        return get_model("vllm").create_from_arg_obj(settings, {"batch_size": batch_size or "auto"})
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    return get_model("hf").create_from_arg_obj(
        settings, {"batch_size": batch_size or _fitting(path, device), "device": device}
    )


def _fitting(path: str, device: str) -> int | str:
    """Rows in a batch: on a card the harness tries; on a CPU so many that all logits of long rows fit in 1 GB."""
    from transformers import AutoConfig

    if device == "cuda":
        return "auto"
    config = AutoConfig.from_pretrained(path).get_text_config()
    length = min(getattr(config, "max_position_embeddings", None) or LONGEST, LONGEST)
    return max(1, min(32, LOGITS // (length * config.vocab_size)))


def _results(found: dict[str, Any]) -> dict[str, Any]:
    """{task: {metric: {value, stderr}}} of a task, or of a group and its tasks, and how many rows each had."""
    results: dict[str, dict[str, Any]] = {}
    for task, values in found["results"].items():
        results[task] = {}
        for key, value in values.items():
            metric, _, rule = key.partition(",")
            if rule and not metric.endswith("_stderr") and isinstance(value, int | float):
                error = values.get(f"{metric}_stderr,{rule}")
                known = isinstance(error, int | float) and not math.isnan(error)
                metric = metric if rule == "none" else f"{metric}, {rule}"
                results[task][metric] = {"value": value, "stderr": error if known else None}
    rows = {task: count["effective"] for task, count in found["n-samples"].items()}
    return {"results": results, "n": rows}


def table(folder: Path, names: list[str], tasks: list[str]) -> str:
    """The tasks' results, a column a model. Of a group its own line; its tasks are in the file."""
    lines = [["task", "metric", "n", *names]]
    for task in tasks:
        kept = {name: _read(folder / name, task) for name in names}
        first = kept[names[0]]
        # A tag ("mmlu_pro_tag") is several tasks with no line of its own.
        shown = [task] if task in first["results"] else list(first["results"])
        for part in shown:
            count = first["n"].get(part, sum(first["n"].values()))
            for metric in first["results"][part]:
                cells = [_cell(kept[name]["results"].get(part, {}).get(metric)) for name in names]
                lines.append([part, metric, f"{count:,}", *cells])
    widths = [max(map(display_width, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if i < 2 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )


def _cell(found: dict[str, Any] | None) -> str:
    if found is None:
        return ""
    return f"{found['value']:.3f}" + (
        f" ±{1.96 * found['stderr']:.2f}" if found["stderr"] is not None else ""
    )
