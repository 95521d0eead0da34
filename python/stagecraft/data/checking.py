"""What a stage would make of rows, as a table and as JSON: kept, left out and why, how long, how much carries loss."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from stagecraft import models
from stagecraft.arguments import (
    ON_BAD_ROWS,
    ON_LONG_ROWS,
    DataArguments,
    PreferenceDataArguments,
    PretrainingDataArguments,
    SFTDataArguments,
)
from stagecraft.chat import templates
from stagecraft.data import corpus, intake, rows
from stagecraft.errors import UserError
from stagecraft.evaluation.sets import read_eval_sets

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

STAGES = (*rows.KINDS, "eval")
STAGE_OF_FOLDER = {"pretrain": "pt", "finetune": "sft", "reward": "dpo", "memory": "memory", "eval": "eval"}
DATA_ARGUMENTS: dict[str, type[DataArguments]] = {
    "pt": PretrainingDataArguments,
    "sft": SFTDataArguments,
    "rm": PreferenceDataArguments,
    "dpo": PreferenceDataArguments,
    "memory": DataArguments,
}
HEADS = (
    "path",
    "stage",
    "files",
    "rows",
    "kept",
    "copies",
    "leaks",
    "turns",
    "p50 / p95 / max",
    "supervised",
    "an epoch",
)
# Counts that say where rows came from or ended, not why one of them was left out or shortened.
TOTALS = (
    "rows read",
    "validation rows read",
    "duplicates kept in training",
    "leaks into validation removed",
    "training rows",
    "validation rows",
    "training documents",
    "validation documents",
    "tokens an epoch",
    "supervised",
    intake.THOUGHTS,
)


@dataclass
class CheckArguments:
    """Check"""

    paths: list[str] = field(metadata={"help": "[STAGE=]PATH: files or folders", "positional": True})
    stage: str | None = field(
        default=None,
        metadata={
            "help": "whose rows they are; unset: told by STAGE= or the folder",
            "choices": STAGES,
        },
    )
    tokenizer: str | None = field(
        default=None, metadata={"help": "model folder whose tokenizer counts tokens; unset: characters"}
    )
    json: bool = field(default=False, metadata={"help": "print one JSON array instead of the table"})
    validation_file_dir: str | None = field(default=None, metadata={"help": "as the stage takes it"})
    template_name: str | None = field(default=None, metadata={"help": "as the stage takes it"})
    block_size: int | None = field(default=None, metadata={"help": "as pt takes it"})
    model_max_length: int | None = field(default=None, metadata={"help": "as sft takes it"})
    max_source_length: int | None = field(default=None, metadata={"help": "as rm and dpo take it"})
    max_target_length: int | None = field(default=None, metadata={"help": "as rm and dpo take it"})
    on_long_rows: str | None = field(
        default=None, metadata={"help": "as sft, rm and dpo take it", "choices": ON_LONG_ROWS}
    )
    on_bad_rows: str = field(
        default="error",
        metadata={"help": "list bad rows and fail, or count and leave out", "choices": ON_BAD_ROWS},
    )


@dataclass
class Finding:
    """One line of the table. Lengths are tokens with a tokenizer, else characters."""

    path: str
    stage: str
    files: int
    rows: int
    kept: int
    duplicates: int = 0
    leaks: int = 0
    turns: int = 0
    unit: str = "characters"
    length: dict[str, int] = field(default_factory=dict)  # p50, p95, max of a row
    reasons: dict[str, int] = field(default_factory=dict)  # why rows were left out or shortened
    supervised_share: float | None = None
    tokens_an_epoch: int | None = None

    def cells(self) -> tuple[str, ...]:
        """What stands below HEADS."""
        length = " / ".join(f"{number:,}" for number in self.length.values())
        share, tokens = self.supervised_share, self.tokens_an_epoch
        counts = [f"{n:,}" for n in (self.files, self.rows, self.kept, self.duplicates, self.leaks)]
        return (
            *(self.path, self.stage, *counts, f"{self.turns:,}" if self.turns else "-"),
            f"{length} {self.unit}" if length else "-",
            "-" if share is None else f"{share:.1%}",
            "-" if tokens is None else f"{tokens:,} tokens",
        )


def stage_of(word: str) -> tuple[str | None, str]:
    """(stage or None, path): "sft=rows.jsonl" says the stage, else the nearest folder that a path is or lies in does."""
    named, _, path = word.partition("=")
    if path and named in STAGES:
        return named, path
    parts = reversed(Path(word).resolve().parts)
    return next((STAGE_OF_FOLDER[part] for part in parts if part in STAGE_OF_FOLDER), None), word


def check_path(path: str, stage: str | None, args: CheckArguments) -> Finding:
    """What a stage would make of a path, with the flags that this stage has. Raises UserError."""
    if stage is None:
        raise UserError(f"{path}: which stage is it for? Write STAGE={path}, STAGE being {'|'.join(STAGES)}")
    if stage == "eval":
        return check_eval(path)
    names = {f.name for f in dataclasses.fields(DATA_ARGUMENTS[stage])}
    given = {name: value for name, value in vars(args).items() if name in names and value is not None}
    tokenizer = models.open_tokenizer(args.tokenizer) if args.tokenizer else None
    return check(DATA_ARGUMENTS[stage](train_file_dir=path, **given), stage, tokenizer)


def check(data: DataArguments, stage: str, tokenizer: PreTrainedTokenizerBase | None) -> Finding:
    """What a stage (pt, sft, rm, dpo or memory) would make of the rows; with a tokenizer also how long they are.

    Raises UserError with every fault of the rows.
    """
    choice = corpus.choose(data, stage, "PATH")
    counts = {name: number for name, number in choice.counts.items() if number}
    characters = choice.found.characters
    files = len(choice.found.files) + (len(choice.held.files) if choice.held else 0)
    finding = Finding(
        path=data.train_file_dir,
        stage=stage,
        files=files,
        rows=counts["rows read"] + counts.get("validation rows read", 0),
        kept=sum(int(np.count_nonzero(parts)) for _, parts in choice.surveys),
        duplicates=counts.get("duplicates kept in training", 0),
        leaks=counts.get("leaks into validation removed", 0),
        turns=choice.found.turns,
    )
    if tokenizer is None or stage == "memory":
        marks = {"p50": 0.5, "p95": 0.95, "max": 1.0}
        if len(characters):
            finding.length = {k: int(np.quantile(characters, q, method="higher")) for k, q in marks.items()}
    else:
        loaded = load(data, stage, tokenizer)
        counts = loaded.counts
        unit = "documents" if stage == "pt" else "rows"
        finding.kept = counts[f"training {unit}"] + counts.get(f"validation {unit}", 0)
        finding.unit, finding.length = "tokens", loaded.lengths
        finding.tokens_an_epoch = counts["tokens an epoch"]
        if "supervised" in counts:
            finding.supervised_share = counts["supervised"] / counts["tokens an epoch"]
    finding.reasons = {name: number for name, number in counts.items() if name not in TOTALS}
    return finding


def load(data: DataArguments, stage: str, tokenizer: PreTrainedTokenizerBase) -> corpus.Corpus:
    """The corpus of pt, sft, rm or dpo, as the stage itself loads it."""
    if stage == "pt":
        return corpus.load_documents(data, tokenizer)
    template = templates.load_template(tokenizer, data.template_name)
    if stage == "sft":
        return corpus.load_conversations(data, tokenizer, template)
    return corpus.load_preferences(data, tokenizer, template, stage)


def check_eval(path: str) -> Finding:
    """The rows of an evaluation folder, which are read by set."""
    sets = read_eval_sets(path)
    found = [sets.documents, sets.answers, sets.choices, sets.preferences, sets.questions]
    total = sum(map(len, found))
    return Finding(path, "eval", sum(map(bool, found)), total, total)


def table(findings: list[Finding]) -> str:
    """The findings below one another, then why rows were left out or shortened."""
    lines = [HEADS, *(finding.cells() for finding in findings)]
    shown = [i for i in range(len(HEADS)) if i < 5 or any(line[i] not in ("-", "0") for line in lines[1:])]
    widths = {i: max(len(line[i]) for line in lines) for i in shown}
    shown_lines = [
        "  ".join(line[i].ljust(widths[i]) if i < 2 else line[i].rjust(widths[i]) for i in shown).rstrip()
        for line in lines
    ]
    for finding in findings:
        if finding.reasons:
            said = ", ".join(f"{name} {number:,}" for name, number in finding.reasons.items())
            shown_lines.append(f"{finding.path} ({finding.stage}): {said}")
    return "\n".join(shown_lines)
