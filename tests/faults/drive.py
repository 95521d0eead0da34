"""The driver: `make` killed again and again until it ends by itself, each time at a moment that was aimed at.

    python tests/faults/drive.py [--kills 28] [--seed 1] [--folder DIR]      the whole pipeline, with a table at the end

A kill is SIGKILL to the whole process group; a moment is a phase of a stage, plus a random wait.
"""

from __future__ import annotations

import argparse
import random
import re
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # running.py, when this is run by itself

from project import GOALS, SCRIPTS, STAGES, TRAINING, Attempt, Project  # noqa: E402

from running import MERGE  # noqa: E402

PHASES = ("load", "step", "finish", "merge")
# Seconds that a kill waits at most once its moment has come.
LONGEST = {"load": 6.0, "step": 0.05, "save": 0.02, "finish": 0.005, "merge": 5.0}


def unsealed(attempt: Attempt, stage: str) -> bool:
    """Whether a checkpoint of the stage is being written, or was when the attempt was killed."""
    found = attempt.project.of(stage).glob("checkpoints/checkpoint-*")
    return any(attempt.is_new(entry) and not (entry / "COMPLETE.json").exists() for entry in found)


def finishing(attempt: Attempt, stage: str) -> bool:
    """Whether adapter or model of the stage are being written."""
    return any(attempt.is_new(attempt.project.of(stage) / name) for name in (".adapter.tmp", ".model.tmp"))


@dataclass
class Target:
    """A moment: a phase of a stage (from `step` on, where that is not 0), and `wait` seconds after it is seen."""

    stage: str
    phase: str
    step: int = 0
    wait: float = 0.0

    def is_there(self, attempt: Attempt) -> bool:
        """Whether the moment has come. Files are looked at first: asking for processes takes a millisecond."""
        if self.phase in ("step", "save") and attempt.step(self.stage) < self.step:
            return False
        if self.phase == "save" and not unsealed(attempt, self.stage):
            return False
        if self.phase == "finish" and not finishing(attempt, self.stage):
            return False
        words = attempt.command()
        if self.phase == "merge":
            return MERGE in words and f"outputs-{self.stage}/" in words
        return SCRIPTS[self.stage] in words

    def has_passed(self, project: Project) -> bool:
        """Whether the stage is over, so that the moment can't come any more."""
        folder = project.of(self.stage)
        return (folder / "DONE").exists() or self.phase != "merge" and (folder / "TRAINED").exists()

    def __str__(self) -> str:
        return f"{self.stage} {self.phase}{f' {self.step}' if self.step else ''}"


def moments(stage: str, count: int, chance: random.Random) -> list[Target]:
    """`count` moments of a stage in the order in which they come: loading, steps and saves, the end, the merge."""
    if stage in ("base", "eval"):
        whole = 1.2 if stage == "base" else 3.5  # seconds; hardly less than all of it takes
        waits = sorted(chance.uniform(0, whole) for _ in range(count))
        return [Target(stage, "load", 0, wait) for wait in waits]
    phases = ["step", "save", "finish", "merge", "load", "save", "step", "merge"]
    chosen = phases[:count] + ["step"] * max(0, count - len(phases))
    during = [phase for phase in chosen if phase in ("step", "save")]
    chance.shuffle(during)
    steps = sorted(chance.sample(range(2, TRAINING["max_steps"] - 2), len(during)))
    order = [(phase, 0) for phase in chosen if phase == "load"] + list(zip(during, steps, strict=True))
    order += [(phase, 0) for name in ("finish", "merge") for phase in chosen if phase == name]
    longest = LONGEST | (
        {"merge": 0.2} if stage == "pt" else {}
    )  # there it trains every weight: nothing to merge
    return [Target(stage, phase, step, chance.uniform(0, longest[phase])) for phase, step in order]


@dataclass(order=True)
class Place:
    """How far a run is, to be compared: stage, phase, step, and the seconds that its process has been there."""

    stage: int
    phase: int
    step: int = 0
    seconds: float = 0.0
    saving: bool = field(default=False, compare=False)  # a checkpoint was being written

    @property
    def name(self) -> str:
        """The phase in words."""
        return "save" if self.saving else PHASES[self.phase]

    def __str__(self) -> str:
        where = f"{self.seconds:.1f} s" if self.seconds else f"{self.step}" if self.step else ""
        return f"{GOALS[self.stage]} {self.name} {where}".strip()


def place_of(attempt: Attempt) -> Place:
    """Where the attempt is now, by what it has done since it began."""
    project, words, now = attempt.project, attempt.command(), time.monotonic()
    merged = re.search(r"--stage_dir outputs-(\w+)/", words)
    running = merged[1] if merged else next((goal for goal, script in SCRIPTS.items() if script in words), "")
    name = running or next((goal for goal in GOALS if not (project.of(goal) / "DONE").exists()), "eval")
    folder, stage = project.of(name), GOALS.index(name)
    script = MERGE if (folder / "TRAINED").exists() else SCRIPTS[name]
    seconds = now - attempt.seen.setdefault((name, script), now) if script in words else 0.0
    if script == MERGE:
        return Place(stage, PHASES.index("merge"), seconds=seconds)
    if name in STAGES and finishing(attempt, name):
        return Place(stage, PHASES.index("finish"))
    step = attempt.step(name) if name in STAGES else 0
    if step:
        return Place(stage, PHASES.index("step"), step)
    return Place(stage, PHASES.index("load"), seconds=seconds)


@dataclass
class Kill:
    """A kill as it came: where it hit, the step that the next start went on from, the seconds until it was there again."""

    target: Target
    at: float
    place: Place
    lost: float | None = None
    resumed: int | None = None

    def again(self) -> int:
        """Steps that were done a second time."""
        return max(0, self.place.step - (self.resumed or 0))

    def __str__(self) -> str:
        lost = f"{self.lost:5.1f} s lost" if self.lost is not None else ""
        return f"{str(self.target):14} hit {str(self.place):18} {lost} {self.again() or ''}".rstrip()


def drive(
    project: Project,
    targets: Sequence[Target],
    *words: str,
    number: signal.Signals = signal.SIGKILL,
    patience: float = 240.0,
) -> list[Kill]:
    """`make WORDS` again and again, killed at each target in turn, until it ends by itself. Fails where it does not."""
    waiting, kills = list(targets), []
    while True:
        attempt = project.make(*words)
        try:
            place = watch(attempt, waiting[0] if waiting else None, kills, time.monotonic() + patience)
        except BaseException:
            attempt.kill()
            raise
        if place is not None:
            attempt.kill(number)
            place.saving = unsealed(attempt, GOALS[place.stage])
            kills.append(Kill(waiting.pop(0), time.monotonic(), place))
        for kill in kills[: -1 if place else None]:
            if kill.resumed is None and (found := attempt.resumed(GOALS[kill.place.stage])) is not None:
                kill.resumed = found
        if place is None:
            break
    assert attempt.status() == 0, f"make ended with {attempt.status()} by itself\n{attempt.said[-3000:]}"
    for kill in kills:  # of the last moments of the last stage
        kill.lost = kill.lost if kill.lost is not None else time.monotonic() - kill.at
    return kills


def watch(attempt: Attempt, target: Target | None, kills: list[Kill], until: float) -> Place | None:
    """Look on until the target's moment: where the attempt is then. None: it ended before."""
    seen = None
    while attempt.status() is None:
        if target and seen is None and (target.is_there(attempt) or target.has_passed(attempt.project)):
            seen = time.monotonic()
        place = place_of(attempt)
        for kill in kills:
            if kill.lost is None and place >= kill.place:
                kill.lost = time.monotonic() - kill.at
        if target and seen is not None and time.monotonic() - seen >= target.wait:
            return place
        if time.monotonic() > until:
            raise AssertionError(f"make did not come to an end\n{attempt.said[-3000:]}")
        time.sleep(0.002 if target and target.wait < 0.1 else 0.02)
    return None


# ---- The long form from the command line


def table(kills: Sequence[Kill]) -> str:
    """A line for each stage and phase that was hit: kills, seconds lost in the mean and at most, steps done again."""
    lines = [f"{'stage':6} {'phase':7} kills  lost, mean    most  steps again, mean"]
    groups = dict.fromkeys((GOALS[kill.place.stage], kill.place.name) for kill in kills)
    for stage, phase in groups:
        hit = [kill for kill in kills if (GOALS[kill.place.stage], kill.place.name) == (stage, phase)]
        again = sum(kill.again() for kill in hit) / len(hit)
        lines.append(f"{stage:6} {phase:7} {figures(hit)}  {again or ''}".rstrip())
    return "\n".join([*lines, f"{'all':14} {figures(kills)}"])


def figures(kills: Sequence[Kill]) -> str:
    lost = [kill.lost or 0.0 for kill in kills]
    return f"{len(kills):5}  {sum(lost) / len(lost):8.1f} s  {max(lost):4.1f} s"


def spread(count: int, seed: int) -> list[Target]:
    """`count` moments over every stage, in the pipeline's order; the same for the same seed."""
    chance = random.Random(seed)
    shares = dict.fromkeys(GOALS, 0)
    order = [goal for _ in range(count) for goal in (*STAGES, "eval", *STAGES, "base", *STAGES)]
    for goal in order[:count]:
        shares[goal] += 1
    return [target for goal in GOALS for target in moments(goal, shares[goal], chance)]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=28, help="how many")
    parser.add_argument("--seed", type=int, default=1, help="of the moments")
    parser.add_argument(
        "--folder", type=Path, help="where the two copies of the project go [a temporary folder]"
    )
    args = parser.parse_args()
    folder = args.folder or Path(tempfile.mkdtemp(prefix="stagecraft-faults-"))
    began = time.monotonic()
    plain, killed = Project(folder / "plain"), Project(folder / "killed")
    drive(plain, [], "all")
    straight = time.monotonic() - began
    kills = drive(killed, spread(args.kills, args.seed), "all")
    wall = time.monotonic() - began - straight
    print("\n".join(map(str, kills)), table(kills), sep="\n\n")
    print(
        f"{straight:.0f} s without a kill, {wall:.0f} s with {len(kills)}: {(wall - straight) / len(kills):.1f} s a kill"
    )
    same = [plain.weights(stage) == killed.weights(stage) for stage in GOALS] + [
        plain.metrics() == killed.metrics()
    ]
    print(
        "same weights and report"
        if all(same)
        else f"NOT THE SAME: {dict(zip([*GOALS, 'report'], same, strict=True))}"
    )
    sys.exit(0 if all(same) else 1)


if __name__ == "__main__":
    main()
