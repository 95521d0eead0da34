"""PT's and SFT's trainer: transformers' own, on batches without padding, with a loss of supervised positions only."""

from __future__ import annotations

from peft import PeftModel
from transformers import (
    DataCollatorForSeq2Seq,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
    TrainingArguments,
)

from stagecraft.data.corpus import Corpus
from stagecraft.training.padding import Padding
from stagecraft.training.scoring import Scoring


class LanguageTrainer(Trainer):
    """Trains on a corpus of input_ids and labels. `padding_free`: see padding.py; false pads as transformers does."""

    def __init__(
        self,
        model: PreTrainedModel | PeftModel,
        args: TrainingArguments,
        corpus: Corpus,
        tokenizer: PreTrainedTokenizerBase,
        padding_free: bool,
    ) -> None:
        # transformers smooths labels over the logits of every position; here the loss does it where it is made.
        smoothing, args.label_smoothing_factor = args.label_smoothing_factor, 0.0
        super().__init__(
            model=model,
            args=args,
            train_dataset=corpus.train,
            eval_dataset=corpus.valid,
            processing_class=tokenizer,
            data_collator=DataCollatorForSeq2Seq(tokenizer, pad_to_multiple_of=8),
        )
        base = model.get_base_model() if isinstance(model, PeftModel) else model
        self.padding = Padding(base, padding_free)
        Scoring(base, smoothing)
