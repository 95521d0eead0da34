"""The table lines up for any names, report.json keeps its schema, and DONE comes last."""

import json
import re

import pytest

from stagecraft.evaluation import report
from stagecraft.evaluation.results import Metric

MODELS = ["base", "sft", "基座模型"]


def some_metrics(models):
    metrics = []
    for i, name in enumerate(models):
        metrics.append(
            Metric("perplexity", None, name, 1445.2 / 10 ** (2 * i), 100, 1400.0 / 10 ** (2 * i), 1500.0)
        )
        metrics.append(Metric("answer_accuracy", "phrasing", name, 0.5, 150, 0.42, 0.58))
        metrics.append(Metric("choice_accuracy", "事实", name, 0.25, 156, 0.2, 0.3, 0.25))
    return [*metrics, Metric("reward_accuracy", None, "rm", 0.9, 152, 0.84, 0.94, 0.5)]


def test_columns_line_up_on_a_terminal():
    lines = report.table(some_metrics(MODELS)).split("\n")
    assert len(lines) == 5
    first, last = lines[3], lines[4]
    assert "事实" in first
    starts = []
    for line in lines[1:4]:  # the ± of the first model's cells stand under one another
        starts.append(report.display_width(line[: line.index("±")]))
    assert len(set(starts)) == 1
    # Control: counted in characters rather than columns, the row with wide characters is shifted.
    assert len({line.index("±") for line in lines[1:4]}) == 2
    assert report.display_width(lines[0]) >= report.display_width(last) - 6
    assert last.startswith("reward_accuracy") and last.count("±") == 1


@pytest.mark.parametrize("count", [1, 4, 5, 9, 17])
def test_any_number_of_models_stays_within_the_width(count):
    names = [f"model{i}" for i in range(count)]
    text = report.table(some_metrics(names))
    assert max(report.display_width(line) for line in text.splitlines()) <= report.WIDTH
    heads = " ".join(line for line in text.splitlines() if line.startswith("metric"))
    assert [name for name in heads.split() if name in [*names, "rm"]] == [*names, "rm"]
    assert text.count("0.500 ±0.08") == count


def test_display_width():
    assert report.display_width("abc") == 3
    assert report.display_width("模型，") == 6
    assert report.display_width("e\u0301") == 1


def test_report_json_schema():
    models = [("base", "outputs-base/tiny/model"), ("rm", "outputs-rm/tiny/model")]
    value = report.as_json("tiny", models, some_metrics(["base"]))
    assert list(value) == ["schema", "recipe", "models", "metrics"]
    assert value["schema"] == 1 and value["recipe"] == "tiny"
    assert value["models"][0] == {"name": "base", "path": "outputs-base/tiny/model"}
    keys = ["metric", "split", "model", "value", "n", "low", "high", "chance"]
    assert all(list(m) == keys for m in value["metrics"])
    assert value["metrics"][0]["split"] is None and value["metrics"][0]["chance"] is None
    assert value["metrics"][2]["chance"] == 0.25


def test_written_whole_with_done_last(tmp_path, monkeypatch):
    from stagecraft import files

    order = []
    write_text = files.write_text
    monkeypatch.setattr(
        files, "write_text", lambda path, text: (order.append(path.name), write_text(path, text))
    )
    report.write(tmp_path / "new", "tiny", [("base", "b")], some_metrics(["base"]), [("q", {"base": "a"})])
    assert order == ["report.json", "report.md", "DONE"]
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == ["DONE", "report.json", "report.md"]
    assert json.loads((tmp_path / "new" / "report.json").read_text(encoding="utf-8"))["recipe"] == "tiny"


def test_nan_is_never_written(tmp_path):
    with pytest.raises(ValueError, match="JSON"):
        report.write(tmp_path, "tiny", [], [Metric("perplexity", None, "m", float("nan"), 1, 0, 1)], [])
    assert not (tmp_path / "DONE").exists()


def test_markdown_explains_each_metric_and_shows_answers_as_text():
    answers = {"base": "a | b\n<script>x</script>\x1b[31m *c*", "sft": ""}
    text = report.markdown("tiny", [("base", "b")], some_metrics(MODELS), [("why?", answers)], ["careful"])
    for name in {m.metric for m in some_metrics(MODELS)}:
        assert f"- **{name}**: " in text
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
