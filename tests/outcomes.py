"""Evaluations for the tests of what is made of them: an ordinary one, and one that holds all that can go wrong."""

from __future__ import annotations

import json
import random
from pathlib import Path

from stagecraft.evaluation.results import MEASURES, Comparison, Leak, Metric, Outcome, Subject

# The first lines of a log, as a run of the tiny recipe writes them.
LINE = {
    "time": 1795288464.4,
    "grad_norm": 1.79,
    "learning_rate": 0.001,
    "epoch": 0.1,
    "lr": 0.001,
    "seconds": 0.3,
    "tokens_per_second": 3510.4,
    "seconds_left": 330.1,
}


def log(folder: Path, steps: int = 600, every: int = 10, keys: tuple[str, ...] = ("loss",)) -> None:
    """FOLDER/logs/progress.jsonl of a run whose numbers fall from 8 to near 0, with an evaluation now and then."""
    path = folder / "logs" / "progress.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = []
    for step in [1, *range(every, steps + 1, every)]:
        value = 8 / (1 + step / 50)
        lines.append({"step": step, "steps": steps, **{key: value for key in keys}, **LINE})
        if step % (10 * every) == 0:
            lines.append({"step": step, "steps": steps, "eval_loss": value * 1.1, "epoch": 0.1})
    lines.append({"step": steps, "steps": steps, "train_loss": 1.1, "train_runtime": 71.2})
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def some_metrics(models: list[str]) -> list[Metric]:
    """Three metrics of each model and one of a reward model: figures of all lengths, wide letters, chance or none."""
    metrics = []
    for i, name in enumerate(models):
        scale = 10.0 ** (2 * i)
        metrics.append(Metric("perplexity", None, name, 1445.2 / scale, 100, 1400.0 / scale, 1500.0))
        metrics.append(Metric("answer_accuracy", "phrasing", name, 0.5, 150, 0.42, 0.58))
        metrics.append(Metric("choice_accuracy", "事实", name, 0.25, 156, 0.2, 0.3, 0.25))
    return [*metrics, Metric("reward_accuracy", None, "rm", 0.9, 152, 0.84, 0.94, 0.5)]


def every_metric(models: list[str], seed: int = 1) -> Outcome:
    """An Outcome with every metric of MEASURES for every model and every neighbour compared."""
    rng, metrics, comparisons = random.Random(seed), [], []
    for i, model in enumerate(models):
        for name in MEASURES:
            value = rng.random()
            metrics.append(Metric(name, None, model, value, 200, value - 0.05, value + 0.05))
            verdict = ("better", "worse", "unclear", "higher", "lower")[rng.randrange(5)]
            if i:
                p = 0.5 if verdict == "unclear" else 0.0001
                comparison = (name, None, model, models[i - 1], value - 0.5, value - 0.6, value - 0.4, p, 200)
                comparisons.append(Comparison(*comparison, verdict))
    subjects = [Subject(model, f"outputs-{model}/tiny/model", "folder", "9f3a") for model in models]
    spread = {model: [rng.gauss(0.5, 0.2) for _ in range(1000)] for model in models}
    return Outcome(
        "tiny", subjects, metrics, comparisons, {name: spread for name in ("bits_per_byte", "rouge_l")}
    )


SCRIPT = "<script>document.title = 'it ran'</script>"
EVIL = [
    f"{SCRIPT}<img src=http://127.0.0.1:9/x onerror=\"document.title = 'it ran'\">",
    "\x1b[31mred\x00 \u202eright to left\u202c and \u2066more \ud83d",
    "مرحبا بالعالم، هذا نص عربي طويل",
    "W" * 3000,
    "的一是不了人我在有他这为之大来以个中上们" * 500,
    "</style></script></div>&lt;b&gt; ]]> <!-- x",
    "",
]


def hard(models: int = 17) -> Outcome:
    """Many models, long and Chinese names, replies of ten thousand characters and of markup, in every place."""
    names = ["基座模型", "a-name-of-24-letters-xxx", *(f"run-{i}" for i in range(models - 2))]
    outcome = every_metric(names)
    outcome.recipe = f"<i>实验</i>{'x' * 90}"
    outcome.subjects = [Subject(name, f"{SCRIPT}/{'long' * 40}", "folder", "<b>") for name in names]
    outcome.metrics.append(Metric("choice_accuracy", SCRIPT, names[0], 0.5, 9, 0.4, 0.6, 0.25))
    outcome.distributions[f"own metric {SCRIPT}"] = {name: [0.5] for name in names}
    outcome.questions = [
        (f"{SCRIPT} {'why ' * 100}", {name: EVIL[i % len(EVIL)] for i, name in enumerate(names)}),
        ("问题" * 200, {name: EVIL[(i + 3) % len(EVIL)] for i, name in enumerate(names)}),
    ]
    outcome.leaks = [
        Leak("answers", f"{'f' * 100}:{i}", f"{SCRIPT}{'长' * 500}", "b:2", 0.83) for i in range(300)
    ]
    outcome.notes = [f"{SCRIPT}{'y' * 200}"]
    outcome.settings = {"seed": 42, "long": "z" * 300, "versions": {"torch": SCRIPT}}
    return outcome
