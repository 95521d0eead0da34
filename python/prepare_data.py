"""Check data before it costs anything: every row read, every fault with its file and line, what a stage would keep.

    python python/prepare_data.py check data/finetune data/reward
    python python/prepare_data.py check my_rows.jsonl --stage sft

The stage (pt, sft, rm, dpo) is told by a folder's name (pretrain, finetune, reward) unless --stage says it.
"""

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from stagecraft import corpus, rows
from stagecraft.arguments import parse
from stagecraft.errors import UserError, run_main

STAGE_OF_FOLDER = {"pretrain": "pt", "finetune": "sft", "reward": "dpo"}


@dataclass
class CheckArguments:
    """Check"""

    command: str = field(metadata={"help": "what to do", "positional": True, "choices": ["check"]})
    paths: list[str] = field(metadata={"help": "files or folders", "positional": True})
    stage: str | None = field(
        default=None, metadata={"help": "check as this stage would", "choices": list(rows.CANONICAL)}
    )


def main() -> None:
    [args] = parse(__doc__, CheckArguments)
    faults: list[str] = []
    lines = [("path", "stage", "files", "rows", "duplicates", "turns", "characters a row p50/max")]
    for path in args.paths:
        try:
            lines.append(check(path, args.stage or stage_of(path)))
        except UserError as error:
            faults.append(str(error))
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    for line in lines if len(lines) > 1 else []:
        cells = [
            cell.ljust(w) if i < 2 else cell.rjust(w)
            for i, (cell, w) in enumerate(zip(line, widths, strict=True))
        ]
        print("  ".join(cells).rstrip())
    if faults:
        raise UserError(*faults)


def stage_of(path: str) -> str:
    """The stage whose rows a path holds, by the name of the folder it is or lies in."""
    for part in reversed(Path(path).resolve().parts):
        if part in STAGE_OF_FOLDER:
            return STAGE_OF_FOLDER[part]
    raise UserError(f"{path}: which stage is it for? Add --stage {'|'.join(rows.CANONICAL)}")


def check(path: str, stage: str) -> tuple[str, ...]:
    """One line of the table. Raises UserError with every fault of the path."""
    found = rows.read_rows(path, stage, "PATH")
    copies = sum(count - 1 for count in Counter(corpus.content_hash(row) for row in found).values())
    sizes = sorted(len(rows.text_of(row)) for row in found)
    turns = sum(len(row.messages) for row in found if isinstance(row, rows.Conversation))
    return (
        path,
        stage,
        f"{len(rows.list_files(path)):,}",
        f"{len(found):,}",
        f"{copies:,}",
        f"{turns:,}" if turns else "-",
        f"{sizes[len(sizes) // 2]:,} / {sizes[-1]:,}",
    )


if __name__ == "__main__":
    run_main(main)
