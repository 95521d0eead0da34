"""A model that computes no padding: a batch's rows go through its layers end to end, as one sequence.

Batches stay what collators make of them, [rows, longest row] with an attention mask; so do hidden states, with zeros
where padding was. Between the embedding and the last layer there are real tokens only. Any trainer can use it, and
wrappers (PEFT, DDP, DeepSpeed) do not notice.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from stagecraft.training import row_attention, trial

# Layers that mix tokens in other ways (linear attention, convolutions) would mix neighbouring rows.
LAYERS = {"full_attention", "sliding_attention"}
CHECKED_ROWS = 2
# Hidden states of a row computed alone and between others: rounding differs, 1e-6 seen; a neighbour seen gives 0.1.
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.05, torch.float16: 0.02}


class Padding:
    """The forward of `model`'s layers without padding; `why_not` says why batches are padded after all."""

    def __init__(self, model: PreTrainedModel, wanted: bool = True) -> None:
        self.layers = model.base_model
        self.padded_forward = self.layers.forward
        self.why_not = _reason_against(self.layers) if wanted else "batches are padded, as asked"
        self.real = self.padded = 0  # tokens of training batches, without and with padding
        self.is_checked = False
        self.implementation = self.layers.config._attn_implementation or "eager"
        # With flash_attn transformers' own function takes rows end to end, by the same keywords.
        if not self.why_not and "flash" not in self.implementation:
            row_attention.register()
            self.layers.set_attn_implementation(row_attention.ROWS)

        @functools.wraps(self.padded_forward)  # its signature is asked for
        def forward(*args: Any, **kwargs: Any) -> Any:
            return self.forward(*args, **kwargs)

        self.layers.forward = forward

    @property
    def share(self) -> float:
        """Padding in the training batches so far, as a share of their tokens."""
        return 1 - self.real / self.padded if self.padded else 0.0

    @property
    def computed(self) -> float:
        """Padding among the tokens that went through the layers."""
        return self.share if self.why_not else 0.0

    def describe(self) -> str:
        """What to tell on the terminal before training."""
        if self.why_not:
            return f"padding: {self.why_not}"
        way = (
            "FlashAttention"
            if "flash" in self.implementation or self.layers.device.type == "cuda"
            else "SDPA"
        )
        return f"padding: none, rows run end to end ({way} within each)"

    def outcome(self) -> str:
        """What to tell after it."""
        what = "of the tokens computed" if self.why_not else "of the batches, left out"
        return f"padding: {self.share:.0%} {what}"

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """As the layers' own forward; [rows, longest] without its padding where nothing asked for needs it."""
        whole = {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "position_ids": position_ids,
            "past_key_values": past_key_values,
            "inputs_embeds": inputs_embeds,
            "use_cache": use_cache,
            **kwargs,
        }
        wants_more = any(kwargs.get(f"output_{name}") for name in ("hidden_states", "attentions"))
        is_batch = input_ids is not None and attention_mask is not None and attention_mask.dim() == 2
        if not is_batch or use_cache or wants_more or position_ids is not None:
            return self.padded_forward(**whole)
        rows = Rows(attention_mask)
        if self.layers.training:
            self.real += rows.tokens
            self.padded += attention_mask.numel()
        if self.why_not:
            return self.padded_forward(**whole)
        if rows.tokens == attention_mask.numel():
            return self.padded_forward(**{**whole, "attention_mask": None, "use_cache": False})
        if not self.is_checked:
            self._check(input_ids, rows)
            if self.why_not:
                return self.padded_forward(**whole)
        return self._end_to_end(input_ids, rows, kwargs)

    def _end_to_end(self, input_ids: Tensor, rows: Rows, kwargs: dict[str, Any]) -> Any:
        embedding = self.layers.get_input_embeddings()
        if self.layers.training and getattr(embedding, "neftune_noise_alpha", None):
            # NEFTune's noise depends on the length of what is embedded: embedded as a padded batch it stays the same.
            inputs = {"inputs_embeds": rows.joined(embedding(input_ids))}
        else:
            inputs = {"input_ids": rows.joined(input_ids)}
        with row_attention.end_to_end():
            output = self.padded_forward(
                **inputs,
                position_ids=rows.positions,
                use_cache=False,
                cu_seq_lens_q=rows.starts,
                cu_seq_lens_k=rows.starts,
                max_length_q=rows.longest,
                max_length_k=rows.longest,
                **kwargs,
            )
        output.last_hidden_state = rows.apart(output.last_hidden_state)
        return output

    def _check(self, input_ids: Tensor, rows: Rows) -> None:
        """Compare rows between others with each alone: an architecture may mix them."""
        self.is_checked = True
        if not trial.is_possible():
            return
        ids = [
            row[mask][: trial.TOKENS]
            for row, mask in zip(input_ids[:CHECKED_ROWS], rows.mask[:CHECKED_ROWS], strict=True)
        ]
        few = nn.utils.rnn.pad_sequence(ids, batch_first=True)
        sizes = torch.tensor([len(row) for row in ids], device=few.device)
        mask = torch.arange(few.shape[1], device=few.device) < sizes[:, None]
        with trial.trial(self.layers):
            try:
                together = self._end_to_end(few, Rows(mask), {}).last_hidden_state
            except NotImplementedError as error:
                self.why_not = _advised(f"{error} has no form for rows end to end")
            for i, row in enumerate(ids if not self.why_not else ()):
                alone = self.padded_forward(input_ids=row[None], use_cache=False).last_hidden_state[0]
                off = (together[i, : len(row)] - alone).norm() / alone.norm()
                if not off <= TOLERANCE[_computed_in(alone)]:
                    self.why_not = _advised(f"rows end to end would change its states by {off:.1e}")
        if self.why_not:
            self.layers.set_attn_implementation(self.implementation)
            print(self.describe(), flush=True)


class Rows:
    """Where the rows of a padded batch stand when they are joined. `mask` [rows, longest]: true at real tokens."""

    def __init__(self, mask: Tensor) -> None:
        self.mask = mask.bool()
        sizes = self.mask.sum(1)
        self.places = self.mask.flatten().nonzero()[:, 0]  # of real tokens in the flat batch
        self.tokens = len(self.places)
        self.longest = int(sizes.max())
        self.starts = nn.functional.pad(sizes.cumsum(0), (1, 0)).to(torch.int32)
        self.positions = (self.mask.cumsum(1) - 1).flatten()[self.places][None]

    def joined(self, batch: Tensor) -> Tensor:
        """[rows, longest, ...] -> [1, tokens, ...]"""
        return batch.flatten(0, 1)[self.places][None]

    def apart(self, joined: Tensor) -> Tensor:
        """[1, tokens, ...] -> [rows, longest, ...], zeros at padding"""
        flat = joined.new_zeros((self.mask.numel(), *joined.shape[2:]))
        return flat.index_copy(0, self.places, joined[0]).unflatten(0, self.mask.shape)


def _computed_in(states: Tensor) -> torch.dtype:
    """The dtype whose rounding is in hidden states: under autocast they come out in the weights' own."""
    kind = states.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else states.dtype


def _reason_against(layers: PreTrainedModel) -> str:
    """Why these layers can't take rows end to end; empty where they can, as far as their configuration tells."""
    config = layers.config.get_text_config()
    kinds = set(getattr(config, "layer_types", None) or ()) - LAYERS
    said = ""
    if not getattr(layers, "_supports_attention_backend", False) or not layers._can_set_attn_implementation():
        said = f"{type(layers).__name__} brings its own attention"
    elif kinds:
        said = f"{type(layers).__name__} has layers of {', '.join(sorted(kinds))}"
    elif getattr(config, "output_router_logits", False):
        said = "its experts' balance is counted over padded batches"
    return _advised(said) if said else ""


def _advised(reason: str) -> str:
    return f"batches are padded ({reason}); --train_sampling_strategy group_by_length pads less"
