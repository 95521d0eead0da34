"""What the invariants share: rows of many lengths, the flags of a short run in fp32, and changes made to the kit in a run's
own process, for controls.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

WORDS = [
    "水",
    "药",
    "医院",
    "休息",
    "发烧三天",
    "fever",
    "a cough that lasts",
    "see a doctor",
    "drink",
    "rest",
]
FLAGS = [
    "--bf16",
    "false",
    "--gradient_checkpointing",
    "false",
    "--save_strategy",
    "no",
    "--report_to",
    "none",
]
FLAGS += ["--learning_rate", "1e-3", "--logging_steps", "1", "--max_steps", "4", "--lora_dropout", "0"]
EIGHT = ("--per_device_train_batch_size", 8)
FULL = ("--use_peft", "false")


def words(n: int) -> list[str]:
    """Words of row n; lengths differ by a factor of ten."""
    return [WORDS[(n * 7 + i * (n % 5 + 1)) % len(WORDS)] for i in range(2 + (n * n) % 23)]


def write(path: Path, values: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps(value, ensure_ascii=False) + "\n" for value in values]
    path.write_text("".join(lines), encoding="utf-8")


def pieces() -> None:
    from stagecraft.training import scoring

    scoring.LOGITS_AT_ONCE["cpu"] = 4000  # eight positions of 500 words


def noticed_neighbours() -> None:
    from stagecraft.training import padding

    class Joined(padding.Rows):
        def __init__(self, mask: Any) -> None:
            super().__init__(mask)
            self.starts, self.longest = self.starts[[0, -1]], self.tokens

    padding.Rows = Joined


def neighbours() -> None:
    from stagecraft.training import padding

    noticed_neighbours()
    padding.Padding._check = lambda self, *args: setattr(self, "is_checked", True)
