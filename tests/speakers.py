"""Small models that know a few answers by heart, so that tests of chat know what to expect word for word."""

from __future__ import annotations

import shutil
from pathlib import Path

from stagecraft import generation, models

STEPS = 600  # at most; 100 to 300 suffice
KNOWN = 0.03  # nats a token, of every answer


def teach(base: Path, folder: Path, talks: list[list[str]], system: str = "") -> Path:
    """A copy of `base` trained on the last answer of each conversation (question, answer, ...) until it knows them."""
    import torch

    torch.manual_seed(0)
    tokenizer = models.load_tokenizer(str(base))
    model = models.load_causal(str(base), dtype="float32")
    texts, prompts = [], []
    for talk in talks:
        messages = [{"role": "system", "content": system}] if system else []
        messages += [
            {"role": "assistant" if i % 2 else "user", "content": text} for i, text in enumerate(talk)
        ]
        texts.append(tokenizer.apply_chat_template(messages, tokenize=False))
        prompts.append(generation.render_prompt(tokenizer, messages[:-1]))
    batch = tokenizer(texts, return_tensors="pt", padding=True, padding_side="right")
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    for row, prompt in zip(labels, prompts, strict=True):
        row[: len(tokenizer(prompt)["input_ids"])] = -100
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(STEPS):
        logits = model(**batch).logits[:, :-1].transpose(1, 2)
        losses = torch.nn.functional.cross_entropy(logits, labels[:, 1:], reduction="none").sum(1)
        losses = losses / (labels[:, 1:] != -100).sum(1)  # a long answer counts no more than a short one
        if losses.max() < KNOWN:
            break
        losses.mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses.max() < KNOWN, f"it has not learnt its answers (losses {losses.tolist()})"
    shutil.copytree(base, folder)
    model.save_pretrained(folder)
    return folder
