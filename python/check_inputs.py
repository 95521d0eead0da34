"""Which stages of a recipe have to run, judged by the content of what they were made from. The Makefile asks.

    python3 python/check_inputs.py plan 'sft outputs-sft/tiny/TRAINED model:outputs-pt/tiny/model data:data/finetune' ...
    python3 python/check_inputs.py begin 'sft ...'      before it runs: note what it is made from
    python3 python/check_inputs.py end 'sft ...'        after it: the note holds

A stage in words: its name, the marker that it leaves, and its inputs: file:PATH, data:FOLDER, model:FOLDER (a stage's
model/) and name:TEXT. `plan` prints "checked" and what has to run ("sft": train; "sft+": merge), and on stderr why a
finished stage runs again. Needs the standard library only.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from stagecraft.data.readers import list_files
from stagecraft.errors import UserError, run_main
from stagecraft.files import write_text

CACHE = Path(".cache/inputs.json")
# Of a model's folder: what tells where it comes from, with times in it, is no part of what it is.
NOT_THE_MODEL = ("lineage.json", "README.md")
LONG = 500_000_000  # bytes, about half a second: reading so much is said, once
TICK = 0.05  # seconds: a file changed so shortly ago could change again within the same time stamp


class Hashes:
    """SHA-256 of files. A file whose size and times are as they were is not read again."""

    def __init__(self) -> None:
        self.known, self.changed, self.said = read_json(CACHE), False, False

    def of(self, path: str) -> str:
        """The file's hash; empty where it can't be read."""
        try:
            status = os.stat(path)
            # The time of change as well: no program can set it, so a file that was restored with its old time is seen.
            stamp = [status.st_size, status.st_mtime_ns, status.st_ctime_ns]
            if self.known.get(path, [])[:3] == stamp:
                return self.known[path][3]
            if status.st_size >= LONG and not self.said:
                print("make: reading what is new since the last time", file=sys.stderr)
                self.said = True
            with open(path, "rb") as stream:
                digest = hashlib.file_digest(stream, "sha256").hexdigest()
        except OSError:
            return ""
        if abs(time.time() - status.st_ctime) > TICK:
            self.known[path], self.changed = [*stamp, digest], True
        return digest

    def of_model(self, folder: str) -> str:
        """One hash for all that makes a model's folder the model; empty where there is none."""
        parts = []
        for parent, below, names in os.walk(folder):
            below[:] = sorted(name for name in below if not name.startswith("."))
            for name in sorted(names):
                if not name.startswith(".") and name not in NOT_THE_MODEL:
                    path = os.path.join(parent, name)
                    parts.append((os.path.relpath(path, folder), self.of(path)))
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest() if parts else ""

    def keep(self) -> None:
        """Remember them for the next time. A disk that can't be written costs that time, no more."""
        if self.changed:
            with contextlib.suppress(OSError):
                write(CACHE, {path: entry for path, entry in self.known.items() if os.path.exists(path)})


@dataclass
class Stage:
    """A stage as the Makefile describes it."""

    name: str
    marker: Path
    fixed: dict[str, str] = field(
        default_factory=dict
    )  # its inputs: {what: its content} of single files and names
    data: dict[str, str] = field(default_factory=dict)  # {file: hash} of its data folder
    models: list[str] = field(default_factory=list)
    folder: str | None = None  # the data folder

    @classmethod
    def read(cls, words: str, hashes: Hashes) -> Stage:
        """From its words, with the content that its inputs have now."""
        name, marker, *inputs = words.split()
        stage = cls(name, Path(marker))
        for word in inputs:
            kind, _, value = word.partition(":")
            if kind == "name":
                stage.fixed["the base model's name"] = value
            elif kind == "file":
                stage.fixed[value] = hashes.of(value)
            elif kind == "model":
                stage.fixed[value] = hashes.of_model(value)
                stage.models.append(value)
            else:
                stage.folder = value
                with contextlib.suppress(UserError):  # no data at all: the stage itself tells
                    stage.data |= {str(file): hashes.of(str(file)) for file in list_files(value)}
        return stage

    @property
    def note(self) -> Path:
        """Where it is noted what it was made from: in its folder, beside a folder that appears as a whole."""
        if self.marker.name in ("TRAINED", "DONE"):
            return self.marker.with_name(".inputs.json")
        return self.marker.parent.with_name(f".{self.marker.parent.name}.json")

    @property
    def pending(self) -> Path:
        """The same of a run that has begun."""
        return self.note.with_suffix(".tmp")

    def identity(self) -> str | None:
        """What tells this run's result from another run's; None without a result."""
        if not self.marker.exists():
            return None
        started = read_json(self.marker.with_name("run.json")).get("started")
        return hashlib.sha256(self.marker.read_bytes() + str(started).encode()).hexdigest()

    def noted(self) -> dict[str, str] | None:
        """The inputs it was made from, if Make made it."""
        pending, note = read_json(self.pending), read_json(self.note)
        if pending and pending["instead_of"] != self.identity():
            return pending["inputs"]  # it ended well, but Make was killed before it could note that
        return note["inputs"] if note and note["of"] == self.identity() else None

    def made_from(self) -> tuple[dict[str, str], list[str]]:
        """(the inputs as they were, as far as that is known, files among them that only the YAML names)."""
        run = read_json(self.marker.with_name("run.json"))
        # Which bytes of which file were read, run.json knows best.
        files = {entry["path"]: entry["sha256"] for entry in run.get("data", [])}
        inputs = self.noted()
        if (
            inputs is None
        ):  # made by hand, or by a version that took no notes: taken as it is where run.json agrees
            inputs = self.fixed | ({} if files else self.data) | self._other_names(run.get("arguments", {}))
        held_out = [
            path for path in files if path not in inputs and not path.startswith(f"{self.folder}{os.sep}")
        ]
        return inputs | files, held_out

    def _other_names(self, arguments: dict[str, Any]) -> dict[str, str]:
        """Model and data folder that a run names, where they are not the ones it would be given now."""
        model, folder = arguments.get("model_name_or_path"), arguments.get("train_file_dir")
        found = {}
        if self.name == "base" and model != self.fixed.get("the base model's name"):
            found["the base model's name"] = str(model)
        elif model and self.models and model not in self.models:
            found[model] = "another"
        if folder and self.folder and folder.rstrip("/") != self.folder:
            found[folder] = "another"
        return found

    def difference(self, hashes: Hashes) -> str | None:
        """The first input that is not as it was."""
        before, held_out = self.made_from()
        now = {path: hashes.of(path) for path in held_out} | self.fixed | self.data
        for key in sorted(before.keys() | now.keys()):
            if key in self.models and now.get(key) == "":
                continue  # thrown away to save room: no change, and made again only where something needs it
            if key not in before:
                return f"takes {key} now"
            if before[key] != now.get(key, ""):
                return f"{key} changed" if now.get(key) else f"no longer takes {key}"
        return None


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("action", nargs="?", help="plan, begin or end")
    parser.add_argument("stage", nargs="*", help="a stage in words, see above")
    parser.add_argument("--forced", default="", help="stages that run in any case")
    parser.add_argument("--dry", action="store_true", help="write nothing")
    args = parser.parse_intermixed_args()  # flags may stand between
    if args.action not in ("plan", "begin", "end") or not args.stage:
        parser.error("give plan, begin or end, and the stages")
    hashes = Hashes()
    stages = [Stage.read(words, hashes) for words in args.stage]
    if args.action == "plan":
        plan(stages, args.forced.split(), hashes, args.dry)
    for stage in stages:
        if args.action == "begin":
            write(stage.pending, {"instead_of": stage.identity(), "inputs": stage.fixed | stage.data})
        elif args.action == "end":
            write(stage.note, {"of": stage.identity(), "inputs": read_json(stage.pending)["inputs"]})
            stage.pending.unlink()
    if not args.dry:
        hashes.keep()


def plan(stages: list[Stage], forced: list[str], hashes: Hashes, dry: bool) -> None:
    """Print what has to run, and on stderr why."""
    reasons = find_stale(stages, forced, hashes)
    for stage in stages:
        inputs = stage.fixed | stage.data
        taken = stage.name not in reasons and bool(stage.fixed) and stage.noted() is None
        if taken and all(inputs.values()) and not dry:  # from now on its changes are seen
            write(stage.note, {"of": stage.identity(), "inputs": inputs})
        if reasons.get(stage.name) and stage.marker.exists():
            print(f"make: {stage.name} runs again: {reasons[stage.name]}", file=sys.stderr)
        elif reasons.get(f"{stage.name}+"):
            print(f"make: {stage.name} is merged again: {reasons[f'{stage.name}+']}", file=sys.stderr)
    merges = [f"{s.name}+" for s in stages if s.name in reasons and s.marker.name == "TRAINED"]
    print(*dict.fromkeys(["checked", *reasons, *merges]))


def find_stale(stages: list[Stage], forced: list[str], hashes: Hashes) -> dict[str, str]:
    """{"sft" or "sft+": why} of all that has to run; the reason is empty for what was never finished."""
    reasons: dict[str, str] = {}
    makers = {str(stage.marker.with_name("model")): stage for stage in stages}
    count = -1
    while count < len(reasons):  # until nothing follows from what was found
        count = len(reasons)
        for stage in stages:
            if stage.name in reasons:
                continue
            above = [makers[model].name for model in stage.models if model in makers]
            # A merge that only brings back a model that was thrown away gives the same one: nothing follows from it.
            again = next((name for name in above if name in reasons or reasons.get(f"{name}+") == ""), None)
            reason = f"{again} does" if again else None
            if not stage.marker.exists():
                reason = ""
            elif stage.name in forced:
                reason = "ARGS are given"
            elif stage.fixed:
                reason = stage.difference(hashes) or reason
            if reason is not None:
                reasons[stage.name] = reason
            elif stage.marker.name == "TRAINED" and not stage.marker.with_name("DONE").exists():
                reasons.setdefault(f"{stage.name}+", "")
        for stage in [stage for stage in stages if stage.name in reasons]:
            for model in [model for model in stage.models if not stage.fixed[model] and model in makers]:
                maker = makers[model]
                again = f"{maker.name}+" if maker.marker.with_name("adapter").is_dir() else maker.name
                if maker.name not in reasons and f"{maker.name}+" not in reasons:
                    reasons[again] = f"{stage.name} needs {model}, which is gone"
    return reasons


def write(path: Path, value: dict[str, Any]) -> None:
    """A JSON file, whole. In ASCII: names of files need not be UTF-8."""
    write_text(path, json.dumps(value, indent=2) + "\n")


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object; an empty one where there is none, or half of one."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


if __name__ == "__main__":
    run_main(main)
