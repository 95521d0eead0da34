"""The sample data: rebuilt byte for byte, and nothing of the evaluation leaks into training."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from itertools import permutations
from pathlib import Path

import pytest

DATA = Path(__file__).resolve().parent.parent / "data"
ATTRIBUTES = ("symptoms", "department", "self_care", "warning_sign", "lifestyle_tip")


def rows(name: str) -> list[dict]:
    return [json.loads(line) for line in (DATA / name).read_text(encoding="utf-8").splitlines()]


def items() -> list[tuple[int, str, dict[str, str]]]:
    """(row number in the table, name, facts) of every condition in every language."""
    table = list(enumerate(rows("source/conditions.jsonl")))
    return [(i, row["name"], row) for i, row in table] + [
        (i, r["name_en"], r["en"]) for i, r in table if "en" in r
    ]


def held_out(number: int) -> str:
    return ATTRIBUTES[number % len(ATTRIBUTES)]


def training_texts() -> list[str]:
    """Everything a fine-tuning or preference row says, in lower case, a text a row."""
    talks = ["\n".join(m["value"] for m in row["conversations"]) for row in rows("finetune/train.jsonl")]
    fields = ("question", "response_chosen", "response_rejected")
    pairs = [
        "\n".join(
            [row["system"], *(text for turn in row["history"] for text in turn), *(row[f] for f in fields)]
        )
        for row in rows("reward/train.jsonl")
    ]
    return [text.lower() for text in talks + pairs]


def trained_turns() -> set[tuple[str, str]]:
    turns = set()
    for row in rows("finetune/train.jsonl"):
        said = [m["value"] for m in row["conversations"] if m["from"] != "system"]
        turns.update(zip(said[::2], said[1::2], strict=True))
    for row in rows("reward/train.jsonl"):
        turns.update((question, answer) for question, answer in row["history"])
    return turns


def test_rebuilding_changes_no_byte(tmp_path: Path) -> None:
    def build(folder: str, *flags: str) -> dict[str, bytes]:
        command = [sys.executable, str(DATA / "build_samples.py"), "--output", str(tmp_path / folder), *flags]
        subprocess.run(command, check=True, capture_output=True)
        return {
            p.relative_to(tmp_path / folder).as_posix(): p.read_bytes()
            for p in (tmp_path / folder).rglob("*.jsonl")
        }

    built = build("same")
    assert len(built) == 8
    assert built == {name: (DATA / name).read_bytes() for name in built}
    assert build("other", "--seed", "1") != built


def test_table_is_large_and_its_values_tell_items_apart() -> None:
    assert len(rows("source/conditions.jsonl")) >= 60
    values = [facts[a] for _, _, facts in items() for a in ATTRIBUTES if a != "department"]
    departments = {facts["department"] for _, _, facts in items()}
    for group in (values, sorted(departments), [name for _, name, _ in items()]):
        assert not [(a, b) for a, b in permutations(group, 2) if a in b]


def test_held_out_facts_are_in_documents_and_in_no_question_or_preference() -> None:
    texts = training_texts()
    documents = [row["text"].lower() for row in rows("pretrain/documents.jsonl")]
    for number, name, facts in items():
        about = [text for text in texts if name in text]
        value = facts[held_out(number)].lower()
        assert about and not [text for text in about if value in text], (name, value)
        assert sum(name in text and value in text for text in documents) >= 10, (name, value)
        if held_out(number) != "department":  # departments repeat across conditions
            assert not [text for text in texts if value in text], value
        for attribute in ATTRIBUTES:  # control: every other fact is taught
            if attribute != held_out(number):
                assert [text for text in about if facts[attribute].lower() in text], (name, attribute)


@pytest.mark.parametrize("split", ["phrasing", "fact"])
def test_no_evaluation_question_is_trained(split: str) -> None:
    turns = trained_turns()
    asked = {question for question, _ in turns}
    answers = [row for row in rows("eval/answers.jsonl") if row["split"] == split]
    choices = [row for row in rows("eval/choices.jsonl") if row["split"] == split]
    assert len(answers) >= 150 and len(choices) >= 150
    known = {answer for _, answer in turns}
    for row in answers:
        assert row["question"] not in asked and row["answer"] in row["reference"]
        assert (row["reference"] in known) == (split == "phrasing")
    for row in choices:
        assert row["question"] not in asked
        assert len(set(row["options"])) == 4 and row["answer"] in row["options"]


def test_evaluation_text_is_not_in_pretraining() -> None:
    documents = [row["text"] for row in rows("pretrain/documents.jsonl")]
    assert not {row["text"] for row in rows("eval/documents.jsonl")} & set(documents)
    everything = "\n".join(documents).lower()
    assert not [r for r in rows("eval/answers.jsonl") if r["reference"].lower() in everything]


def test_reward_and_evaluation_preferences_share_no_condition() -> None:
    def named(name: str) -> set[int]:
        fields = ("question", "response_chosen", "response_rejected", "history")
        text = json.dumps([[row[f] for f in fields] for row in rows(name)], ensure_ascii=False).lower()
        return {number for number, condition, _ in items() if condition in text}

    train, evaluation = named("reward/train.jsonl"), named("eval/preferences.jsonl")
    assert len(train) >= 40 and len(evaluation) >= 15 and not train & evaluation


@pytest.mark.parametrize("name", ["reward/train.jsonl", "eval/preferences.jsonl"])
def test_no_character_pair_or_length_gives_the_chosen_answer_away(name: str) -> None:
    pairs = rows(name)
    for language in ("zh", "en"):
        part = [row for row in pairs if row["question"].isascii() == (language == "en")]

        def shares(field: str, part: list[dict] = part) -> Counter:
            counts = Counter(
                b for row in part for b in {row[field][i : i + 2] for i in range(len(row[field]) - 1)}
            )
            return Counter({pair: count / len(part) for pair, count in counts.items()})

        chosen, rejected = shares("response_chosen"), shares("response_rejected")
        assert max(abs(chosen[pair] - rejected[pair]) for pair in chosen | rejected) < 0.6
        longer = sum(len(row["response_chosen"]) > len(row["response_rejected"]) for row in part) / len(part)
        assert 0.35 < longer < 0.65


def test_no_row_repeats() -> None:
    for path in sorted(DATA.glob("*/*.jsonl")):
        lines = path.read_text(encoding="utf-8").splitlines()
        assert len(lines) == len(set(lines)), path
