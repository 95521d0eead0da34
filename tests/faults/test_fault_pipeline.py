"""`make` killed and started again until it ends by itself: the weights and the table of the run never killed."""

from __future__ import annotations

import random
import signal
from pathlib import Path

import pytest
from drive import Kill, Target, drive, moments, table
from project import GOALS, STAGES, Project

SEED = 1
COUNTS = {"base": 2, "pt": 6, "sft": 6, "rm": 6, "dpo": 6, "eval": 3}


# ---- Three kills in one stage: what `make test` has time for


def test_three_kills_in_one_stage(tmp_path: Path) -> None:
    plain, killed = Project(tmp_path / "plain"), Project(tmp_path / "killed")
    drive(plain, [], "sft", "STAGES=sft")
    killed.take(plain, ["base"])
    chance = random.Random(SEED)
    targets = [
        Target("sft", "save", 8),
        Target("sft", "finish"),
        Target("sft", "merge", wait=chance.uniform(0, 4)),
    ]
    kills = drive(killed, targets, "sft", "STAGES=sft")
    assert len(kills) == 3 and {kill.place.stage for kill in kills} == {GOALS.index("sft")}, kills
    assert killed.weights("sft") == plain.weights("sft") and len(plain.weights("sft")) == 2
    assert "run_base.sh" not in killed.log_of(0)


# ---- The long form


@pytest.fixture(scope="module")
def projects(tmp_path_factory: pytest.TempPathFactory) -> tuple[Project, Project]:
    """(one in which nothing happened, one to be killed)."""
    folder = tmp_path_factory.mktemp("projects")
    plain, killed = Project(folder / "plain"), Project(folder / "killed")
    drive(plain, [], "all")
    return plain, killed


@pytest.fixture(scope="module")
def all_kills() -> list[Kill]:
    return []


@pytest.mark.long
@pytest.mark.parametrize("goal", GOALS)
def test_every_stage_killed_in_every_phase(
    projects: tuple[Project, Project], all_kills: list[Kill], goal: str, capsys: pytest.CaptureFixture[str]
) -> None:
    plain, killed = projects
    kills = drive(killed, moments(goal, COUNTS[goal], random.Random(f"{SEED} {goal}")), goal)
    all_kills += kills
    with capsys.disabled():
        print("", *kills, sep="\n")
    assert len(kills) >= COUNTS[goal] - (goal in ("base", "eval"))  # over before the last moment came
    if goal == "eval":
        assert killed.metrics() == plain.metrics()
    else:
        assert killed.weights(goal) == plain.weights(goal) != {}
    if goal in STAGES:
        assert len({kill.place.name for kill in kills}) >= 4


@pytest.mark.long
def test_what_the_kills_cost(
    projects: tuple[Project, Project], all_kills: list[Kill], capsys: pytest.CaptureFixture[str]
) -> None:
    """For docs/reliability.md. Loading the libraries takes longest; steps are cheap here."""
    with capsys.disabled():
        print("", table(all_kills), sep="\n")
    assert len(all_kills) >= 25 or len({kill.place.stage for kill in all_kills}) < len(GOALS)
    assert all(0 <= kill.again() <= 3 for kill in all_kills)  # a checkpoint every three steps
    again = drive(projects[1], [], "all")
    assert again == [] and projects[1].log_of(-1) == "everything is up to date (RECIPE=faults)\n"


@pytest.mark.long
def test_control_another_seed_gives_other_weights(projects: tuple[Project, Project], tmp_path: Path) -> None:
    other = Project(tmp_path / "other", seed=43)
    drive(other, [], "sft")
    for stage in ("base", "pt", "sft"):
        plain = projects[0].weights(stage)
        assert other.weights(stage).keys() == plain.keys() and set(other.weights(stage).values()).isdisjoint(
            plain.values()
        )


@pytest.mark.long
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=lambda number: number.name)
def test_preempted_in_every_stage(
    projects: tuple[Project, Project], tmp_path: Path, number: signal.Signals
) -> None:
    """The signal that a scheduler, or Ctrl-C, sends to make's whole group."""
    plain, other = projects[0], Project(tmp_path / "other")
    chance = random.Random(f"{SEED} {number.name}")
    targets = [Target("base", "load", 0, chance.uniform(0, 2))]
    for stage in STAGES:
        targets += [
            Target(stage, "load", 0, chance.uniform(0, 4)),
            Target(stage, "step", chance.randrange(3, 20)),
        ]
    targets += [
        Target("dpo", "merge", 0, chance.uniform(0, 4)),
        Target("eval", "load", 0, chance.uniform(0, 4)),
    ]
    kills = drive(other, targets, "all", number=number)
    assert len(kills) == len(targets)
    for goal in GOALS[:-1]:
        assert other.weights(goal) == plain.weights(goal)
    assert other.metrics() == plain.metrics()
