"""Out of memory: the same run with a smaller micro-batch, started again by launch.sh; at 1, what else to lower."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import running
from running import PT, SFT, SHORT, losses, manifest

pytest_plugins = ["stages"]


@pytest.fixture(scope="module")
def plain(sft: list[object]) -> list[object]:
    """Without dropout: its random numbers fall otherwise where a step is cut otherwise."""
    return [*sft, "--lora_dropout", 0]


@pytest.fixture(scope="module")
def whole(plain: list[object], tmp_path_factory: pytest.TempPathFactory) -> dict[int, float]:
    """Losses of the run whose memory sufficed."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    done = running.run(SFT, folder, plain)
    assert done.status == 0, done
    return losses(folder)


def micro_batch(folder: Path) -> dict[str, int]:
    return json.loads((folder / "checkpoints" / "micro_batch.json").read_text())["instead"]


def test_launch_sh_goes_on_with_half_the_micro_batch_and_equal_losses(
    plain: list[object], whole: dict[int, float], tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    done = running.launch(SFT, folder, plain, STAGECRAFT_FAULT="oom@8:8").wait()
    assert done.status == 0 and "Traceback" not in done.said, done
    assert "global batch 8 = 8 a device x 1 accumulated x 1 process" in done.lines
    assert "global batch 8 = 4 a device x 2 accumulated x 1 process" in done.lines
    assert f"resuming from {folder}/checkpoints/checkpoint-6" in done.lines
    assert losses(folder) == pytest.approx(whole, rel=1e-5)
    [restart] = manifest(folder)["restarts"]
    assert "memory" in restart["reason"] and restart["step"] == 6


def test_control_without_the_accumulation_losses_are_others(
    plain: list[object], whole: dict[int, float], tmp_path: Path
) -> None:
    done = running.run(SFT, tmp_path / "run", [*plain, "--per_device_train_batch_size", 4])
    assert done.status == 0 and losses(tmp_path / "run") != pytest.approx(whole, rel=1e-5)


def test_halved_twice_and_killed_on_the_way(
    plain: list[object], whole: dict[int, float], tmp_path: Path
) -> None:
    """Exit status 76 says `start me again`; whatever start follows keeps the smaller micro-batch."""
    folder = tmp_path / "run"
    for fault, status, batch in [("oom@5:8", 76, (4, 2)), ("oom@9:4", 76, (2, 4)), ("kill@10", -9, (2, 4))]:
        done = running.run(SFT, folder, plain, STAGECRAFT_FAULT=fault)
        assert done.status == status, done
        assert tuple(micro_batch(folder).values()) == batch
    done = running.run(SFT, folder, plain)
    assert done.status == 0 and "global batch 8 = 2 a device x 4 accumulated x 1 process" in done.lines, done
    assert losses(folder) == pytest.approx(whole, rel=1e-5)
    assert [("memory" in r["reason"], r["step"]) for r in manifest(folder)["restarts"]] == [
        (True, 3),
        (True, 6),
        (False, 9),
    ]


@pytest.mark.long
def test_a_micro_batch_that_has_no_half_keeps_the_global_batch(plain: list[object], tmp_path: Path) -> None:
    """6 x 1 becomes 3 x 2, and 3 x 2 becomes 1 x 6."""
    flags = [*plain, "--per_device_train_batch_size", 6]
    assert running.run(SFT, tmp_path / "whole", flags).status == 0
    for fault in ("oom@5:6", "oom@5:3"):
        assert running.run(SFT, tmp_path / "run", flags, STAGECRAFT_FAULT=fault).status == 76
    assert micro_batch(tmp_path / "run") == {
        "per_device_train_batch_size": 1,
        "gradient_accumulation_steps": 6,
    }
    assert running.run(SFT, tmp_path / "run", flags).status == 0
    assert losses(tmp_path / "run") == pytest.approx(losses(tmp_path / "whole"), rel=1e-5)


@pytest.mark.long
def test_at_one_row_it_says_what_else_to_lower(
    plain: list[object], whole: dict[int, float], tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    for _ in range(3):
        assert running.run(SFT, folder, plain, STAGECRAFT_FAULT="oom@5:1").status == 76
    done = running.run(SFT, folder, plain, STAGECRAFT_FAULT="oom@5:1")
    assert done.status == 2 and "Traceback" not in done.said, done
    at = next(i for i, line in enumerate(done.lines) if "out of memory" in line and "lower" in line)
    assert len(done.lines) - at > 3 and all(line.startswith("  ") for line in done.lines[at + 1 :]), done
    assert running.run(SFT, folder, plain).status == 0  # more memory now
    assert losses(folder) == pytest.approx(whole, rel=1e-5)


def test_in_the_first_step_of_packed_pretraining(pt: list[object], tmp_path: Path) -> None:
    """Before there is a checkpoint, and with the fault on the very first micro-batch."""
    assert running.run(PT, tmp_path / "whole", pt).status == 0
    done = running.run(PT, tmp_path / "run", pt, STAGECRAFT_FAULT="oom@1:8")
    assert done.status == 76 and "global batch" in done.said, done
    assert running.run(PT, tmp_path / "run", pt).status == 0
    assert losses(tmp_path / "run") == pytest.approx(losses(tmp_path / "whole"), rel=1e-5)


def test_the_smaller_micro_batch_is_not_another_runs(plain: list[object], tmp_path: Path) -> None:
    """Out of memory before there was a checkpoint; then other flags, which make it another run."""
    folder = tmp_path / "run"
    assert running.run(SFT, folder, plain, STAGECRAFT_FAULT="oom@1:8").status == 76
    done = running.run(SFT, folder, [*plain, "--per_device_train_batch_size", 6, "--max_steps", 2])
    assert "global batch 6 = 6 a device x 1 accumulated x 1 process" in done.lines, done


def room_for_two_rows() -> None:
    """An evaluation of more than two rows at once finds no memory."""
    from transformers import Trainer

    loop = Trainer.evaluation_loop

    def limited(self, *args, **kwargs):
        if self.args.per_device_eval_batch_size > 2:
            raise MemoryError("no room for the logits")
        return loop(self, *args, **kwargs)

    Trainer.evaluation_loop = limited


def test_an_evaluation_halves_its_own_batch_and_no_other(
    plain: list[object], whole: dict[int, float], tmp_path: Path
) -> None:
    flags = [*plain, "--eval_strategy", "steps", "--eval_steps", 8, "--per_device_eval_batch_size", 8]
    done = running.run(SFT, tmp_path / "run", flags, patch=room_for_two_rows)
    assert done.status == 0 and "Traceback" not in done.said, done
    assert [size for size in (4, 2, 1) if f"--per_device_eval_batch_size {size}" in done.said] == [4, 2], done
    assert losses(tmp_path / "run") == whole
    assert manifest(tmp_path / "run")["restarts"] == []
    progress = (tmp_path / "run" / "logs" / "progress.jsonl").read_text()
    assert progress.count('"eval_loss"') == 2


@pytest.mark.long
@pytest.mark.parametrize("script", ["reward_modeling.py", "dpo_training.py"])
def test_preferences_train_alike_in_smaller_micro_batches(
    script: str, tiny_base: Path, tmp_path: Path
) -> None:
    """64 pairs, 8 a step: TRL takes means of micro-batches, so a step of 7 rows would weigh them by how it is cut."""
    pairs = tmp_path / "pairs.jsonl"
    row = {"system": "", "history": [], "question": "", "response_chosen": "", "response_rejected": ""}
    with pairs.open("w", encoding="utf-8") as stream:
        for n in range(64):
            words = {
                "question": f"问题{n}{'？' * (n % 5)}",
                "response_chosen": f"答案是{n}。" * (1 + n % 4),
                "response_rejected": "不知道。" * (1 + n % 3),
            }
            stream.write(json.dumps(row | words, ensure_ascii=False) + "\n")
    valid = tmp_path / "valid.jsonl"
    valid.write_text(
        json.dumps(row | {"question": "你好", "response_chosen": "好", "response_rejected": "不"}) + "\n"
    )
    data = ["--train_file_dir", pairs, "--validation_file_dir", valid]
    # Where losses are small already, a large step makes rounding visible.
    flags = ["--model_name_or_path", tiny_base, *data, *SHORT, "--lora_dropout", 0, "--learning_rate", "5e-4"]
    done = running.run(script, tmp_path / "whole", flags)
    assert done.status == 0 and "training rows 64" in done.said, done
    done = running.run(script, tmp_path / "run", flags, STAGECRAFT_FAULT="oom@8:8")
    assert done.status == 76, done
    done = running.run(script, tmp_path / "run", flags)
    assert done.status == 0, done
    assert losses(tmp_path / "run") == pytest.approx(losses(tmp_path / "whole"), rel=1e-5)
