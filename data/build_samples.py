"""Writes the sample data of every stage from the table in data/source.

    python data/build_samples.py [--output data] [--seed 0]

A condition in one language is an item with five attributes. Documents (pretrain) state all five.
For each item one attribute is held out of questions (finetune) and preferences (reward), so that evaluation
can tell a fact learned from documents alone ("fact") from a trained fact asked in a new way ("phrasing").
The same seed gives the same bytes.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
ATTRIBUTES = ("symptoms", "department", "self_care", "warning_sign", "lifestyle_tip")
DOCUMENTS_PER_ITEM = 20
MULTI_TURN_ROWS = 250
SYSTEM_SHARE = 0.15
PAIRS_PER_ITEM = {"reward": 10, "eval": 8}
EVAL_DOCUMENTS = 100
EVAL_PHRASING_ROWS = 150


@dataclass(frozen=True)
class Item:
    """A condition in one language; only documents and evaluation may state `held_out`."""

    index: int
    language: str
    name: str
    facts: dict[str, str]

    @property
    def held_out(self) -> str:
        return ATTRIBUTES[self.index % len(ATTRIBUTES)]

    @property
    def asked(self) -> list[str]:
        return [attribute for attribute in ATTRIBUTES if attribute != self.held_out]

    @property
    def eval_preferences(self) -> bool:
        """By condition and not by item, so that a condition's two languages never sit on both sides."""
        return self.index % 4 == 3


def load_items(source: Path) -> list[Item]:
    """All Chinese items in table order, then the English ones."""
    rows = [
        json.loads(line) for line in (source / "conditions.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    items = [Item(i, "zh", row["name"], {a: row[a] for a in ATTRIBUTES}) for i, row in enumerate(rows)]
    return items + [
        Item(i, "en", row["name_en"], {a: row["en"][a] for a in ATTRIBUTES})
        for i, row in enumerate(rows)
        if "en" in row
    ]


def fill(pattern: str, **slots: str) -> str:
    text = pattern.format(**slots)
    return text[0].upper() + text[1:]


def ask(item: Item, pattern: str) -> str:
    return fill(pattern, name=item.name)


class Questions:
    """Which phrasings of an (item, attribute) pair are trained and which are kept for evaluation."""

    def __init__(self, items: list[Item], wordings: dict, rng: random.Random):
        self.wordings = wordings
        self.trained: dict[tuple[int, str], list[int]] = {}
        self.kept: dict[tuple[int, str], list[int]] = {}
        self.pairs = [(number, attribute) for number, item in enumerate(items) for attribute in item.asked]
        for position, (number, attribute) in enumerate(self.pairs):
            order = list(range(len(self.phrasings(items[number], attribute))))
            rng.shuffle(order)
            # Of ten phrasings; English has few rows and less to learn the words from, so it trains on more.
            count = 9 if items[number].language == "en" else 8 if position % 3 == 0 else 7
            self.trained[number, attribute] = sorted(order[:count])
            self.kept[number, attribute] = sorted(order[count:])

    def phrasings(self, item: Item, attribute: str) -> list[str]:
        return self.wordings[item.language]["questions"][attribute]

    def unseen(self, item: Item, attribute: str) -> list[str]:
        return self.wordings[item.language]["unseen_questions"][attribute]

    def answer(self, item: Item, attribute: str, phrasing: int, value: str | None = None) -> str:
        """The pattern follows from the phrasing: otherwise no model could know which of two to expect."""
        patterns = self.wordings[item.language]["answers"][attribute]
        value = item.facts[attribute] if value is None else value
        return fill(patterns[phrasing % len(patterns)], name=item.name, value=value)


def write_document(item: Item, wordings: dict, rng: random.Random) -> str:
    """A paragraph with the five attributes in random order; the first sentence always names the condition."""
    text = wordings[item.language]
    order = list(ATTRIBUTES)
    rng.shuffle(order)
    opening = rng.choice(text["openings"])
    sentences = [fill(opening, name=item.name)] if opening else []
    for position, attribute in enumerate(order):
        patterns = text["documents"][attribute]
        choices = patterns["named"] + (patterns["pronoun"] if position else [])
        sentences.append(fill(rng.choice(choices), name=item.name, value=item.facts[attribute]))
    return text["join"].join(sentences)


def build_documents(
    items: list[Item], wordings: dict, general: list[str], seed: int
) -> tuple[list[dict], list[dict]]:
    """(training documents with the general ones mixed in, held-out documents)."""
    rng = random.Random(f"{seed}:documents")
    texts = dict.fromkeys(general)
    for item in items:
        wanted = len(texts) + DOCUMENTS_PER_ITEM
        while len(texts) < wanted:
            texts.setdefault(write_document(item, wordings, rng))
    held: dict[str, None] = {}
    order = [*range(len(items)), *rng.sample(range(len(items)), EVAL_DOCUMENTS - len(items))]
    for wanted, number in enumerate(order, start=1):
        while len(held) < wanted:
            text = write_document(items[number], wordings, rng)
            if text not in texts:
                held.setdefault(text)
    training = list(texts)
    rng.shuffle(training)
    return [{"text": text} for text in training], [{"text": text} for text in held]


def conversation(turns: list[tuple[str, str]], system: str | None) -> dict:
    messages = [{"from": "system", "value": system}] if system else []
    for question, answer in turns:
        messages += [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
    return {"conversations": messages}


def unique(rows: Iterable[dict]) -> list[dict]:
    return list({json.dumps(row, ensure_ascii=False, sort_keys=True): row for row in rows}.values())


def build_finetune(items: list[Item], questions: Questions, wordings: dict, seed: int) -> list[dict]:
    rng = random.Random(f"{seed}:finetune")
    talks: list[tuple[Item, list[tuple[str, str]]]] = []
    for number, attribute in questions.pairs:
        item = items[number]
        for phrasing in questions.trained[number, attribute]:
            question = ask(item, questions.phrasings(item, attribute)[phrasing])
            talks.append((item, [(question, questions.answer(item, attribute, phrasing))]))
    for row in range(MULTI_TURN_ROWS):
        number = row % len(items)
        item = items[number]
        first, *later = rng.sample(item.asked, rng.choice((2, 3)))
        phrasing = rng.choice(questions.trained[number, first])
        turns = [
            (ask(item, questions.phrasings(item, first)[phrasing]), questions.answer(item, first, phrasing))
        ]
        for attribute in later:
            follow_ups = wordings[item.language]["follow_ups"][attribute]
            chosen = rng.randrange(len(follow_ups))
            turns.append((follow_ups[chosen], questions.answer(item, attribute, chosen)))
        talks.append((item, turns))
    rows = []
    for item, turns in talks:
        system = rng.choice(wordings[item.language]["systems"]) if rng.random() < SYSTEM_SHARE else None
        rows.append(conversation(turns, system))
    rng.shuffle(rows)
    return unique(rows)


def build_preferences(
    items: list[Item], questions: Questions, wordings: dict, seed: int, part: str
) -> list[dict]:
    """Pairs of one part, stating only attributes the item is asked about and no other part's conditions."""
    rng = random.Random(f"{seed}:preferences:{part}")
    members = [n for n, item in enumerate(items) if item.eval_preferences == (part == "eval")]
    rows = []
    for number in members:
        item = items[number]
        text = wordings[item.language]
        patterns = text["preferences"]
        cares = [item.facts[a] for a in ("self_care", "lifestyle_tip") if a != item.held_out]
        others = [
            items[n].facts["self_care"]
            for n in members
            if n != number and items[n].language == item.language and items[n].held_out != "self_care"
        ]
        chosen, rejected = list(patterns["chosen"]), list(patterns["rejected"])
        rng.shuffle(chosen)
        rng.shuffle(rejected)
        for turn in range(PAIRS_PER_ITEM[part]):
            generic_sign, generic_place = (
                rng.choice(patterns["generic_sign"]),
                rng.choice(patterns["generic_place"]),
            )
            slots = {
                "name": item.name,
                "care": rng.choice(cares),
                "other": rng.choice(others),
                "sign": generic_sign if item.held_out == "warning_sign" else item.facts["warning_sign"],
                "place": generic_place if item.held_out == "department" else item.facts["department"],
            }
            history, question = [], ask(item, rng.choice(patterns["questions"]))
            if rng.random() < 0.15:
                attribute = rng.choice(
                    [a for a in item.asked if a in ("symptoms", "department", "lifestyle_tip")]
                )
                phrasing = rng.choice(questions.trained[number, attribute])
                first = ask(item, questions.phrasings(item, attribute)[phrasing])
                history = [[first, questions.answer(item, attribute, phrasing)]]
                question = rng.choice(patterns["follow_ups"])
            rows.append(
                {
                    "system": rng.choice(text["systems"]) if rng.random() < SYSTEM_SHARE else "",
                    "history": history,
                    "question": question,
                    "response_chosen": fill(chosen[turn % len(chosen)], **slots),
                    "response_rejected": fill(rejected[turn % len(rejected)], **slots),
                }
            )
    rng.shuffle(rows)
    return unique(rows)


def build_questions(items: list[Item], questions: Questions, seed: int) -> tuple[list[dict], list[dict]]:
    """(answers, choices): the same questions, once to be answered freely, once with four options."""
    rng = random.Random(f"{seed}:eval")
    asked = []
    for row, (number, attribute) in enumerate(rng.sample(questions.pairs, EVAL_PHRASING_ROWS)):
        item = items[number]
        if row % 10:
            phrasing = rng.choice(questions.kept[number, attribute])
            question = questions.phrasings(item, attribute)[phrasing]
        else:
            phrasing = rng.randrange(len(questions.unseen(item, attribute)))
            question = questions.unseen(item, attribute)[phrasing]
        asked.append(("phrasing", item, attribute, phrasing, question))
    for item in items:
        known = questions.phrasings(item, item.held_out)
        for phrasing in sorted(rng.sample(range(len(known)), 2)):
            asked.append(("fact", item, item.held_out, phrasing, known[phrasing]))
    answers, choices = [], []
    for split, item, attribute, phrasing, pattern in asked:
        right = item.facts[attribute]
        others = {other.facts[attribute]: None for other in items if other.language == item.language}
        values = [right, *rng.sample([value for value in others if value != right], 3)]
        rng.shuffle(values)
        question, reference = ask(item, pattern), questions.answer(item, attribute, phrasing)
        answers.append({"split": split, "question": question, "answer": right, "reference": reference})
        options = [questions.answer(item, attribute, phrasing, value) for value in values]
        choices.append({"split": split, "question": question, "options": options, "answer": reference})
    return answers, choices


def build(seed: int = 0, source: Path = HERE / "source") -> dict[str, list[dict]]:
    """Relative path -> rows, for every file of the sample data."""
    items = load_items(source)
    wordings = json.loads((source / "wordings.json").read_text(encoding="utf-8"))
    general = (source / "general.txt").read_text(encoding="utf-8").splitlines()
    questions = Questions(items, wordings, random.Random(f"{seed}:questions"))
    training, held = build_documents(items, wordings, general, seed)
    answers, choices = build_questions(items, questions, seed)
    files = {
        "pretrain/documents.jsonl": training,
        "finetune/train.jsonl": build_finetune(items, questions, wordings, seed),
        "reward/train.jsonl": build_preferences(items, questions, wordings, seed, "reward"),
        "eval/documents.jsonl": held,
        "eval/answers.jsonl": answers,
        "eval/choices.jsonl": choices,
        "eval/preferences.jsonl": build_preferences(items, questions, wordings, seed, "eval"),
        "eval/questions.jsonl": [
            {"question": q} for language in ("zh", "en") for q in wordings[language]["shown"]
        ],
    }
    # The tokenizer is trained on pretrain/ alone. Sources are looked at, not rows, so that no seed decides.
    seen = set("".join(row["text"] for row in training))
    used = set("".join(path.read_text(encoding="utf-8") for path in sorted(source.glob("*.json*"))))
    unseen = "".join(sorted(used - seen - set('{}[]"_\n')))
    if unseen:
        raise SystemExit(
            f"no training document has the characters {unseen}: add a line to source/general.txt"
        )
    return files


def main() -> None:
    parser = argparse.ArgumentParser(description="Write the sample data of every stage.")
    parser.add_argument(
        "--output", type=Path, default=HERE, help="folder that gets pretrain/ finetune/ reward/ eval/"
    )
    parser.add_argument("--seed", type=int, default=0, help="the same seed gives the same bytes")
    arguments = parser.parse_args()
    for name, rows in build(arguments.seed).items():
        path = arguments.output / name
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = [json.dumps(row, ensure_ascii=False, sort_keys=True) + "\n" for row in rows]
        path.write_bytes("".join(lines).encode("utf-8"))
        print(f"{path}  {len(rows)} rows")


if __name__ == "__main__":
    main()
