"""PT and SFT: a setting that should not matter changes no loss and no gradient; one that should, does.

Runs are whole stages in fp32 without dropout; their per-step losses and gradient norms are held against each other.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from short_runs import EIGHT, FLAGS, FULL, neighbours, noticed_neighbours, pieces, words, write

from running import kill_what_is_left, rows, run

SFT, PT = "supervised_finetuning.py", "pretraining.py"


def talk(n: int) -> dict[str, Any]:
    """A row; lengths differ by a factor of ten."""
    said = words(n)
    return {
        "messages": [
            {"role": "user", "content": f"{said[0]} {n}?"},
            {"role": "assistant", "content": " ".join(said)},
        ]
    }


@pytest.fixture(scope="module", autouse=True)
def nothing_left() -> Any:
    yield
    kill_what_is_left()


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """sft/: 64 conversations; same/: 8 of them, so that every step has all; pt/: documents; held/: for validation."""
    folder = tmp_path_factory.mktemp("data")
    talks = [talk(n) for n in range(72)]
    write(folder / "sft" / "rows.jsonl", talks[:64])
    write(folder / "same" / "rows.jsonl", talks[:8])
    write(folder / "held" / "rows.jsonl", talks[64:])
    for n in range(4):
        write(folder / "many" / f"{n}.jsonl", talks[16 * n : 16 * n + 16])
    write(folder / "pt" / "rows.jsonl", [{"text": row["messages"][1]["content"] * 3} for row in talks[:64]])
    return folder


@pytest.fixture(scope="module")
def trained(
    tiny_base: Path, data: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., list[tuple]]:
    """trained(*flags, script=, rows=, patch=) -> (loss, gradient norm) of each step; equal calls are made once."""
    made: dict[Any, list[tuple[float, float]]] = {}

    def train(
        *flags: Any,
        script: str = SFT,
        source: str = "sft",
        patch: Callable[[], None] | None = None,
        **variables: str,
    ) -> list[tuple[float, float]]:
        key = (flags, script, source, patch, *variables.items())
        if key not in made:
            folder = tmp_path_factory.mktemp("run") / "out"
            held = ["--validation_file_dir", data / ("pt" if script == PT else "held")]
            where = ["--model_name_or_path", tiny_base, "--train_file_dir", data / source]
            words = [*where, *(held if script == SFT else []), *FLAGS, *flags]
            ended = run(script, folder, words, patch=patch, **variables)
            assert ended.status == 0, ended
            made[key] = [(row["loss"], row["grad_norm"]) for row in rows(folder)]
            assert len(made[key]) == 4
        return made[key]

    return train


BLOCKS = ("--block_size", 48, "--validation_split_percentage", 5)


def equal(one: list[tuple[float, float]], other: list[tuple[float, float]]) -> bool:
    """Each step's loss and gradient norm within 1e-5."""
    return all(a == pytest.approx(b, rel=1e-5) for a, b in zip(one, other, strict=True))


# ---- What must not matter


@pytest.mark.parametrize("kind", [(), FULL], ids=["lora", "full"])
@pytest.mark.parametrize(
    "flags",
    [
        ("--per_device_train_batch_size", 1, "--gradient_accumulation_steps", 8),
        ("--per_device_train_batch_size", 4, "--gradient_accumulation_steps", 2),
        (*EIGHT, "--padding_free", "false"),
        (*EIGHT, "--gradient_checkpointing", "true"),
        (*EIGHT, "--preprocessing_num_workers", 1, "--overwrite_cache"),
    ],
    ids=["1x8", "4x2", "padded", "checkpointing", "tokenised again"],
)
def test_sft_is_the_same(trained: Callable[..., Any], flags: tuple[Any, ...], kind: tuple[Any, ...]) -> None:
    assert equal(trained(*EIGHT, *kind), trained(*flags, *kind))


def test_sft_reads_the_cache_as_it_was_made(trained: Callable[..., Any]) -> None:
    again = trained(
        *EIGHT, "--dataloader_num_workers", 0
    )  # a call of its own: the corpus comes from the cache
    assert again == trained(*EIGHT)


def test_rows_in_many_files_are_the_same_rows(trained: Callable[..., Any]) -> None:
    assert equal(trained(*EIGHT), trained(*EIGHT, source="many"))


@pytest.mark.parametrize(
    "flags",
    [("--padding_free", "false"), ("--train_sampling_strategy", "group_by_length")],
    ids=["padded", "grouped by length"],
)
def test_the_order_within_a_step_does_not_matter(trained: Callable[..., Any], flags: tuple[Any, ...]) -> None:
    halves = ("--per_device_train_batch_size", 4, "--gradient_accumulation_steps", 2)
    assert equal(trained(*EIGHT, source="same"), trained(*halves, *flags, source="same"))


@pytest.mark.parametrize(
    "flags",
    [
        ("--per_device_train_batch_size", 1, "--gradient_accumulation_steps", 8),
        (*EIGHT, "--padding_free", "false"),
        (*EIGHT, "--gradient_checkpointing", "true"),
    ],
    ids=["1x8", "padded", "checkpointing"],
)
def test_pt_is_the_same(trained: Callable[..., Any], flags: tuple[Any, ...]) -> None:
    settings = {"script": PT, "source": "pt"}
    assert equal(trained(*EIGHT, *FULL, *BLOCKS, **settings), trained(*flags, *FULL, *BLOCKS, **settings))


@pytest.mark.parametrize("kind", [(), FULL], ids=["frozen head", "trained head"])
def test_scoring_in_pieces_is_the_same(trained: Callable[..., Any], kind: tuple[Any, ...]) -> None:
    assert equal(trained(*EIGHT, *kind), trained(*EIGHT, *kind, patch=pieces))


def test_neftune_draws_the_same_noise_with_and_without_padding(trained: Callable[..., Any]) -> None:
    noisy = (*EIGHT, "--neftune_noise_alpha", 5)
    assert equal(trained(*noisy), trained(*noisy, "--padding_free", "false"))
    assert not equal(trained(*noisy), trained(*EIGHT))


def test_smoothed_labels_are_transformers_own(trained: Callable[..., Any]) -> None:
    smooth = (*EIGHT, "--label_smoothing_factor", 0.1)
    assert equal(trained(*smooth), trained(*smooth, patch=transformers_smoothing))
    assert not equal(trained(*smooth), trained(*EIGHT))


def test_a_fresh_model_knows_nothing(trained: Callable[..., Any], tiny_base: Path) -> None:
    words = json.loads((tiny_base / "config.json").read_text())["vocab_size"]
    assert trained(*EIGHT)[0][0] == pytest.approx(math.log(words), rel=0.02)


# ---- What must matter, and is seen to


def test_control_another_global_batch(trained: Callable[..., Any]) -> None:
    assert not equal(trained(*EIGHT), trained("--per_device_train_batch_size", 4))


def test_control_a_mean_of_means(trained: Callable[..., Any]) -> None:
    halves = ("--per_device_train_batch_size", 4, "--gradient_accumulation_steps", 2)
    assert not equal(trained(*EIGHT), trained(*halves, patch=mean_of_means))


def test_control_rows_that_see_their_neighbours(trained: Callable[..., Any]) -> None:
    assert not equal(trained(*EIGHT), trained(*EIGHT, patch=neighbours))


def test_neighbours_that_are_seen_are_noticed(trained: Callable[..., Any]) -> None:
    """The look at the first batch finds them, and batches are padded instead."""
    assert equal(trained(*EIGHT), trained(*EIGHT, patch=noticed_neighbours))


def test_control_prompts_that_are_trained(trained: Callable[..., Any]) -> None:
    assert not equal(trained(*EIGHT), trained(*EIGHT, patch=trained_prompts))


def test_control_another_seed(trained: Callable[..., Any]) -> None:
    assert not equal(trained(*EIGHT), trained(*EIGHT, "--seed", 7))


# ---- Changes to the kit, made in the run's own process


def transformers_smoothing() -> None:
    from stagecraft.training import language

    language.Scoring = lambda model, smoothing: None

    made = language.Trainer.__init__

    def smoothed(self: Any, *args: Any, **kwargs: Any) -> None:
        from transformers.trainer_pt_utils import LabelSmoother

        made(self, *args, **kwargs)
        self.label_smoother = LabelSmoother(epsilon=0.1)

    language.Trainer.__init__ = smoothed


def mean_of_means() -> None:
    from stagecraft.training.language import LanguageTrainer

    def compute_loss(self: Any, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        return model(**inputs).loss / self.args.gradient_accumulation_steps

    LanguageTrainer.compute_loss = compute_loss


def trained_prompts() -> None:
    from stagecraft.training import language

    class Collator(language.DataCollatorForSeq2Seq):
        def __call__(self, rows: Any, *args: Any) -> Any:
            batch = super().__call__(rows, *args)
            return batch | {"labels": batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)}

    language.DataCollatorForSeq2Seq = Collator
