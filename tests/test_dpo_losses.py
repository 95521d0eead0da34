"""DPO's losses through the stage: each is the formula of its paper, with a reference and without one."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kinds import history, losses, rows_of, trained
from stagecraft.flags import trainer_flags

BETA = 0.1  # TRL's default
SMOOTHING = 0.2
LN2 = math.log(2)


def softplus(value: float) -> float:
    """-log sigmoid(-value)."""
    return math.log1p(math.exp(value))


def sigmoid(value: float) -> float:
    return 1 / (1 + math.exp(-value))


def exo(chosen: float, rejected: float) -> float:
    """KL of the policy's preference from the labels', of which a share of SMOOTHING is flipped."""
    ours, theirs = sigmoid(chosen - rejected), 1 - SMOOTHING
    return ours * math.log(ours / theirs) + (1 - ours) * math.log((1 - ours) / (1 - theirs))


def robust(chosen: float, rejected: float) -> float:
    margin = chosen - rejected
    return ((1 - SMOOTHING) * softplus(-margin) - SMOOTHING * softplus(margin)) / (1 - 2 * SMOOTHING)


def smoothed(chosen: float, rejected: float) -> float:
    margin = chosen - rejected
    return (1 - SMOOTHING) * softplus(-margin) + SMOOTHING * softplus(margin)


def discopop(chosen: float, rejected: float) -> float:
    margin = chosen - rejected
    share = sigmoid(margin / 0.05)
    return (1 - share) * softplus(-margin) + share * math.exp(-margin)


# Losses of one pair from the two rewards, beta * (log-probability - the reference's), by the papers.
FORMULAS: dict[str, Callable[[float, float], float]] = {
    "sigmoid": lambda c, r: softplus(r - c),
    "hinge": lambda c, r: max(0.0, 1 - (c - r)),
    "exo_pair": exo,
    "nca_pair": lambda c, r: softplus(-c) + 0.5 * softplus(c) + 0.5 * softplus(r),
    "robust": robust,
    "bco_pair": lambda c, r: softplus(-c) + softplus(r),
    "sppo_hard": lambda c, r: ((c - 0.5) ** 2 + (r + 0.5) ** 2) / BETA**2,
    "aot": smoothed,  # of one pair; of several they sort first
    "aot_unpaired": smoothed,
    "apo_zero": lambda c, r: 1 - sigmoid(c) + sigmoid(r),
    "apo_down": lambda c, r: sigmoid(c) + 1 - sigmoid(c - r),
    "discopop": discopop,
}
# These divide by the answers' lengths, so only their first value is known: policy and reference are the same then.
FIRST = {"ipo": (1 / (2 * BETA)) ** 2, "sigmoid_norm": LN2}
FLAGS = {loss: {"label_smoothing": SMOOTHING} for loss in ("exo_pair", "robust", "aot", "aot_unpaired")}


@pytest.fixture(scope="module")
def dpo(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """dpo(**flags) -> the folder of a run of three steps, a pair each; the same flags run once."""
    rows = rows_of(tiny_base, tmp_path_factory.mktemp("data"))["dpo"]
    found: dict[str, Path] = {}

    def run(**flags: Any) -> Path:
        if str(flags) not in found:
            flags_here = {"per_device_train_batch_size": 1, **flags}
            folder = tmp_path_factory.mktemp("dpo") / "run"
            found[str(flags)] = trained("dpo", tiny_base, rows, folder, **flags_here)
        return found[str(flags)]

    return run


def steps(folder: Path) -> list[dict[str, Any]]:
    return [row for row in history(folder) if "rewards/chosen" in row]


def test_every_loss_that_trl_offers_is_tested_here() -> None:
    offered = trainer_flags("dpo")["loss_type"].help
    assert all(f"`'{loss}'`" in offered for loss in [*FORMULAS, *FIRST, "sft"])
    assert offered.count("`'") == len(FORMULAS) + len(FIRST) + 1


@pytest.mark.parametrize("loss", FORMULAS)
def test_a_loss_is_the_formula_of_its_paper(dpo: Callable[..., Path], loss: str) -> None:
    rows = steps(dpo(loss_type=loss, **FLAGS.get(loss, {})))
    assert len(rows) == 3
    for row in rows:
        wanted = FORMULAS[loss](row["rewards/chosen"], row["rewards/rejected"])
        assert row["loss"] == pytest.approx(wanted, rel=1e-4)
    # Control: after the first step no other formula gives this, but those that are the same for one pair.
    last = rows[-1]
    for other, formula in FORMULAS.items():
        if formula is not FORMULAS[loss]:
            assert last["loss"] != pytest.approx(
                formula(last["rewards/chosen"], last["rewards/rejected"]), rel=1e-3
            ), other


@pytest.mark.parametrize("loss", FIRST)
def test_a_loss_by_length_starts_where_it_must_and_falls(dpo: Callable[..., Path], loss: str) -> None:
    found = losses(dpo(loss_type=loss))
    assert found[0] == pytest.approx(FIRST[loss], rel=1e-5)
    assert found[1:] != pytest.approx(losses(dpo(loss_type="sigmoid"))[1:], rel=1e-3)
    assert all(value < found[0] for value in found[1:])


def test_sft_is_the_chosen_answers_own_loss(dpo: Callable[..., Path]) -> None:
    """A mean a word, so its loss is to the chosen log-probability as one to the answer's length, a whole number."""
    for row in steps(dpo(loss_type="sft")):
        length = -row["logps/chosen"] / row["loss"]
        assert round(length) > 3 and length == pytest.approx(round(length), abs=1e-3)


def test_several_losses_are_their_weighted_sum(dpo: Callable[..., Path]) -> None:
    both = steps(dpo(loss_type=["sigmoid", "sft"], loss_weights=[0.5, 2.0]))
    alone = losses(dpo(loss_type="sft"))[0]
    assert both[0]["loss"] == pytest.approx(0.5 * LN2 + 2 * alone, rel=1e-5)
    assert losses(dpo(loss_type=["sigmoid", "sft"]))[0] == pytest.approx(LN2 + alone, rel=1e-5)


def test_smoothing_of_none_is_the_plain_loss(dpo: Callable[..., Path]) -> None:
    plain = losses(dpo(loss_type="sigmoid"))
    for loss in ("robust", "aot", "aot_unpaired"):
        assert losses(dpo(loss_type=loss)) == pytest.approx(plain, rel=1e-5)
        assert losses(dpo(loss_type=loss, **FLAGS[loss]))[1:] != pytest.approx(plain[1:], rel=1e-3)


def test_transport_sorts_the_pairs_of_a_batch(dpo: Callable[..., Path]) -> None:
    """Sorting changes nothing while all ratios are zero, and then each of the three goes its own way."""
    found = [
        losses(dpo(loss_type=loss, per_device_train_batch_size=8, learning_rate=2e-2))
        for loss in ("sigmoid", "aot", "aot_unpaired")
    ]
    assert [values[0] for values in found] == pytest.approx([LN2] * 3, rel=1e-3)
    lasts = sorted(values[-1] for values in found)
    assert lasts[1] - lasts[0] > 1e-4 and lasts[2] - lasts[1] > 1e-4


# ---- Without a reference


@pytest.mark.parametrize("kind", [{}, {"use_peft": False}, {"load_in_4bit": True}])
def test_without_a_reference_log_probabilities_stand_for_the_ratios(
    dpo: Callable[..., Path], kind: dict[str, Any]
) -> None:
    evaluated = {"eval_strategy": "steps", "eval_steps": 3, "per_device_eval_batch_size": 1, **kind}
    rows = steps(dpo(reference_free=True, **evaluated))
    for row in rows:
        margin = BETA * (row["logps/chosen"] - row["logps/rejected"])
        assert row["rewards/margins"] == pytest.approx(margin, rel=1e-4)
        assert row["loss"] == pytest.approx(softplus(-margin), rel=1e-4)
    # Control: the same model has a loss of log 2 against itself.
    against = steps(dpo(loss_type="sigmoid", **kind))
    assert against[0]["logps/chosen"] == pytest.approx(rows[0]["logps/chosen"], rel=1e-5)
    assert against[0]["loss"] == pytest.approx(LN2, rel=1e-3) != pytest.approx(rows[0]["loss"], rel=1e-2)
    [held_out] = [row for row in history(dpo(reference_free=True, **evaluated)) if "eval_loss" in row]
    assert held_out["eval_rewards/chosen"] == pytest.approx(BETA * held_out["eval_logps/chosen"], rel=1e-5)


def test_by_length_and_without_a_reference_is_another_loss_again(dpo: Callable[..., Path]) -> None:
    """What SimPO is, without its margin."""
    found = losses(dpo(loss_type="sigmoid_norm", reference_free=True))
    assert all(map(math.isfinite, found))
    assert found != pytest.approx(losses(dpo(loss_type="sigmoid_norm")), rel=1e-3)
