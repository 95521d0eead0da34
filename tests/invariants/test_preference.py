"""DPO: the reference, the batch's shape and padding change no loss and no gradient; the policy starts as its reference."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from short_runs import EIGHT, FLAGS, FULL, neighbours, pieces, words, write

from running import kill_what_is_left, rows, run

DPO, RM = "dpo_training.py", "reward_modeling.py"
LIVE = ("--precompute_ref_log_probs", "false")


def pair(n: int) -> dict[str, Any]:
    """A preference; lengths differ by a factor of ten."""
    said = words(n)
    chosen, rejected = " ".join(said), " ".join(said[::-1][: 1 + n % 9])
    return {"prompt": f"{said[0]} {n}?", "chosen": chosen, "rejected": f"{rejected} {n}"}


@pytest.fixture(scope="module", autouse=True)
def nothing_left() -> Any:
    yield
    kill_what_is_left()


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    for name, some in (("train", range(48)), ("held", range(48, 56))):
        write(folder / name / "rows.jsonl", [pair(n) for n in some])
    return folder


@pytest.fixture(scope="module")
def trained(
    tiny_base: Path, data: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., list[dict[str, float]]]:
    """trained(*flags, script=, patch=) -> what each step logged; equal calls are made once."""
    made: dict[Any, list[dict[str, float]]] = {}

    def train(
        *flags: Any, script: str = DPO, patch: Callable[[], None] | None = None
    ) -> list[dict[str, float]]:
        key = (flags, script, patch)
        if key not in made:
            folder = tmp_path_factory.mktemp("run") / "out"
            where = ["--model_name_or_path", tiny_base, "--train_file_dir", data / "train"]
            held = ["--validation_file_dir", data / "held"]
            ended = run(script, folder, [*where, *held, *FLAGS, *flags], patch=patch)
            assert ended.status == 0, ended
            made[key] = rows(folder)
            assert len(made[key]) == 4
        return made[key]

    return train


def equal(one: list[dict[str, float]], other: list[dict[str, float]]) -> bool:
    """Each step's loss and gradient norm within 1e-5."""
    names = ("loss", "grad_norm")
    return all(
        a[name] == pytest.approx(b[name], rel=1e-5) for a, b in zip(one, other, strict=True) for name in names
    )


# ---- What must not matter


@pytest.mark.parametrize("kind", [(), FULL], ids=["lora", "full"])
@pytest.mark.parametrize(
    "flags",
    [
        ("--per_device_train_batch_size", 1, "--gradient_accumulation_steps", 8),
        ("--per_device_train_batch_size", 4, "--gradient_accumulation_steps", 2),
        (*EIGHT, "--padding_free", "false"),
        (*EIGHT, "--gradient_checkpointing", "true"),
        (*EIGHT, *LIVE),
    ],
    ids=["1x8", "4x2", "padded", "checkpointing", "live reference"],
)
def test_dpo_is_the_same(trained: Callable[..., Any], flags: tuple[Any, ...], kind: tuple[Any, ...]) -> None:
    assert equal(trained(*EIGHT, *kind), trained(*flags, *kind))


def test_scoring_in_pieces_is_the_same(trained: Callable[..., Any]) -> None:
    assert equal(trained(*EIGHT), trained(*EIGHT, patch=pieces))


def test_a_switched_off_adapter_is_a_separate_reference(trained: Callable[..., Any]) -> None:
    assert equal(trained(*EIGHT, *LIVE), trained(*EIGHT, *LIVE, patch=separate_reference))


@pytest.mark.parametrize(
    "flags",
    [
        ("--per_device_train_batch_size", 4, "--gradient_accumulation_steps", 2),
        (*EIGHT, "--padding_free", "false"),
        (*EIGHT, "--gradient_checkpointing", "true"),
    ],
    ids=["4x2", "padded", "checkpointing"],
)
def test_rm_is_the_same(trained: Callable[..., Any], flags: tuple[Any, ...]) -> None:
    assert equal(trained(*EIGHT, script=RM), trained(*flags, script=RM))


@pytest.mark.parametrize("kind", [(), FULL], ids=["lora", "full"])
def test_the_policy_starts_as_its_reference(trained: Callable[..., Any], kind: tuple[Any, ...]) -> None:
    first, second = trained(*EIGHT, *LIVE, *kind)[:2]
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-7)
    assert first["rewards/margins"] == first["rewards/chosen"] == first["rewards/rejected"] == 0
    assert second["rewards/margins"] != 0
    # Made ahead, its rows stood in other batches: the same but for rounding.
    assert abs(trained(*EIGHT, *kind)[0]["rewards/margins"]) < 1e-5


# ---- What must matter


def test_control_another_reference(trained: Callable[..., Any]) -> None:
    assert not equal(trained(*EIGHT, *LIVE), trained(*EIGHT, *LIVE, patch=other_reference))


def test_control_another_global_batch(trained: Callable[..., Any]) -> None:
    assert not equal(trained(*EIGHT), trained("--per_device_train_batch_size", 4))


@pytest.mark.parametrize("script", [DPO, RM])
def test_control_rows_that_see_their_neighbours(trained: Callable[..., Any], script: str) -> None:
    assert not equal(trained(*EIGHT, script=script), trained(*EIGHT, script=script, patch=neighbours))


def test_control_answers_without_their_first_token(trained: Callable[..., Any]) -> None:
    assert not equal(trained(*EIGHT), trained(*EIGHT, patch=later_answers))


# ---- Changes to the kit, made in the run's own process


def separate_reference(noise: float = 0.0) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    from stagecraft.training import preference

    made = preference.TokenisedDPOTrainer.__init__

    def with_reference(self: Any, *args: Any, **kwargs: Any) -> None:
        reference = AutoModelForCausalLM.from_pretrained(kwargs["model"].config._name_or_path)
        if noise:
            with torch.no_grad():
                reference.model.norm.weight.mul_(1 + noise)
        made(self, *args, **kwargs, ref_model=reference)

    preference.TokenisedDPOTrainer.__init__ = with_reference


def other_reference() -> None:
    separate_reference(noise=0.1)


def later_answers() -> None:
    from trl.trainer import dpo_trainer

    collate = dpo_trainer.DataCollatorForPreference.torch_call

    def later(self: Any, rows: Any) -> Any:
        batch = collate(self, rows)
        mask = batch["completion_mask"]
        return batch | {"completion_mask": mask * mask.roll(1, -1)}

    dpo_trainer.DataCollatorForPreference.torch_call = later
