"""DPO's and the reward model's trainers: TRL's own, on batches without padding."""

from __future__ import annotations

import copy
import os
import sys
from typing import Any

from datasets.fingerprint import Hasher
from peft import PeftModel
from transformers import PreTrainedModel
from trl import DPOTrainer, RewardTrainer

from stagecraft.models import train_in_fp32
from stagecraft.training.padding import Padding
from stagecraft.training.scoring import Scoring


class TokenisedDPOTrainer(DPOTrainer):
    """Takes rows that are tokenised already. `padding_free`: see padding.py. `reference_free`: a reference that finds
    every answer certain, and no model for it.
    """

    padding: Padding | None = None

    def __init__(self, *args: Any, padding_free: bool, reference_free: bool, **kwargs: Any) -> None:
        self.padding_free_wanted, self.reference_free = padding_free, reference_free
        super().__init__(*args, **kwargs)
        self._make_lean()
        train_in_fp32(self.model)

    def _make_lean(self) -> None:
        """Once the adapter is there and TRL has put its head in, whose CPU form scores every position, pads included."""
        if self.padding is None:
            base = _base_of(self.model)
            self.padding, self.scoring = Padding(base, self.padding_free_wanted), Scoring(base)
            if self.ref_model is not None:
                Padding(self.ref_model, self.padding_free_wanted)
                Scoring(self.ref_model).measures = False

    def compute_ref_log_probs(self, model: Any, inputs: Any) -> Any:
        """As TRL's; of a reference nothing else is asked."""
        self.scoring.measures = False
        try:
            return super().compute_ref_log_probs(model, inputs)
        finally:
            self.scoring.measures = True

    def _prepare_dataset(self, dataset: Any, *args: Any, **kwargs: Any) -> Any:
        return dataset  # TRL has no argument for it and would render the rows again

    def _precompute_ref_logps(self, dataset: Any, name: str, batch_size: int) -> Any:
        if self.reference_free:
            for column in ("ref_chosen_logps", "ref_rejected_logps"):
                dataset = dataset.add_column(column, [0.0] * len(dataset))
            return dataset
        self._make_lean()  # TRL calls this while it is being made
        dataset = copy.copy(dataset)  # TRL keeps the values under a key that knows rows and weights only
        settings = (self.ld_alpha, self.args.bf16, self.args.fp16)
        dataset._fingerprint = Hasher.hash((dataset._fingerprint, settings))
        print(f"reference: log-probabilities of {len(dataset):,} pairs ({name})", flush=True)
        if not self.accelerator.is_main_process or not sys.stderr.isatty():
            os.environ["TQDM_DISABLE"] = "1"  # a bar is for a person; TRL asks nothing else
        try:
            return super()._precompute_ref_logps(dataset, name, batch_size)
        finally:
            os.environ.pop("TQDM_DISABLE", None)


class ScoreTrainer(RewardTrainer):
    """`padding_free`: see padding.py."""

    def __init__(self, *args: Any, padding_free: bool, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        train_in_fp32(self.model)
        self.padding = Padding(_base_of(self.model), padding_free)


def _base_of(model: PreTrainedModel | PeftModel) -> PreTrainedModel:
    return model.get_base_model() if isinstance(model, PeftModel) else model
