"""What all contenders train on: a model with random weights and rows of invented words, the same from every start."""

import json
import random
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import merge

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "python"))
SEED = 20
# Lengths of chat rows: logarithms are normal, the mean is about 130 tokens with the template, a tenth is over 230.
MEAN_LOG, SPREAD_LOG, SHORTEST, LONGEST = 4.65, 0.65, 24, 480
TURN_COST = 10  # tokens of chatml around a question and its answer
SYLLABLES = [a + b for a in ("b", "d", "f", "k", "l", "m", "n", "p", "r", "s", "t", "v") for b in "aeiou"]
SYLLABLES += [each + end for each in SYLLABLES[::4] for end in "nrs"]
WORDS = 6_000
CHAT_MODEL = {
    "vocab_size": 8192,
    "hidden_size": 256,
    "num_hidden_layers": 6,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 32,
    "intermediate_size": 768,
    "max_position_embeddings": 1024,
}


@dataclass
class Case:
    """One kind of run: a model and rows, and the numbers that all contenders get. `shape` None: the chat model."""

    shape: merge.Shape | None
    rows: int
    limit: int  # tokens of a row at most; of every row where there is a shape
    rank: int
    batch: int
    epochs: int
    learning_rate: float
    bf16: bool = False
    checkpointing: bool = False


SMALL = merge.Shape(64, 128, 2, 4, 2, 1024, tied=False, files=1)
WIDE = merge.Shape(256, 768, 2, 8, 4, 152_064, tied=True, files=1)
CASES = {
    # Two epochs of 60 steps: the first step, which is slower, is one of 120.
    "chat": Case(None, rows=240, limit=512, rank=8, batch=4, epochs=2, learning_rate=1e-3),
    "wide-vocabulary": Case(WIDE, rows=3, limit=2048, rank=8, batch=1, epochs=1, learning_rate=1e-4),
    "qwen2.5-7b": Case(
        merge.QWEN_7B, 32, 4096, rank=16, batch=1, epochs=2, learning_rate=1e-4, bf16=True, checkpointing=True
    ),
    "small": Case(SMALL, 8, 256, rank=16, batch=1, epochs=2, learning_rate=1e-4, checkpointing=True),
}


@dataclass
class Facts:
    """What was made, in tokens as the kit counts them; `supervised` is 0 for preferences."""

    model: Path
    rows_file: Path
    rows: int
    tokens: int
    supervised: int
    mean: float
    p95: int
    longest: int

    def describe(self, case: Case, stage: str) -> str:
        """One line for people."""
        unit = "pairs" if stage == "dpo" else "rows"
        shown = f", {self.supervised:,} of them supervised" if stage == "sft" else ""
        return (
            f"{self.rows} {unit} an epoch, {self.tokens:,} tokens{shown}; tokens a row: mean {self.mean:.1f}, "
            f"p95 {self.p95}, max {self.longest}; micro-batch {case.batch}, {case.epochs} epochs, LoRA r {case.rank}"
        )


def make(folder: Path, case: Case, stage: str) -> Facts:
    """Write folder/base (the model) and folder/rows/rows.jsonl; returns what they hold."""
    rng = random.Random(SEED)
    words = make_words(rng)
    model = make_chat_model(folder, words, rng) if case.shape is None else make_shape(folder, case.shape)
    from stagecraft import models
    from stagecraft.chat import templates

    tokenizer = models.load_tokenizer(str(model))
    template = templates.load_template(tokenizer, "chatml")
    if case.shape is not None:
        rows = [long_row(words, rng, case.limit, tokenizer, template) for _ in range(case.rows)]
    else:
        writer = Writer(words, tokenizer, rng)
        rows = [
            {"sft": writer.talk, "pt": writer.document, "dpo": writer.pair}[stage]() for _ in range(case.rows)
        ]
    file = folder / "rows" / "rows.jsonl"
    file.parent.mkdir()
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return count(model, file, rows, stage, tokenizer, template)


def count(model: Path, file: Path, rows: list[Any], stage: str, tokenizer: Any, template: Any) -> Facts:
    """Lengths by the kit's own rendering; a pair counts as two sequences."""
    from stagecraft.chat import templates

    if stage == "pt":
        found = [len(tokenizer(row["text"])["input_ids"]) + 1 for row in rows]  # and the end of the document
        supervised = sum(found)
    else:
        talks = [messages for row in rows for messages in talks_of(row)]
        encoded = templates.encode(template, tokenizer, talks, [None] * len(talks))
        found = [len(row.input_ids) for row in encoded]
        supervised = sum(end - start for row in encoded for start, end in row.spans) if stage == "sft" else 0
    ordered = sorted(found)
    p95 = ordered[int(0.95 * len(ordered))]
    mean = sum(found) / len(found)
    return Facts(model, file, len(rows), sum(found), supervised, mean, p95, ordered[-1])


def talks_of(row: dict[str, Any]) -> list[list[dict[str, str]]]:
    """The conversations of a row: one, or one for each answer."""
    if "messages" in row:
        return [row["messages"]]
    asked = {"role": "user", "content": row["question"]}
    answers = (row["response_chosen"], row["response_rejected"])
    return [[asked, {"role": "assistant", "content": answer}] for answer in answers]


# --- models


def make_chat_model(folder: Path, words: list[str], rng: random.Random) -> Path:
    """A Qwen3 of 6.8M parameters with a tokenizer of 8,192 tokens, by the kit's own base stage."""
    documents = folder / "documents"
    documents.mkdir()
    texts = [" ".join(words), *(" ".join(pick(words, rng) for _ in range(100)) for _ in range(500))]
    (documents / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    flags = [word for name, value in CHAT_MODEL.items() for word in (f"--{name}", str(value))]
    script = [sys.executable, str(ROOT / "python" / "build_base.py")]
    paths = ["--train_file_dir", str(documents), "--output_dir", str(folder / "base")]
    done = subprocess.run([*script, *paths, *flags], capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"the base model could not be made:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
    print(done.stdout.splitlines()[-1].split(", saved")[0], flush=True)
    return folder / "base" / "model"


def make_shape(folder: Path, shape: merge.Shape) -> Path:
    """A Qwen2 of this shape, written tensor by tensor; its tokens are bytes, the rest of the vocabulary is unused."""
    import torch

    base = folder / "base"
    base.mkdir()
    pool = torch.randn(merge.POOL, generator=torch.Generator().manual_seed(SEED)) * 0.02
    merge.write_base(base, merge.base_tensors(shape), shape.files, pool.bfloat16())
    (base / "config.json").write_text(json.dumps(merge.config_of(shape), indent=2))
    merge.write_tokenizer(base)
    size = sum(file.stat().st_size for file in base.glob("*.safetensors"))
    print(f"base: {size / 1e9:.2f} GB of random weights, a vocabulary of {shape.vocabulary:,}", flush=True)
    return base


# --- words and rows


def make_words(rng: random.Random) -> list[str]:
    """Distinct words of two to four syllables."""
    words: dict[str, None] = {}
    while len(words) < WORDS:
        words["".join(rng.choices(SYLLABLES, k=rng.choice([2, 2, 3, 3, 4])))] = None
    return list(words)


def pick(words: list[str], rng: random.Random) -> str:
    """A word; those at the front are picked more often, as in any language."""
    return words[int(len(words) ** rng.random()) - 1]


class Writer:
    """Text of so many tokens, and rows made of it."""

    def __init__(self, words: list[str], tokenizer: Any, rng: random.Random) -> None:
        self.words, self.rng = words, rng
        ids = tokenizer([f" {word}" for word in words], add_special_tokens=False)["input_ids"]
        self.cost = {word: len(each) for word, each in zip(words, ids, strict=True)}

    def text(self, tokens: int) -> str:
        """Sentences of 6 to 14 words, about so many tokens in all."""
        sentence, said, spent = self.rng.randint(6, 14), [], 2  # the first word's split and the last sign
        while True:
            word = pick(self.words, self.rng)
            if spent + self.cost[word] / 2 > tokens:
                return f"{' '.join(said)}." if said else f"{word}."
            spent, sentence = spent + self.cost[word], sentence - 1
            if sentence == 0:
                word, spent, sentence = f"{word}.", spent + 1, self.rng.randint(6, 14)
            said.append(word)

    def length(self) -> int:
        """Tokens of a row, drawn."""
        return min(LONGEST, max(SHORTEST, int(self.rng.lognormvariate(MEAN_LOG, SPREAD_LOG))))

    def talk(self) -> dict[str, Any]:
        """A conversation of one to four exchanges; answers take 35 to 80 % of its words."""
        length = self.length()
        turns = min(self.rng.choice([1, 1, 1, 2, 2, 3, 4]), length // SHORTEST)
        share, each = self.rng.uniform(0.35, 0.8), length / turns - TURN_COST
        parts = {"user": (1 - share) * each, "assistant": share * each}
        return {"messages": list(self.messages(turns, parts))}

    def messages(self, turns: int, parts: dict[str, float]) -> Iterator[dict[str, str]]:
        """So many exchanges, with so many tokens by each side."""
        for _ in range(turns):
            for role, tokens in parts.items():
                yield {"role": role, "content": self.text(round(tokens))}

    def document(self) -> dict[str, str]:
        """A text as long as a conversation."""
        return {"text": self.text(self.length())}

    def pair(self) -> dict[str, str]:
        """A question of 40 to 80 tokens and two answers; with the question each makes 150 to 250 tokens."""
        asked = self.rng.randint(40, 80)
        answers = [self.text(self.rng.randint(150, 250) - asked - TURN_COST) for _ in range(2)]
        return {
            "question": self.text(asked),
            "response_chosen": answers[0],
            "response_rejected": answers[1],
        }


def long_row(
    words: list[str], rng: random.Random, length: int, tokenizer: Any, template: Any
) -> dict[str, Any]:
    """A question of a tenth and its answer, together `length` tokens (or one less) where a token is a byte."""
    from stagecraft.chat import templates

    text = " ".join(pick(words, rng) for _ in range(length // 2))
    asked, answer = text[: length // 10], text[length // 10 :]
    talk = [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}]
    over = len(templates.encode(template, tokenizer, [talk], [None])[0].input_ids) - length
    talk[1]["content"] = answer[: len(answer) - over].rstrip() if over > 0 else answer
    return {"messages": talk}
