"""lm-evaluation-harness on the kit's own rows gives the kit's own accuracies, row by row."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from stagecraft import generation, models
from stagecraft.evaluation import benchmarks
from stagecraft.evaluation.sets import EvalSets, read_eval_sets
from stagecraft.evaluation.text import contains

ROOT = Path(__file__).resolve().parents[2]
SPLITS = ("phrasing", "fact")

Harness = Callable[..., dict[str, list[dict[str, Any]]]]


@pytest.fixture(scope="module")
def sets() -> EvalSets:
    return read_eval_sets(str(ROOT / "data" / "eval"))


@pytest.fixture(scope="module")
def manager() -> Any:
    return benchmarks._manager(str(ROOT / "data" / "eval"), ["stagecraft_choices"])


@pytest.fixture(scope="module")
def harness(tiny_base: Path, manager: Any) -> Harness:
    """harness(task) -> {split: what it found for each row}."""
    import lm_eval

    lm = benchmarks._load(str(tiny_base), "hf", 64)

    def ask(name: str, chat: bool = True) -> dict[str, list[dict[str, Any]]]:
        found = lm_eval.simple_evaluate(
            model=lm, tasks=[name], task_manager=manager, apply_chat_template=chat, fewshot_as_multiturn=chat
        )
        rows = {split: found["samples"][f"{name}_{split}"] for split in SPLITS}
        return {split: sorted(samples, key=lambda row: row["doc_id"]) for split, samples in rows.items()}

    return ask


@pytest.fixture(scope="module")
def ours(tiny_base: Path) -> tuple[Any, Any]:
    return generation.load(models.load_causal, str(tiny_base), "auto", "--models tiny")


def likelihoods(model: Any, tokenizer: Any, rows: list[Any]) -> list[list[float]]:
    """Nats of each option's words after the row's prompt."""
    pairs = [(row.prompt, option) for row in rows for option in row.options]
    found = iter(generation.reply_logprobs(model, tokenizer, pairs, 64))
    return [[next(found).nats for _ in row.options] for row in rows]


def best(values: list[float]) -> int:
    return max(range(len(values)), key=values.__getitem__)


def test_multiple_choice_is_judged_as_the_kit_judges_it_row_by_row(
    harness: Harness, ours: Any, sets: EvalSets
):
    found, bare = harness("stagecraft_choices"), harness("stagecraft_choices", chat=False)
    for split in SPLITS:
        rows = [row for row in sets.choices if row.split == split]
        nats = likelihoods(*ours, rows)
        picked = [
            best([n / len(o) for n, o in zip(row, r.options, strict=True)])
            for row, r in zip(nats, rows, strict=True)
        ]
        right = [float(pick == row.right) for pick, row in zip(picked, rows, strict=True)]
        assert [sample["acc_norm"] for sample in found[split]] == right
        assert [sample["acc"] for sample in found[split]] == [
            float(best(row) == r.right) for row, r in zip(nats, rows, strict=True)
        ]
        for sample, row in zip(found[split], nats, strict=True):
            *options, space = [float(answer[0]) for [answer] in sample["resps"]]
            assert [value - space for value in options] == pytest.approx(row, abs=2e-3)
            # What the harness would count by itself is something else: the prompt's line end is part of it.
            assert options != pytest.approx(row, abs=0.1)
        without = [
            float(answer[0]) for sample in bare[split] for [answer] in sample["resps"][: len(rows[0].options)]
        ]
        assert without != pytest.approx([value for row in nats for value in row], abs=0.1)  # no template
    assert sum(map(len, found.values())) == len(sets.choices)


def test_replies_are_the_kits_own_and_judged_alike(harness: Harness, ours: Any, sets: EvalSets):
    found, bare = harness("stagecraft_answers"), harness("stagecraft_answers", chat=False)
    for split in SPLITS:
        rows = [row for row in sets.answers if row.split == split]
        prompts = [row.prompt for row in rows]
        replies = [reply.text for reply in generation.generate_replies(*ours, prompts, 48, 64)]
        assert [sample["resps"][0][0].strip() for sample in found[split]] == replies
        assert [sample["answer_accuracy"] for sample in found[split]] == [
            float(contains(reply, row.answer)) for reply, row in zip(replies, rows, strict=True)
        ]
        assert [sample["resps"][0][0].strip() for sample in bare[split]] != replies
    assert sum(map(len, found.values())) == len(sets.answers)


def test_a_right_reply_counts_and_a_wrong_one_does_not(manager: Any, sets: EvalSets):
    task = manager.load(["stagecraft_answers_fact"])["tasks"]["stagecraft_answers_fact"]
    rows = [row for row in sets.answers if row.split == "fact"]
    for doc, row, other in zip(task.test_docs(), rows, rows[1:] + rows[:1], strict=True):
        assert task.process_results(doc, [f"我想：{row.answer}！"]) == {"answer_accuracy": 1.0}
        assert task.process_results(doc, [other.answer]) == {
            "answer_accuracy": float(contains(other.answer, row.answer))
        }


def test_every_row_of_the_files_belongs_to_a_task(sets: EvalSets):
    assert {row.split for row in (*sets.choices, *sets.answers)} == set(SPLITS)


def test_length_of_replies_is_the_tiny_recipes():
    import yaml

    recipe = yaml.safe_load((ROOT / "recipes/tiny/eval.yaml").read_text(encoding="utf-8"))
    common = (ROOT / "data/eval/answers.common").read_text(encoding="utf-8")
    assert f"max_gen_toks: {recipe['max_new_tokens']} " in common


def test_a_row_with_a_history_is_refused_with_its_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, manager: Any
):
    task = manager.load(["stagecraft_answers_fact"])["tasks"]["stagecraft_answers_fact"]
    load = task.config.custom_dataset
    row = {"question": "q", "answer": "a", "system": "be kind"}
    (tmp_path / "answers.jsonl").write_text(json.dumps(row) + "\n", encoding="utf-8")
    monkeypatch.setitem(load.__globals__, "HERE", tmp_path)
    with pytest.raises(Exception, match=r'answers.jsonl:1: "system" and "history" are for evaluate_model.py'):
        load("answers")


# ---- bench_evaluation.py, as make bench-eval calls it


def bench(run_script: Any, folder: Path, model: Path, *flags: str) -> Any:
    return run_script(
        "bench_evaluation.py", "--models", f"tiny={model}", "--output_dir", folder, *flags, cwd=ROOT
    )


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (
            ["--tasks", "cevl-valid,mmluu"],
            ["TASKS: no task is called cevl-valid; did you mean ceval-valid", "mmluu"],
        ),
        (
            ["--tasks", "mmlu", "--limit", "0", "--include_path", "x"],
            ["--limit must be", "--include_path x: no such"],
        ),
        (
            ["--tasks", ",", "--num_fewshot", "-1"],
            ["TASKS is empty: name benchmarks", "--num_fewshot must be"],
        ),
        (["--tasks", "stagecraft_choices,arc_easy"], ["arc_easy: its data can't be loaded", "HF_ENDPOINT"]),
    ],
)
def test_what_is_wrong_is_told_at_once(
    run_script: Any, tmp_path: Path, tiny_base: Path, flags: list[str], said: list[str]
):
    done = bench(run_script, tmp_path / "bench", tiny_base, *flags)
    assert done.returncode == 2, done.stderr
    for words in said:
        assert words in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "bench").exists()


def test_a_result_tells_its_template_and_is_not_measured_twice(
    run_script: Any, tmp_path: Path, tiny_base: Path, ours: Any
):
    flags = ["--tasks", "stagecraft_choices_fact", "--limit", "6"]
    first = bench(run_script, tmp_path, tiny_base, *flags)
    assert first.returncode == 0, first.stderr
    assert "stagecraft_choices_fact  acc_norm" in first.stdout
    file = tmp_path / "tiny" / "stagecraft_choices_fact.json"
    kept = json.loads(file.read_text(encoding="utf-8"))
    template = ours[1].chat_template
    assert kept["chat_template_sha256"] == hashlib.sha256(template.encode()).hexdigest()
    assert kept["n"] == {"stagecraft_choices_fact": 6}
    assert 0 <= kept["results"]["stagecraft_choices_fact"]["acc_norm"]["value"] <= 1
    again = bench(run_script, tmp_path, tiny_base, *flags)
    assert "is there already" in again.stdout
    assert json.loads(file.read_text(encoding="utf-8")) == kept
    other = bench(run_script, tmp_path, tiny_base, "--tasks", "stagecraft_choices_fact", "--limit", "4")
    assert "is there already" not in other.stdout
    assert json.loads(file.read_text(encoding="utf-8"))["n"] == {"stagecraft_choices_fact": 4}
