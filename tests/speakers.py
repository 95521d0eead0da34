"""Small models that know a few answers by heart, so that tests of chat know what to expect word for word."""

from __future__ import annotations

import shutil
from pathlib import Path

from stagecraft import models

STEPS = 200  # to a loss below 0.02; about 2 s


def teach(base: Path, folder: Path, talks: list[list[str]], system: str = "") -> Path:
    """A copy of `base` trained on conversations (question, answer, question, ...) until it knows them."""
    import torch

    torch.manual_seed(0)
    tokenizer = models.load_tokenizer(str(base))
    model = models.load_causal(str(base), dtype="float32")
    texts = []
    for talk in talks:
        messages = [{"role": "system", "content": system}] if system else []
        messages += [
            {"role": "assistant" if i % 2 else "user", "content": text} for i, text in enumerate(talk)
        ]
        texts.append(tokenizer.apply_chat_template(messages, tokenize=False))
    batch = tokenizer(texts, return_tensors="pt", padding=True, padding_side="right")
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(STEPS):
        loss = model(**batch, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert loss.item() < 0.1, f"it has not learnt its answers (loss {loss.item():.2f})"
    shutil.copytree(base, folder)
    model.save_pretrained(folder)
    return folder
