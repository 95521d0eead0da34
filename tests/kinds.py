"""What the tests of kinds and losses share: stages that train three steps on a handful of rows."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import running
from adapters import causal

# The server that forks stages imports these, too: else every reward model and DPO would, for seconds.
running.SERVER.set_forkserver_preload(
    [*running.LIBRARIES, "trl.trainer.dpo_trainer", "trl.trainer.reward_trainer"]
)
SCRIPTS = {
    "pt": "pretraining.py",
    "sft": "supervised_finetuning.py",
    "rm": "reward_modeling.py",
    "dpo": "dpo_training.py",
}
TRAINED = 24  # rows; the four after them are held out
SHORT = {
    "max_steps": 3,
    "per_device_train_batch_size": 4,
    "learning_rate": 1e-2,  # so that three steps are seen above bf16's rounding
    "lr_scheduler_type": "constant",
    "lora_dropout": 0,
    "logging_steps": 1,
    "save_strategy": "no",
    "gradient_checkpointing": False,
    "preprocessing_num_workers": 1,
    "report_to": "none",
    "bf16": False,
    "block_size": 32,
}


def bases_of(base: Path, folder: Path) -> dict[str, Path]:
    """The model by the dtype of its files: itself, and two copies."""
    found = {"float32": base}
    for dtype in ("bfloat16", "float16"):
        found[dtype] = folder / dtype
        shutil.copytree(base, found[dtype])
        causal(base, dtype=dtype).save_pretrained(found[dtype])
    return found


def rows_of(base: Path, folder: Path) -> dict[str, dict[str, Path]]:
    """Stage -> the flags that name its rows; the answers have several lengths."""
    pairs, chats = [], []
    for n in range(TRAINED + 4):
        question, answer = f"问题{n}，请回答{'。' * (n % 5)}", f"答案是{n * 7}。" + " Rest." * (n % 3)
        rejected = f"不知道{'，' * (n % 4)}。"
        pairs.append({"question": question, "response_chosen": answer, "response_rejected": rejected})
        turns = [("human", question), ("gpt", answer)]
        chats.append({"conversations": [{"from": who, "value": value} for who, value in turns]})
    documents = (base.parent / "documents.jsonl").read_text(encoding="utf-8").splitlines()
    rows = {"pt": [json.loads(line) for line in documents], "sft": chats, "rm": pairs, "dpo": pairs}
    return {stage: _written(folder / stage, found) for stage, found in rows.items()}


def _written(folder: Path, rows: list[dict[str, Any]]) -> dict[str, Path]:
    flags = {}
    for flag, part in (("train_file_dir", rows[:TRAINED]), ("validation_file_dir", rows[TRAINED:])):
        flags[flag] = folder / flag / "rows.jsonl"
        flags[flag].parent.mkdir(parents=True)
        lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in part]
        flags[flag].write_text("".join(lines), encoding="utf-8")
    return flags


def train(stage: str, base: Path, rows: dict[str, Path], folder: Path, **flags: Any) -> running.Ended:
    """A stage of three steps on `base`, its folder is `folder`; flags win over SHORT."""
    settings = {"model_name_or_path": base, **rows, **SHORT, **flags}
    if stage != "pt":
        del settings["block_size"]
    words: list[object] = []
    for name, value in settings.items():
        words += [f"--{name}", *(value if isinstance(value, list) else [value])]
    return running.run(SCRIPTS[stage], folder, words)


def trained(*args: Any, **flags: Any) -> Path:
    """The same, which must succeed: the stage's folder."""
    ended = train(*args, **flags)
    assert ended.status == 0, ended
    return args[3]


def history(folder: Path) -> list[dict[str, Any]]:
    """Every line of logs/progress.jsonl."""
    return [json.loads(line) for line in (folder / "logs" / "progress.jsonl").read_text().splitlines()]


def losses(folder: Path) -> list[float]:
    """The loss of every step."""
    return list(running.losses(folder).values())
