"""A pass on trial: before anything is learnt, a few tokens are computed in two ways and compared."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import nn

TOKENS = 32  # of a row, at most


def is_possible() -> bool:
    """Not under ZeRO-3: its engine expects the same modules in the same order in every pass."""
    from transformers.integrations import is_deepspeed_zero3_enabled

    return not is_deepspeed_zero3_enabled()


@contextlib.contextmanager
def trial(module: nn.Module) -> Iterator[None]:
    """No gradients and no dropout inside."""
    modes = {part: part.training for part in module.modules()}
    module.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for part, mode in modes.items():
            part.training = mode
