"""Causal attention over rows that stand end to end in one sequence, each seeing itself only.

A transformers attention implementation (name ROWS). Where the rows stand comes in as transformers' own keyword
cu_seq_lens_q; without it this is transformers' SDPA, masks included.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

ROWS = "rows_end_to_end"
_END_TO_END: ContextVar[bool] = ContextVar("end_to_end", default=False)
# Arguments of attention functions that change scores or weights in ways that neither kernel here knows.
_UNKNOWN = ("softcap", "s_aux", "position_bias", "cache_position_bias")


def register() -> None:
    """Make ROWS known to transformers."""
    AttentionInterface.register(ROWS, attend_within_rows)
    AttentionMaskInterface.register(ROWS, _mask)


@contextlib.contextmanager
def end_to_end() -> Iterator[None]:
    """No mask is built inside: rows are told apart by where they stand."""
    token = _END_TO_END.set(True)
    try:
        yield
    finally:
        _END_TO_END.reset(token)


def _mask(*args: Any, **kwargs: Any) -> Tensor | None:
    return None if _END_TO_END.get() else sdpa_mask(*args, **kwargs)


def attend_within_rows(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    cu_seq_lens_q: Tensor | None = None,
    max_length_q: int | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention of [1, heads, T, head size]; key and value may have fewer heads. Returns ([1, T, heads, size], None).

    `cu_seq_lens_q` [rows + 1]: where each row begins, and T; `max_length_q`: the longest row's length. Raises
    NotImplementedError for what would change the scores and is not known here.
    """
    if cu_seq_lens_q is None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    unknown = [name for name in _UNKNOWN if kwargs.get(name) is not None]
    if unknown:
        raise NotImplementedError(f"attention with {', '.join(unknown)}")
    window = sliding_window if sliding_window is not None and sliding_window < max_length_q else None
    if query.is_cuda and not dropout:
        if torch.is_autocast_enabled("cuda"):  # which knows SDPA, but not torch's kernel for rows
            query, key, value = (part.to(torch.get_autocast_dtype("cuda")) for part in (query, key, value))
        if _fits_flash(query):
            return _flash(query, key, value, cu_seq_lens_q, max_length_q, scaling, window), None
    # split, not slices: the gradient of a slice is a whole tensor of zeros, one for each row
    sizes = cu_seq_lens_q.diff().tolist()
    rows = zip(*(part.split(sizes, dim=2) for part in (query, key, value)), strict=True)
    attended = [
        scaled_dot_product_attention(
            q,
            k,
            v,
            attn_mask=_band(q.shape[2], window, q.device) if window else None,
            dropout_p=dropout,
            is_causal=not window,
            scale=scaling,
            enable_gqa=q.shape[1] != k.shape[1],
        )
        for q, k, v in rows
    ]
    return torch.cat(attended, dim=2).transpose(1, 2), None


def _fits_flash(query: Tensor) -> bool:
    """Whether torch's FlashAttention takes it: half precision, heads of whole 8s up to 256, Ampere or later."""
    size = query.shape[-1]
    is_half = query.dtype in (torch.bfloat16, torch.float16)
    return (
        is_half and size % 8 == 0 and size <= 256 and torch.cuda.get_device_capability(query.device)[0] >= 8
    )


def _flash(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    starts: Tensor,
    longest: int,
    scaling: float | None,
    window: int | None,
) -> Tensor:
    """torch's own FlashAttention for rows of different lengths."""
    from torch.nn.attention.varlen import varlen_attn

    return varlen_attn(
        *(part[0].transpose(0, 1) for part in (query, key, value)),
        starts,
        starts,
        longest,
        longest,
        scale=scaling,
        window_size=(window - 1 if window else -1, 0),
        enable_gqa=query.shape[1] != key.shape[1],
    )[None]


def _band(length: int, window: int, device: torch.device) -> Tensor:
    """[length, length]: True where a token sees another: itself and the window - 1 before it."""
    places = torch.arange(length, device=device)
    behind = places[:, None] - places[None, :]
    return (behind >= 0) & (behind < window)
