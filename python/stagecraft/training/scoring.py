"""Losses from hidden states at supervised positions only: logits of other positions are never made.

Scoring takes the place of a causal model's forward for calls that bring labels; every other call is the model's own.
The head runs as a module, so adapters, quantised weights and ZeRO-3 work as ever.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

from stagecraft.errors import UserError
from stagecraft.training import trial

IN_CACHE = 1 << 17  # logits that several passes are made over: 512 KB in fp32
# Logits in memory at once; more positions are scored in pieces. 128 MB in fp32 on a CPU; 512 MB in bf16 and twice that
# for a moment in fp32 on a GPU. Where the head is trained, and in DPO, each piece is projected again for its gradient: a
# third of the head's work more.
LOGITS_AT_ONCE = {"cpu": 1 << 25, "cuda": 1 << 28}


@dataclass
class Scored(ModelOutput):
    """What a scored batch gives: a loss or, with fused_lm_head, values [rows, longest - 1] that are 0 where not supervised."""

    loss: Tensor | None = None
    log_probs: Tensor | None = None
    entropy: Tensor | None = None
    log_sum_sq_probs: Tensor | None = None
    mean_logits: Tensor | None = None
    is_top1: Tensor | None = None


class _LogProbs(torch.autograd.Function):
    """(log-probability of the target, mean over the vocabulary of log-probabilities), each [N], of logits [N, V].

    The gradient is written over the logits: nothing else may read them afterwards.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        parts = [(part.float().logsumexp(-1), part.float().mean(-1)) for part in _in_cache(logits)]
        total, mean = (torch.cat(values) for values in zip(*parts, strict=True))
        ctx.save_for_backward(logits, targets, total)
        return logits.gather(-1, targets[:, None])[:, 0].float() - total, mean - total

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, grad_mean: Tensor | None) -> tuple[Tensor, None]:
        logits, targets, total = ctx.saved_tensors
        out, width = logits.detach(), logits.shape[-1]
        grad = torch.zeros_like(total) if grad is None else grad
        both = grad if grad_mean is None else grad + grad_mean
        place = 0
        for part in _in_cache(out):
            rows = slice(place, place := place + len(part))
            wide = part.float()  # the same memory in fp32
            wide.sub_(total[rows, None]).exp_().mul_(-both[rows, None])
            wide.scatter_add_(-1, targets[rows, None], grad[rows, None])
            if grad_mean is not None:
                wide.add_(grad_mean[rows, None] / width)
            if wide is not part:
                part.copy_(wide)
        return out, None


class _SumOfPieces(torch.autograd.Function):
    """Sum of piece(hidden, targets) over pieces of at most `most` positions, for a head that is not trained.

    The gradient of a sum is known as soon as a piece's logits are there, so it is made then, and they are made once.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, targets: Tensor, piece: Callable[..., Tensor], most: int) -> Tensor:
        values, grads = [], []
        for part, wanted in zip(hidden.split(most), targets.split(most), strict=True):
            with torch.enable_grad():
                part = part.detach().requires_grad_()
                value = piece(part, wanted)
            grads += torch.autograd.grad(value, part)
            values.append(value.detach())
        ctx.save_for_backward(torch.cat(grads))
        return torch.stack(values).sum()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        return ctx.saved_tensors[0] * grad, None, None, None


def _in_cache(logits: Tensor) -> tuple[Tensor, ...]:
    """Logits [N, V] in views of some rows: on a CPU so few that several passes over them are made in its cache."""
    rows = len(logits) if logits.is_cuda else IN_CACHE // logits.shape[-1]
    return logits.split(max(1, rows))


class Scoring:
    """Scores supervised positions only when `model` is called with labels [rows, longest] (-100: not supervised).

    That gives a loss: the mean over supervised tokens, or their sum over num_items_in_batch. Smoothing is training's;
    evaluation tells the plain loss. With fused_lm_head=True, TRL's word for it, every position's values come back
    instead.
    """

    def __init__(self, model: PreTrainedModel, label_smoothing: float = 0.0) -> None:
        self.model, self.label_smoothing = model, label_smoothing
        self.own_forward = model.forward
        config = model.config.get_text_config()
        self.transform = _transform(config)
        self.is_checked, self.why_not = False, ""
        self.measures = True  # with fused_lm_head, more than log-probabilities
        if model.get_output_embeddings() is None or getattr(config, "output_router_logits", False):
            self._keep_own_loss("which has more in it than the labels")
            return

        @functools.wraps(self.own_forward)  # its signature is asked for
        def forward(*args: Any, **kwargs: Any) -> Any:
            return self.forward(*args, **kwargs)

        model.forward = forward

    def forward(self, *args: Any, labels: Tensor | None = None, **kwargs: Any) -> Any:
        """As the model's own forward, which it is without labels."""
        if labels is None:
            return self.own_forward(*args, **kwargs)
        if not self.is_checked:
            self._check(kwargs["input_ids"])
        if self.why_not:
            return self.own_forward(*args, labels=labels, **kwargs)
        count = kwargs.pop("num_items_in_batch", None)
        each = kwargs.pop("fused_lm_head", False)
        hidden = self.model.base_model(*args, **kwargs | {"use_cache": False}).last_hidden_state[:, :-1]
        targets = labels[:, 1:].to(hidden.device)
        supervised = targets != -100
        if each:
            scored = self._each(hidden[supervised], targets[supervised])
            return Scored(
                **{k: v.new_zeros(supervised.shape).masked_scatter(supervised, v) for k, v in scored.items()}
            )
        total = self._sum(hidden[supervised], targets[supervised])
        return Scored(loss=-total / (supervised.sum().clamp(min=1) if count is None else count))

    def _each(self, hidden: Tensor, targets: Tensor) -> dict[str, Tensor]:
        """Values [N] of `hidden` [N, H]."""
        head, measured = self.model.get_output_embeddings(), self.measures

        def piece(hidden: Tensor, targets: Tensor) -> tuple[Tensor, ...]:
            logits = self.transform(head(hidden))
            seen = _measures(logits, targets) if measured else ()  # before the gradient is written over them
            return (_LogProbs.apply(logits, targets)[0], *seen)

        names = ("log_probs", "entropy", "log_sum_sq_probs", "mean_logits", "is_top1")
        parts = self._in_pieces(piece, hidden, targets)
        return {
            name: torch.cat(values) for name, values in zip(names, zip(*parts, strict=True), strict=False)
        }

    def _sum(self, hidden: Tensor, targets: Tensor) -> Tensor:
        """Sum of log-probabilities, smoothed in training."""
        head = self.model.get_output_embeddings()
        smoothing = self.label_smoothing if self.model.training else 0.0

        def piece(hidden: Tensor, targets: Tensor) -> Tensor:
            log_probs, mean = _LogProbs.apply(self.transform(head(hidden)), targets)
            return (torch.lerp(log_probs, mean, smoothing) if smoothing else log_probs).sum()

        is_frozen = not any(weight.requires_grad for weight in head.parameters())
        if is_frozen and hidden.requires_grad and trial.is_possible():
            return _SumOfPieces.apply(hidden, targets, piece, self._most(hidden))
        return torch.stack(self._in_pieces(piece, hidden, targets)).sum()

    def _most(self, hidden: Tensor) -> int:
        """Positions whose logits may be in memory at once."""
        at_once = LOGITS_AT_ONCE["cuda" if hidden.is_cuda else "cpu"]
        return max(1, at_once // self.model.config.get_text_config().vocab_size)

    def _in_pieces(self, piece: Callable[..., Any], hidden: Tensor, targets: Tensor) -> list[Any]:
        most = self._most(hidden)
        if len(hidden) <= most:
            return [piece(hidden, targets)]
        return [
            checkpoint(piece, h, t, use_reentrant=False)
            for h, t in zip(hidden.split(most), targets.split(most), strict=True)
        ]

    def _check(self, input_ids: Tensor) -> None:
        """Compare with the model's own logits and loss; a model that knows better keeps its own. Raises UserError."""
        self.is_checked = True
        if not trial.is_possible():
            return
        few = input_ids[:1, : trial.TOKENS]
        with trial.trial(self.model):
            own = self.own_forward(input_ids=few, labels=few, use_cache=False)
            hidden = self.model.base_model(input_ids=few, use_cache=False).last_hidden_state
            logits = self.transform(self.model.get_output_embeddings()(hidden))
            loss = -_LogProbs.apply(logits[0, :-1], few[0, 1:].to(logits.device))[0].mean()
        off = max(abs(loss / own.loss - 1).item(), ((logits - own.logits).norm() / own.logits.norm()).item())
        if off <= 0.02:  # half precision's rounding gives 0.005
            return
        self._keep_own_loss(f"ours is off by {off:.1e}")

    def _keep_own_loss(self, why: str) -> None:
        name = type(self.model).__name__
        self.why_not = f"loss: {name}'s own, over every position ({why})"
        print(self.why_not, flush=True)
        if self.label_smoothing:
            raise UserError(f"--label_smoothing_factor: not for {name}, which makes its own loss")


@torch.no_grad()
def _measures(logits: Tensor, targets: Tensor) -> tuple[Tensor, ...]:
    """Entropy, log of the sum of squared probabilities, mean logit, and whether the target is the likeliest; each [N]."""
    parts = []
    for part in _in_cache(logits):
        wide = part.float()
        log_probs = wide.log_softmax(-1)
        probs = log_probs.exp()
        entropy, squares = -torch.linalg.vecdot(probs, log_probs), torch.linalg.vecdot(probs, probs)
        parts.append((entropy, squares.log(), wide.mean(-1), wide.argmax(-1)))
    entropy, squares, mean, likeliest = (torch.cat(values) for values in zip(*parts, strict=True))
    return entropy, squares, mean, likeliest == targets


def _transform(config: Any) -> Callable[[Tensor], Tensor]:
    """What a model does to its head's output: Cohere, Falcon-H1 and Granite scale it, Gemma bends it."""
    scale = 1.0
    for name, power in (("logit_scale", 1), ("lm_head_multiplier", 1), ("logits_scaling", -1)):
        scale *= float(getattr(config, name, None) or 1.0) ** power
    cap = getattr(config, "final_logit_softcapping", None)

    def transform(logits: Tensor) -> Tensor:
        logits = logits * scale if scale != 1.0 else logits
        return torch.tanh(logits / cap) * cap if cap else logits

    return transform
