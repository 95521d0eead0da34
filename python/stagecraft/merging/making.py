"""From a plan to a folder with its name: written, proven, described, renamed."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from stagecraft import files
from stagecraft.errors import ProofFailed, UserError
from stagecraft.merging.folder import UNPROVEN, template_of, tokenizer_folder, write_card, write_rest
from stagecraft.merging.plan import Plan


@dataclass
class Proof:
    """How to prove a merge."""

    device: str = "auto"
    trust_remote_code: bool = False
    prompt: str | None = None


def check_room(plan: Plan, output: Path, proof: Proof | None) -> None:
    """What would stop the merge or its proof half-way. Raises UserError with all of it."""
    faults = []
    for folder in (plan.base.folder, *(adapter.folder for adapter in plan.adapters)):
        if output.resolve() == folder.resolve():
            faults.append(f"--output_dir {output}: is an input of the merge; choose another folder")
        elif output.resolve() in folder.resolve().parents:
            faults.append(
                f"--output_dir {output}: holds {folder}, an input of the merge; choose another folder"
            )
    if proof and plan.base.config.get("auto_map") and not proof.trust_remote_code:
        faults.append(
            f"--base_model {plan.base.folder}: comes with code of its own (auto_map in config.json), which the proof would "
            "run: --trust_remote_code allows that, --no_validate leaves the proof out"
        )
    source = tokenizer_folder(plan)
    if not (source / "tokenizer_config.json").exists():
        faults.append(
            f"--base_model {source}: no tokenizer_config.json, nor with the adapter; a model needs its tokenizer"
        )
    elif proof and proof.prompt is not None and (plan.reward or template_of(source) is None):
        reason = (
            "a reward model scores texts and answers none"
            if plan.reward
            else f"{source} has no chat template"
        )
        faults.append(f"--test_prompt: {reason}")
    try:
        files.require_free_disk(output, round(plan.size * 1.01) + 50_000_000)
    except UserError as error:
        faults.append(str(error))
    if faults:
        raise UserError(*faults)


def make_model(plan: Plan, output: Path, proof: Proof | None) -> dict[str, Any]:
    """Write the complete model into `output`; returns the figures of writing and proof.

    Until the proof is done the folder has another name and no config.json. Raises ProofFailed, with what was written
    kept as OUTPUT.failed and an older `output` as it was.
    """
    output = output.resolve()  # a link's target gets the model, and . has no name
    temporary = output.with_name(f".{output.name}.tmp")
    with _claimed(temporary, output):
        return _make(plan, output, temporary, proof)


@contextlib.contextmanager
def _claimed(temporary: Path, output: Path) -> Iterator[None]:
    """The empty working folder, for one merge at a time: locked as long as this process lives."""
    try:
        temporary.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(temporary, os.O_RDONLY | os.O_DIRECTORY)
    except OSError as error:
        raise UserError(f"--output_dir {output}: can't be written: {error.strerror or error}") from None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.fstat(descriptor).st_ino != temporary.stat().st_ino:
            raise BlockingIOError  # the other merge ended in this moment, and this folder is its result
        for entry in temporary.iterdir():  # of a merge that was killed
            shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
        yield
    except (BlockingIOError, FileNotFoundError):
        raise UserError(f"--output_dir {output}: another merge is writing it; wait for its end") from None
    finally:
        os.close(descriptor)


def _make(plan: Plan, output: Path, temporary: Path, proof: Proof | None) -> dict[str, Any]:
    from stagecraft.merging.writing import write_plan

    changed = sum(not written.is_copy for written in plan.outputs)
    try:
        print("[1/3] configuration, tokenizer, lineage", flush=True)
        write_rest(plan, temporary)
        print(f"[2/3] writing {len(plan.outputs)} tensors, {changed} of them merged", flush=True)
        began = time.time()
        with tqdm(total=plan.size, unit="B", unit_scale=True, desc="merge", disable=None, leave=False) as bar:
            write_plan(plan, temporary, bar.update)
        seconds = time.time() - began
        print("[3/3] proof" if proof else "[3/3] no proof (--no_validate)", flush=True)
        figures = prove(plan, temporary, proof) if proof else {}
        write_card(plan, temporary, figures)
        (temporary / UNPROVEN).rename(temporary / "config.json")
        files.replace_folder(temporary, output)
    except ProofFailed as fault:
        raise ProofFailed(f"{fault}{_keep(temporary, output)}") from None
    except OSError as error:  # a full disk, most of all: half a model is of no use
        shutil.rmtree(temporary, ignore_errors=True)
        raise UserError(
            f"--output_dir {output}: {error.strerror or error}; nothing was changed there"
        ) from None
    _remove_failed(output)
    return figures | {"write_seconds": seconds}


def _keep(temporary: Path, output: Path) -> str:
    """Put what failed aside under a name that tells; nothing of an earlier merge is touched."""
    failed = output.with_name(f"{output.name}.failed")
    _remove_failed(output)
    temporary.rename(failed)
    return f"\nwhat was written is in {failed}, without config.json so that nothing loads it"


def _remove_failed(output: Path) -> None:
    """What an earlier merge into `output` left that failed: it is of no use beside a newer one."""
    failed = output.with_name(f"{output.name}.failed")
    if (failed / UNPROVEN).exists():
        shutil.rmtree(failed)


def prove(plan: Plan, folder: Path, proof: Proof) -> dict[str, Any]:
    """File check, numeric check, behaviour check. Returns their figures; raises ProofFailed."""
    from stagecraft.merging.proof import check_files, check_numbers

    check_files(plan, folder)
    print(f"      files     {len(plan.outputs)} names, shapes, dtypes and sizes as planned", flush=True)
    with tqdm(total=len(plan.outputs), unit="tensor", desc="numbers", disable=None, leave=False) as bar:
        figures = check_numbers(plan, folder, bar.update)
    print(
        f"      numbers   {figures['changed']} merged tensors sampled in fp64: at most {figures['worst_ulp']:.3f} units in the "
        f"last place off (rounding alone: 0.500); {figures['tensors'] - figures['changed']} others bit-identical",
        flush=True,
    )
    return figures | _prove_behaviour(plan, folder, proof)


def _prove_behaviour(plan: Plan, folder: Path, proof: Proof) -> dict[str, Any]:
    from stagecraft.merging.behaviour import Question, check_behaviour

    with tempfile.TemporaryDirectory() as view:  # the folder as it will be, with config.json under its name
        for file in folder.iterdir():
            name = "config.json" if file.name == UNPROVEN else file.name
            (Path(view) / name).symlink_to(file.resolve())
        figures = check_behaviour(
            Question(
                base=plan.base.folder.resolve(),
                adapters=[adapter.folder.resolve() for adapter in plan.adapters],
                weights=plan.weights,
                merged=Path(view),
                dtype=plan.dtype,
                reward=plan.reward,
                head_rows=plan.head_rows,
                vocabulary=plan.vocabulary,
                device=proof.device,
                trust_remote_code=proof.trust_remote_code,
                prompt=proof.prompt,
            )
        )
    kind = "scores" if plan.reward else "KL a token"
    print(
        f"      behaviour {figures['gap_to_adapter']:.1e} {kind} from base + adapter (limit {figures['limit']:g}), "
        f"{figures['gap_to_base']:.1e} from the base; {figures['tokens']} tokens on {figures['device']}",
        flush=True,
    )
    if figures["gap_to_base"] <= figures["limit"]:
        print(
            "note        the adapter changes too little for the behaviour check to tell it from the base; the numbers above "
            "prove it alone",
            flush=True,
        )
    return figures
