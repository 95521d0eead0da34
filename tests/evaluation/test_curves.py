"""Curves: what a log says, restarts and broken lines included, thinned without losing its shape; replies compared."""

import json
import math
import re
import time

import pytest

import outcomes
from stagecraft.evaluation import curves, differences, drawing
from stagecraft.evaluation.differences import GONE, NEW, SAME
from stagecraft.evaluation.results import Subject


def written(folder, lines):
    path = folder / "logs" / "progress.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(line if isinstance(line, str) else json.dumps(line) + "\n" for line in lines))
    return path


def losses(*steps, scale=1.0):
    return [{"step": step, "steps": 100, "loss": step * scale, **outcomes.LINE} for step in steps]


# ---- Reading


def test_a_run_that_went_back_counts_once(tmp_path):
    # Killed after step 50, on from the checkpoint of step 30: 40 and 50 are made again, to other losses.
    lines = [*losses(10, 20, 30, 40, 50), *losses(35, scale=2), *losses(45, 60, scale=2)]
    series = curves.read(written(tmp_path, lines))["loss"]
    assert series == {10: 10, 20: 20, 30: 30, 35: 70, 45: 90, 60: 120}
    # Control: taken as they stand, the lines would hold steps that were made again.
    assert {line["step"] for line in lines} - set(series) == {40, 50}


def test_the_kits_own_restart_leaves_one_line_a_step(tmp_path):
    from stagecraft import progress

    path = written(tmp_path, [*losses(10, 20, 30, 40, 50), '{"step": 55, "lo'])
    progress.cut(path, 30, 100)
    with path.open("a") as stream:
        stream.write("".join(json.dumps(line) + "\n" for line in losses(40, 50, 60, scale=3)))
    assert curves.read(path)["loss"] == {10: 10, 20: 20, 30: 30, 40: 120, 50: 150, 60: 180}


def test_an_evaluation_at_the_same_step_is_not_a_step_back(tmp_path):
    lines = [*losses(10), {"step": 10, "eval_loss": 7.0}, *losses(20), {"step": 20, "train_loss": 9.9}]
    series = curves.read(written(tmp_path, lines))
    assert series["loss"] == {10: 10, 20: 20} and series["eval_loss"] == {10: 7.0}


@pytest.mark.parametrize(
    "broken",
    [
        '{"step": 15, "loss": 1',
        "\n",
        "null\n",
        "[]\n",
        '{"loss": 3}\n',
        '{"step": "15", "loss": 3}\n',
        '{"step": true, "loss": 3}\n',
        '{"step": -1, "loss": 3}\n',
        '{"step": 15, "loss": "x"}\n',
        '{"step": 15, "loss": null}\n',
        "\x00\x01\n",
    ],
)
def test_a_broken_line_counts_for_nothing(tmp_path, broken):
    newline = "" if broken.endswith("\n") else "\n"
    path = written(tmp_path, [*losses(10), broken, newline, *losses(20)])
    assert curves.read(path)["loss"] == {10: 10, 20: 20}


def test_where_the_loss_was_nan_the_chart_says_so(tmp_path):
    written(tmp_path, [*losses(10, 20), '{"step": 30, "loss": NaN}\n', '{"step": 40, "loss": Infinity}\n'])
    [chart] = curves.charts([Subject("sft", str(tmp_path / "model"), "folder")])
    assert chart.lines == {"training": [(10, 10), (20, 20)]} and chart.lost == 2
    assert "NaN or infinite at 2 steps" in drawing.line_chart(chart)
    written(tmp_path, losses(10, 20))
    [chart] = curves.charts([Subject("sft", str(tmp_path / "model"), "folder")])
    assert "NaN" not in drawing.line_chart(chart)


def test_each_stage_is_drawn_once_from_beside_its_model(tmp_path):
    outcomes.log(tmp_path / "outputs-sft")
    outcomes.log(tmp_path / "outputs-dpo", keys=("loss", "rewards/accuracies", "rewards/margins"))
    (tmp_path / "outputs-base" / "model").mkdir(parents=True)
    sft, dpo = tmp_path / "outputs-sft", tmp_path / "outputs-dpo"
    subjects = [
        Subject("base", str(tmp_path / "outputs-base" / "model"), "folder"),
        Subject("sft", str(sft / "model"), "folder"),
        Subject("same", f"{sft / 'model'}+{sft / 'adapter'}", "adapter"),
        Subject("dpo", f"{sft / 'model'}+{dpo / 'adapter'}", "adapter"),
        Subject("web", f"{sft / 'model'}", "server"),
        Subject("hub", "Qwen/Qwen2.5-3B", "folder"),
        Subject("long", "x" * 300 + "/model", "folder"),
        Subject("odd", "a\0b/model", "folder"),
    ]
    found = [(chart.stage, chart.title, list(chart.lines)) for chart in curves.charts(subjects)]
    assert found == [
        ("sft", "loss", ["training", "held out"]),
        ("dpo", "loss", ["training", "held out"]),
        ("dpo", "pairs right", ["training"]),
        ("dpo", "margin", ["training"]),
    ]


# ---- Drawing


def test_thousands_of_points_are_thinned_and_the_peaks_stay():
    points = [
        (float(i), math.sin(i / 900) + (9 if i == 4321 else -9 if i == 7000 else 0)) for i in range(20000)
    ]
    thin = curves.thinned(points)
    assert len(thin) <= curves.MOST_POINTS and thin == sorted(thin)
    assert {points[0], points[-1], points[4321], points[7000]} <= set(thin)
    # Control: every eightieth point would have lost both peaks.
    assert not {points[4321], points[7000]} & set(points[::83])
    assert curves.thinned(points[:50]) == points[:50]


def test_smoothing_keeps_a_slope_and_takes_the_noise_to_the_last_point():
    slope = [(float(i), 3.0 * i) for i in range(200)]
    assert all(math.isclose(a[1], b[1]) for a, b in zip(slope, curves.smoothed(slope), strict=True))
    noise = [(float(i), (-1.0) ** i) for i in range(200)]
    assert max(abs(value) for _, value in curves.smoothed(noise)) < 0.3


def test_a_chart_stays_within_its_box_and_says_what_it_shows(tmp_path):
    for keys, values in (
        ("loss", [5.0, 4.0, 4.5]),
        ("loss", [3.0]),
        ("loss", [0.0, 0.0]),
        ("margin", [-1e-7, 3]),
    ):
        lines = [{"step": 10 * i + 1, keys: value} for i, value in enumerate(values)]
        written(tmp_path, lines)
        [chart] = curves.charts([Subject("a<b", str(tmp_path / "model"), "folder")])
        svg = drawing.line_chart(chart)
        assert "a&lt;b" in svg and "a<b" not in svg and "nan" not in svg
        for path in re.findall(r' d="M([^"]+)"', svg):
            for point in path.split("L"):
                x, y = map(float, point.split())
                assert 0 <= x <= drawing.WIDTH and 0 <= y <= drawing.HEIGHT


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0, 8, [0, 2, 4, 6, 8]),
        (4.14, 5.37, [4, 4.25, 4.5, 4.75, 5, 5.25, 5.5]),
        (0, 0.013, None),
        (-2, 1e6, None),
    ],
)
def test_ticks_are_round_and_span_the_values(low, high, expected):
    found = drawing.ticks(low, high, 5)
    step = found[1] - found[0]
    assert found[0] <= low + step / 40 and found[-1] >= high - step / 40 and 4 <= len(found) <= 8
    assert expected is None or found == expected
    lead = step / 10 ** math.floor(math.log10(step * 1.0001))
    assert min(abs(lead - round_one) for round_one in (1, 2, 2.5, 5)) < 1e-6


def test_histograms_share_an_axis_and_skip_what_is_no_number():
    drawn = drawing.histograms({"a<": [1.0, 2.0, 2.0, 3.0], "b": [9.0, math.nan], "c": [math.inf]}, 3)
    assert drawn.count("<path") == 2 and "a&lt;" in drawn
    assert "median 2.000" in drawn and "median 9.000" in drawn
    places = [float(at) for at in re.findall(r'<i style="left:([\d.]+)%', drawn)]
    assert places == [12.5, 100.0]
    assert drawing.histograms({"a": []}, 3) == ""
    assert "median 1.0" in drawing.histograms({"a": [1.0, 1.0]}, 1)


# ---- Replies compared


@pytest.mark.parametrize(
    ("before", "after", "parts"),
    [
        ("the cat sat", "the dog sat", [(SAME, "the "), (GONE, "cat"), (NEW, "dog"), (SAME, " sat")]),
        ("多喝水", "多喝热水", [(SAME, "多喝"), (NEW, "热"), (SAME, "水")]),
        ("same", "same", [(SAME, "same")]),
        (
            "caterpillar eats leaves",
            "cat eats leaves",
            [(GONE, "caterpillar"), (NEW, "cat"), (SAME, " eats leaves")],
        ),
    ],
)
def test_words_and_characters_that_changed_are_marked(before, after, parts):
    assert differences.marked(before, after) == parts


@pytest.mark.parametrize(
    "before, after", [("a b c d", "a b x d e"), ("失眠的家庭护理办法", "失眠，家里这样护理"), ("x", "x y")]
)
def test_both_texts_can_be_read_from_the_parts(before, after):
    parts = differences.marked(before, after)
    assert "".join(text for kind, text in parts if kind != GONE) == after
    assert "".join(text for kind, text in parts if kind != NEW) == before


def test_texts_with_hardly_anything_alike_are_not_marked():
    assert differences.marked("湿疹有哪些症状", "The typical symptoms") is None
    assert differences.marked("", "a reply") is None
    assert differences.marked("The typical sign", "The typical symptoms") is not None  # control


def test_long_and_repetitive_replies_are_compared_in_seconds():
    texts = ["x y " * 3000, "y x x " * 2000, "的一是不了。" * 1700, "的一是不" * 2500 + "了", "a" * 10000]
    started = time.monotonic()
    for before in texts:
        for after in texts:
            parts = differences.marked(before, after)
            assert parts is None or "".join(text for kind, text in parts if kind != GONE) == after
    assert time.monotonic() - started < 20
