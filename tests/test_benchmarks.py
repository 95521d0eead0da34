"""The ruler of benchmarks/train_throughput.py: what its observer and its ceiling count."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
OBSERVE = ROOT / "benchmarks" / "peers" / "observe.py"
# Four rows of 3, 9, 5 and 7 tokens, of which the last 2 of each are supervised, two epochs.
TRAINING = """
import time, torch
from transformers import DataCollatorForSeq2Seq, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers import Trainer, TrainingArguments
from tokenizers import Tokenizer, models
words = Tokenizer(models.WordLevel({"<pad>": 0, "<unk>": 1, "a": 2}, unk_token="<unk>"))
tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", unk_token="<unk>")
config = LlamaConfig(vocab_size=3, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
rows = [{"input_ids": [2] * n, "labels": [-100] * (n - 2) + [2] * 2} for n in (3, 9, 5, 7)]
args = TrainingArguments(
    output_dir="out", per_device_train_batch_size=4, num_train_epochs=2, use_cpu=True, report_to="none",
    save_strategy="no", logging_steps=1, dataloader_pin_memory=False, disable_tqdm=True,
)
collator = DataCollatorForSeq2Seq(tokenizer)
trainer = Trainer(LlamaForCausalLM(config), args, collator, rows, processing_class=tokenizer)
trainer.model(torch.tensor([[2]]))  # a forward pass before training, as a reference has
time.sleep(1)
trainer.train()
"""


def observe(folder: Path) -> dict:
    (folder / "training.py").write_text(TRAINING)
    command = [sys.executable, str(OBSERVE), "report.json", "training.py"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads((folder / "report.json").read_text())


def test_the_observer_counts_what_went_through_the_model(tmp_path: Path) -> None:
    """In one batch of four each row is as long as the longest: 36 tokens an epoch, of which 24 are the rows'."""
    report = observe(tmp_path)
    assert (report["steps"], report["through"]) == (2, 2 * 4 * 9)
    assert (report["real"], report["supervised"]) == (2 * 24, 2 * 8)
    # A forward pass before training is part of the whole, not of the loop.
    assert report["whole"] >= report["loop"] + 1
    assert report["peak_mb"] > 50 and report["last_loss"] > 0 and report["gpu_mb"] is None


def test_the_ceiling_counts_every_product(monkeypatch: pytest.MonkeyPatch) -> None:
    """As many weights as the linear layers and the head of Qwen2.5-7B have: all but table, biases and norms."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import merge
    from peers import ceiling

    found = ceiling.products(merge.config_of(merge.QWEN_7B))
    assert sum(wide * narrow * count for (wide, narrow), count in found.items()) == 7_070_285_824
    assert found[(18944, 3584)] == 2 * 28 and found[(512, 3584)] == 2 * 28
