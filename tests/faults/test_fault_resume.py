"""Killed and started again: the same weights; damaged checkpoints are seen; another run's are not taken."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

import running
from running import PT, SAVE, SFT, STEPS, Ended, complete, losses, manifest, weights

pytest_plugins = ["stages"]


def goes_on(folder: Path, flags: list[object], straight: Path, step: int) -> Ended:
    """The next start takes the run on from this step (0: the beginning) and ends in the weights of the straight one."""
    done = running.run(SFT, folder, flags)
    assert done.status == 0, done
    resumed = [line for line in done.lines if line.startswith("resuming from ")]
    assert resumed == ([f"resuming from {folder}/checkpoints/checkpoint-{step}"] if step else []), done
    assert weights(folder) == weights(straight) and losses(folder) == losses(straight)
    assert not (folder / "checkpoints").exists() and (folder / "TRAINED").exists()
    return done


# ---- Killed


def test_killed_in_the_second_epoch_it_ends_in_the_same_weights(
    again: Path, sft: list[object], straight: Path
) -> None:
    goes_on(again, sft, straight, 9)
    [restart] = manifest(again)["restarts"]
    assert restart["step"] == 9 and "killed" in restart["reason"] and restart["time"].startswith("20")
    assert manifest(straight)["restarts"] == []


def test_control_another_seed_ends_in_other_weights(
    straight: Path, sft: list[object], tmp_path: Path
) -> None:
    done = running.run(SFT, tmp_path / "run", [*sft, "--seed", 43])
    assert done.status == 0, done
    assert weights(tmp_path / "run").keys() == weights(straight).keys()
    assert weights(tmp_path / "run") != weights(straight)


def test_killed_before_the_first_checkpoint_it_starts_from_the_beginning(
    sft: list[object], straight: Path, tmp_path: Path
) -> None:
    done = running.run(SFT, tmp_path / "run", sft, STAGECRAFT_FAULT="kill@2")
    assert done.status == -9 and complete(tmp_path / "run") == []
    goes_on(tmp_path / "run", sft, straight, 0)


@pytest.mark.long
def test_killed_after_every_step_it_still_comes_to_its_end(
    sft: list[object], straight: Path, tmp_path: Path
) -> None:
    """Two steps on, one lost, again and again; run.json knows every restart."""
    folder, step, starts = tmp_path / "run", 2, 0
    while step < STEPS:
        done = running.run(SFT, folder, [*sft, "--save_steps", 2], STAGECRAFT_FAULT=f"kill@{step + 1}")
        assert done.status == -9 and complete(folder)[-1] == step, done
        step, starts = step + 4, starts + 1
    done = running.run(SFT, folder, [*sft, "--save_steps", 2])
    assert done.status == 0 and weights(folder) == weights(straight), done
    assert [restart["step"] for restart in manifest(folder)["restarts"]] == list(range(2, step - 3, 4))


def test_packed_blocks_of_pretraining_go_on_where_they_were(pt: list[object], tmp_path: Path) -> None:
    straight, folder = tmp_path / "straight", tmp_path / "run"
    assert running.run(PT, straight, pt).status == 0
    assert running.run(PT, folder, pt, STAGECRAFT_FAULT="kill@14").status == -9
    done = running.run(PT, folder, pt)
    assert done.status == 0 and f"resuming from {folder}/checkpoints/checkpoint-12" in done.said, done
    assert weights(folder) == weights(straight) and losses(folder) == losses(straight)


@pytest.mark.long
def test_a_step_of_several_micro_batches_is_resumed_whole(
    sft: list[object], straight: Path, tmp_path: Path
) -> None:
    flags = [*sft, "--per_device_train_batch_size", 2, "--gradient_accumulation_steps", 4]
    assert running.run(SFT, tmp_path / "straight", flags).status == 0
    assert running.run(SFT, tmp_path / "run", flags, STAGECRAFT_FAULT="kill@11").status == -9
    assert running.run(SFT, tmp_path / "run", flags).status == 0
    assert weights(tmp_path / "run") == weights(tmp_path / "straight") != weights(straight)


# ---- Damaged


def cut(checkpoint: Path) -> None:
    file = checkpoint / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def flip(checkpoint: Path) -> None:
    file = checkpoint / "adapter_model.safetensors"
    data = bytearray(file.read_bytes())
    data[-5] ^= 1
    file.write_bytes(data)


def drop(checkpoint: Path) -> None:
    (checkpoint / "optimizer.pt").unlink()


def garble(checkpoint: Path) -> None:
    (checkpoint / "trainer_state.json").write_text('{"global_step": 9, "log_hist')


def empty(checkpoint: Path) -> None:
    (checkpoint / "rng_state.pth").write_bytes(b"")


def unreadable_seal(checkpoint: Path) -> None:
    (checkpoint / "COMPLETE.json").write_text('{"step": 9')


DAMAGES = {
    cut: "adapter_model.safetensors",
    flip: "adapter_model.safetensors",
    drop: "optimizer.pt",
    garble: "trainer_state.json",
    empty: "rng_state.pth",
    unreadable_seal: "COMPLETE.json",
}


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_a_damaged_checkpoint_is_named_set_aside_and_the_one_before_is_used(
    again: Path, sft: list[object], straight: Path, damage: Callable[[Path], None]
) -> None:
    damage(again / "checkpoints" / "checkpoint-9")
    done = running.start(SFT, again, sft, STAGECRAFT_FAULT="kill@8").wait()
    [line] = [line for line in done.lines if "checkpoint-9" in line]
    assert DAMAGES[damage] in line and "checkpoint-9.damaged" in line and "Traceback" not in done.said
    assert (again / "checkpoints" / "checkpoint-9.damaged").is_dir()
    goes_on(again, sft, straight, 6)


def test_one_cut_short_by_a_kill_is_removed(again: Path, sft: list[object], straight: Path) -> None:
    (again / "checkpoints" / "checkpoint-9" / "COMPLETE.json").unlink()
    assert "checkpoint-9" in goes_on(again, sft, straight, 6).said
    assert not list(again.rglob("*.damaged"))


def test_with_all_of_them_damaged_it_says_so_and_starts_from_the_beginning(
    again: Path, sft: list[object], straight: Path
) -> None:
    for step in (6, 9):
        cut(again / "checkpoints" / f"checkpoint-{step}")
    done = goes_on(again, sft, straight, 0)
    assert "no checkpoint is left: starting from the beginning" in done.lines


@pytest.mark.parametrize("text", ["", "{"])
def test_damaged_notes_beside_the_checkpoints_stop_nothing(
    again: Path, sft: list[object], straight: Path, text: str
) -> None:
    """What a full disk or a dying machine may leave of restarts.json and the like; identity.json is another matter."""
    for file in (again / "checkpoints").glob("*.json"):
        if file.name != "identity.json":
            file.write_text(text)
    for name in ("micro_batch.json", "restarts.json", "stopped.json"):
        (again / "checkpoints" / name).write_text(text)
    goes_on(again, sft, straight, 9)


# ---- Another run's


def test_a_finished_run_is_not_overwritten(straight: Path, sft: list[object]) -> None:
    before = {path: path.stat().st_mtime_ns for path in straight.rglob("*") if path.name != ".lock"}
    done = running.run(SFT, straight, sft)
    assert done.status == 2 and done.lines[-1].startswith(
        f"--output_dir {straight}: holds a finished run (TRAINED)"
    )
    assert before == {path: path.stat().st_mtime_ns for path in straight.rglob("*") if path.name != ".lock"}


def test_changed_arguments_are_refused_with_the_difference(again: Path, sft: list[object]) -> None:
    before = complete(again)
    for flags in ([], ["--overwrite_output_dir"], ["--resume_from_checkpoint", "True"]):
        done = running.run(SFT, again, [*sft, "--learning_rate", "1e-2", "--weight_decay", 0.1, *flags])
        assert done.status == 2 and "Traceback" not in done.said, done
        assert "  learning_rate: 0.005 -> 0.01" in done.lines and any(
            "weight_decay" in line for line in done.lines
        )
        assert "--resume_anyway" in done.said and "--resume_from_checkpoint False" in done.said
        assert complete(again) == before


def test_changed_data_are_refused_by_the_files_name(
    again: Path, sft: list[object], conversations: Path
) -> None:
    more = again.parent / "more" / "rows.jsonl"
    more.parent.mkdir()
    rows = (conversations / "rows.jsonl").read_text(encoding="utf-8").splitlines()
    more.write_text("\n".join([*rows, rows[0].replace("问题0", "问题100")]) + "\n", encoding="utf-8")
    flags = [more if flag == conversations / "rows.jsonl" else flag for flag in sft]
    done = running.run(SFT, again, flags)
    assert done.status == 2 and "rows.jsonl" in done.said and complete(again) == [6, 9], done


def test_another_model_under_the_same_name_is_refused(
    tiny_base: Path, sft: list[object], tmp_path: Path
) -> None:
    """The stage before was trained again while this one was half done: its adapter belongs to weights that are gone."""
    base, folder = running.copy_of(tiny_base, tmp_path / "base"), tmp_path / "run"
    flags = [base if flag == tiny_base else flag for flag in sft]
    assert running.run(SFT, folder, flags, STAGECRAFT_FAULT="kill@5").status == -9
    weights = bytearray((base / "model.safetensors").read_bytes())
    weights[-2] ^= 1
    (base / "model.safetensors").write_bytes(weights)
    done = running.run(SFT, folder, flags)
    assert done.status == 2 and str(base) in done.said and complete(folder) == [3], done


def test_resume_anyway_goes_on(again: Path, sft: list[object], straight: Path) -> None:
    done = running.run(SFT, again, [*sft, "--max_grad_norm", "1e-3", "--resume_anyway"])
    assert done.status == 0 and f"resuming from {again}/checkpoints/checkpoint-9" in done.lines, done
    assert weights(again) != weights(straight)
    before = {step: loss for step, loss in losses(straight).items() if step <= 9}
    assert before.items() <= losses(again).items()


def test_a_fresh_start_on_request_forgets_the_checkpoints(
    again: Path, sft: list[object], straight: Path
) -> None:
    """Also after changed arguments; here they go back to the straight run's, so that weights can be compared."""
    done = running.run(
        SFT, again, [*sft, "--learning_rate", "1e-2", "--resume_anyway"], STAGECRAFT_FAULT="kill@10"
    )
    assert done.status == -9, done
    done = running.run(SFT, again, [*sft, "--resume_from_checkpoint", "False"])
    assert done.status == 0 and "resuming" not in done.said, done
    assert weights(again) == weights(straight)


def test_a_checkpoint_can_be_named_and_what_is_not_whole_is_refused(
    again: Path, sft: list[object], straight: Path
) -> None:
    older, newer = (again / "checkpoints" / f"checkpoint-{step}" for step in (6, 9))
    cut(newer)
    done = running.run(SFT, again, [*sft, "--resume_from_checkpoint", newer])
    assert done.status == 2 and str(newer) in done.lines[-1] and "Traceback" not in done.said, done
    done = running.run(SFT, again, [*sft, "--resume_from_checkpoint", again / "checkpoints" / "checkpoint-7"])
    assert done.status == 2 and "checkpoint-7" in done.lines[-1], done
    done = running.run(SFT, again, [*sft, "--resume_from_checkpoint", older])
    assert done.status == 0 and f"resuming from {older}" in done.lines, done
    assert weights(again) == weights(straight)


def test_true_without_a_checkpoint_is_refused(sft: list[object], tmp_path: Path) -> None:
    done = running.run(SFT, tmp_path / "run", [*sft, "--resume_from_checkpoint", "True"])
    assert done.status == 2 and done.lines[-1].startswith("--resume_from_checkpoint True: no checkpoint"), (
        done
    )


# ---- What is kept meanwhile


def test_only_as_many_checkpoints_as_asked_for_and_each_is_sealed(killed: Path) -> None:
    for step in (6, 9):
        folder = killed / "checkpoints" / f"checkpoint-{step}"
        seal = json.loads((folder / "COMPLETE.json").read_text())
        assert seal["step"] == step
        there = {str(f.relative_to(folder)) for f in folder.rglob("*") if f.is_file()} - {"COMPLETE.json"}
        assert (
            there
            == seal["files"].keys()
            >= {"adapter_model.safetensors", "optimizer.pt", "trainer_state.json"}
        )
        for name, entry in seal["files"].items():
            assert entry == {"bytes": (folder / name).stat().st_size, "sha256": running.sha256(folder / name)}


@pytest.mark.long
def test_without_a_limit_all_stay_until_the_end(sft: list[object], tmp_path: Path) -> None:
    flags = [flag for flag in sft if flag != "--save_total_limit"]
    flags.pop(sft.index("--save_total_limit"))
    assert running.run(SFT, tmp_path / "run", flags, STAGECRAFT_FAULT="kill@11").status == -9
    assert complete(tmp_path / "run") == [SAVE, 2 * SAVE, 3 * SAVE]
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "checkpoint-6")
    assert running.run(SFT, tmp_path / "run", flags, STAGECRAFT_FAULT="kill@10").status == -9
    assert complete(tmp_path / "run") == [SAVE, 3 * SAVE]


def test_the_outputs_in_run_json_are_what_lies_there(straight: Path) -> None:
    outputs = manifest(straight)["outputs"]
    assert "adapter/adapter_model.safetensors" in outputs
    for name, entry in outputs.items():
        file = straight / name
        assert entry == {"bytes": file.stat().st_size, "sha256": running.sha256(file)}
