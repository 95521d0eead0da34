"""The table lines up for any names, what is clear is told on one screen, report.json keeps its schema, DONE is last."""

import dataclasses
import json
import re
from pathlib import Path

import pytest

import outcomes
from stagecraft.evaluation import markdown, report, verdicts
from stagecraft.evaluation.results import Comparison, Leak, Metric, Outcome, Subject

MODELS = ["base", "sft", "基座模型"]


def some_outcome(models=MODELS, **more) -> Outcome:
    subjects = [Subject(name, f"outputs-{name}/tiny/model", "folder", "9f3a") for name in models]
    return Outcome("tiny", subjects, outcomes.some_metrics(models), **more)


def compared(**changed) -> Comparison:
    given = Comparison(
        "answer_accuracy", "phrasing", "sft", "base", 0.92, 0.873, 0.967, 0.0001, 150, "better"
    )
    return dataclasses.replace(given, **changed)


# ---- The terminal


def test_columns_line_up_on_a_terminal():
    lines = report.table(some_outcome()).split("\n")
    assert len(lines) == 5
    assert "事实" in lines[3]
    starts = []
    for line in lines[1:4]:  # the ± of the first model's cells stand under one another
        starts.append(report.display_width(line[: line.index("±")]))
    assert len(set(starts)) == 1
    # Control: counted in characters rather than columns, the row with wide characters is shifted.
    assert len({line.index("±") for line in lines[1:4]}) == 2
    assert report.display_width(lines[0]) >= report.display_width(lines[4]) - 6
    assert lines[4].startswith("reward model: right") and lines[4].count("±") == 1


@pytest.mark.parametrize("count", [1, 4, 5, 9, 17])
def test_any_number_of_models_stays_within_the_width(count):
    names = [f"model{i}" for i in range(count)]
    text = report.table(some_outcome(names))
    assert max(report.display_width(line) for line in text.splitlines()) <= report.WIDTH
    heads = " ".join(line for line in text.splitlines() if line.startswith("metric"))
    assert [name for name in heads.split() if name in [*names, "rm"]] == [*names, "rm"]
    assert text.count("0.500 ±0.08") == count


def test_models_stand_in_the_order_of_the_subjects_and_metrics_in_that_of_the_measures():
    outcome = some_outcome()
    outcome.metrics.reverse()
    lines = report.table(outcome).splitlines()
    assert lines[0].split()[4:] == [*MODELS, "rm"]
    assert [line.split("  ")[0] for line in lines[1:]] == [
        "perplexity",
        "answers: right",
        "choices: right",
        "reward model: right",
    ]
    assert report.table(some_outcome()) == report.table(outcome)


def test_nothing_measured_is_no_fault():
    outcome = Outcome("tiny", [Subject("gpt", "http://127.0.0.1:8000/v1#gpt", "server")], [])
    assert report.table(outcome) == markdown.NOTHING and report.comparisons(outcome) == ""


@pytest.mark.parametrize(
    ("value", "digits", "shown"),
    [
        (0.92, 3, "0.920"),
        (2048.47, 2, "2,048"),
        (27.826, 2, "27.83"),
        (128.44, 2, "128.4"),
        (58.41, 1, "58.4"),
        (-0.0001, 3, "0.000"),
        (-0.25, 3, "−0.250"),
        (1320.6, 0, "1,321"),
        (0.0, 1, "0.0"),
    ],
)
def test_numbers_have_four_figures_at_most(value, digits, shown):
    assert verdicts.number(value, digits) == shown


def test_display_width():
    assert report.display_width("abc") == 3
    assert report.display_width("模型，") == 6
    assert report.display_width("e\u0301") == 1


def test_a_difference_is_told_with_its_interval_p_and_verdict():
    lines = report.comparisons(some_outcome(comparisons=[compared()])).splitlines()
    assert lines == [
        "sft is better than base: 1 better",
        "  better   answers: right (phrasing) +0.920 ±0.047 p<.001",
    ]


def test_what_is_unclear_is_named_in_a_line_and_never_called_better():
    unclear = [compared(metric=name, split=None, p=0.3, verdict="unclear") for name in ("bleu", "chrf")]
    both = [compared(), compared(metric="perplexity", split=None, p=0.031, verdict="worse"), *unclear]
    first, *rest = report.comparisons(some_outcome(comparisons=both)).splitlines()
    assert first == "sft gained and lost against base: 1 better, 1 worse, 2 unclear"
    assert rest[-1] == "  unclear  answers: BLEU, answers: chrF"
    assert any(line.startswith("  worse    perplexity") and line.endswith("p=.031") for line in rest)
    alone = report.comparisons(some_outcome(comparisons=unclear)).splitlines()
    assert alone[0] == "sft is not clearly better or worse than base: 2 unclear"


def test_four_models_and_every_metric_fit_a_screen():
    text = report.comparisons(outcomes.every_metric(["base", "pt", "sft", "dpo"]))
    lines = text.splitlines()
    assert len(lines) <= 48 and max(map(report.display_width, lines)) <= report.WIDTH
    for pair in ("pt", "sft", "dpo"):
        assert len([line for line in lines if line.startswith(pair)]) == 1
    # Control: with a line for each there are more.
    assert len(outcomes.every_metric(["base", "pt", "sft", "dpo"]).comparisons) == 3 * 17


def test_columns_of_differences_line_up_with_wide_names_too():
    found = [compared(split=split) for split in ("phrasing", "事实", "a", "很长的名字")]
    lines = report.comparisons(some_outcome(comparisons=found)).splitlines()[1:]
    assert len(lines) == 2
    for line in lines:
        places = [report.display_width(line[: at.start()]) for at in re.finditer("±", line)]
        assert len(places) == 2 and places == [
            report.display_width(lines[0][: at.start()]) for at in re.finditer("±", lines[0])
        ]


# ---- report.json


def test_report_json_schema():
    leak = Leak("answers", "answers.jsonl:3", "感冒应该看哪个科？", "basics.jsonl:93", 0.83)
    outcome = some_outcome(
        ["base"],
        comparisons=[compared()],
        leaks=[leak],
        notes=["careful"],
        settings={"seed": 42, "versions": {"torch": "2.13.0"}, "folder": Path("data/eval")},
        questions=[("why?", {"base": "because"})],
    )
    value = json.loads(json.dumps(report.as_json(outcome), allow_nan=False))
    assert list(value) == [
        "schema",
        "recipe",
        "subjects",
        "metrics",
        "comparisons",
        "leaks",
        "notes",
        "settings",
        "questions",
    ]
    assert value["schema"] == 2 and value["recipe"] == "tiny" and value["notes"] == ["careful"]
    subject = {"name": "base", "path": "outputs-base/tiny/model", "kind": "folder", "template": "9f3a"}
    assert value["subjects"] == [subject]
    keys = ["metric", "split", "model", "value", "n", "low", "high", "chance"]
    assert all(list(m) == keys for m in value["metrics"])
    assert value["metrics"][0]["split"] is None and value["metrics"][0]["chance"] is None
    assert value["metrics"][2]["chance"] == 0.25
    keys = ["metric", "split", "model", "before", "difference", "low", "high", "p", "n", "verdict"]
    assert [list(c) for c in value["comparisons"]] == [keys]
    assert value["leaks"] == [dataclasses.asdict(leak)]
    assert value["settings"] == {"seed": 42, "versions": {"torch": "2.13.0"}, "folder": "data/eval"}
    assert value["questions"] == [{"question": "why?", "replies": {"base": "because"}}]


def test_written_whole_with_done_last(tmp_path, monkeypatch):
    from stagecraft import files

    order = []
    write_text = files.write_text
    monkeypatch.setattr(
        files, "write_text", lambda path, text: (order.append(path.name), write_text(path, text))
    )
    report.write(tmp_path / "new", some_outcome(questions=[("q", {"base": "a"})]))
    assert order == ["report.json", "report.md", "report.html", "DONE"]
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == sorted(order)
    assert json.loads((tmp_path / "new" / "report.json").read_text(encoding="utf-8"))["recipe"] == "tiny"


def test_the_same_outcome_gives_the_same_bytes(tmp_path):
    for folder in ("a", "b"):
        report.write(tmp_path / folder, outcomes.hard())
    for name in ("report.json", "report.md", "report.html"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


@pytest.mark.parametrize(
    "broken",
    [
        Outcome("tiny", [], [Metric("perplexity", None, "m", float("nan"), 1, 0, 1)]),
        Outcome("tiny", [], [], settings={"beta": float("inf")}),
    ],
)
def test_nan_is_never_written(tmp_path, broken):
    with pytest.raises(ValueError, match="JSON"):
        report.write(tmp_path, broken)
    assert list(tmp_path.iterdir()) == []


def test_half_a_surrogate_pair_does_not_stop_the_report(tmp_path):
    report.write(tmp_path, some_outcome(questions=[("half \ud83d", {"base": "\ud83d"})]))
    assert (tmp_path / "DONE").exists()
    value = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))
    assert value["questions"] == [{"question": "half ?", "replies": {"base": "?"}}]


# ---- report.md


def test_markdown_explains_each_metric_and_shows_answers_as_text():
    answers = {"base": "a | b\n<script>x</script>\x1b[31m *c*", "sft": ""}
    outcome = some_outcome(questions=[("why?", answers)], notes=["careful"])
    text = markdown.written(outcome)
    for name in {m.metric for m in outcome.metrics}:
        assert f"(`{name}`): " in text
    assert "medical advice" in text.replace("\n", " ") and "Note: careful." in text
    [row] = [line for line in text.splitlines() if line.startswith("| base | a")]
    assert len(re.findall(r"(?<!\\)\|", row)) == 3 and "<br>&lt;script&gt;" in row
    assert "\x1b" not in text and "\\*c\\*" in row and "| sft | (nothing) |" in text
    rows = [
        line
        for line in text.splitlines()
        if line.startswith(("| metric", "| ---:", "| perplexity", "| reward"))
    ]
    assert len({line.count("|") for line in rows}) == 1


def test_markdown_tells_comparisons_leaks_and_settings():
    leaks = [Leak("answers", f"answers.jsonl:{i}", "感冒", f"basics.jsonl:{i}", 0.83) for i in range(60)]
    settings = {"seed": 42, "versions": {"torch": "2.13.0"}, "splits": ["a", "b"]}
    text = markdown.written(some_outcome(comparisons=[compared()], leaks=leaks, settings=settings))
    assert (
        "| answers: right (phrasing) | +0.920 (0.873 to 0.967) | p &lt; .001 | 150 | better |"
        in text.splitlines()
    )
    assert "### sft is better than base: 1 better" in text
    assert "| answers.jsonl:49 | basics.jsonl:49 | 83% | 感冒 |" in text and "answers.jsonl:50" not in text
    assert "... and 10 more, all in report.json." in text
    assert "| versions.torch | 2.13.0 |" in text and "| splits | a, b |" in text
    bare = markdown.written(some_outcome())
    assert not any(word in bare for word in ("## Settings", "Left out", "worth it"))
