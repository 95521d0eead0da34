"""Batches of prompts, replies and log-probabilities: what evaluation and chat ask of a model.

Texts are split into batches by length, so that little of a batch is padding. Scoring pads on the right (causal
attention never looks there); generation pads on the left, so that every prompt ends where its reply begins.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stagecraft import models
from stagecraft.console import settle_libraries
from stagecraft.data.rows import Message
from stagecraft.errors import UserError

if TYPE_CHECKING:
    import torch
    from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

Progress = Callable[[int], Any]  # called with the number of rows (of a long document: windows) just finished
# What computes the rows of these numbers as one batch, and what is asked for a batch instead of calling it at once:
# evaluation keeps finished batches on the disk, so that an interrupted one goes on. Results are JSON's own types.
Compute = Callable[[list[int]], list[Any]]
Keep = Callable[[list[int], Compute], list[Any]]

# Logits of one scoring batch: 2**26 float32 are 256 MB. One row may exceed it; it then goes alone.
MAX_LOGITS = 1 << 26
# A document longer than this is scored in windows, whatever the model could hold.
MAX_WINDOW = 2048
# After so many tokens the rows that have ended leave a batch, and hold it up no longer. Of 8 to 48 the fewest that
# cost nothing where all replies are equally long; 302 replies of 1 to 40 tokens took .88 s instead of 1.13.
TOGETHER = 16
INDEX = "model.safetensors.index.json"


@dataclass(frozen=True)
class Likelihood:
    """What a model thinks of a text. nats: log-probability of its tokens, summed; end: of the end of turn after it."""

    nats: float
    tokens: int
    end: float = 0.0


@dataclass(frozen=True)
class Reply:
    """A greedy reply. tokens: how many were written, a stop token not counted; stopped: by itself, not at the limit."""

    text: str
    tokens: int
    stopped: bool


def require_usable(path: str, flag: str, reward: bool = False, tokenizer_path: str | None = None) -> None:
    """Check cheaply, before torch is imported, that a folder is a complete model with a chat template.

    `reward`: it must be a reward model, otherwise it must be none (transformers would load one for the other and
    fill in random weights). `tokenizer_path`: the folder of another tokenizer, where an adapter brings one. Raises
    UserError listing what is wrong.
    """
    folder, words = Path(path), Path(tokenizer_path or path)
    if not folder.is_dir():
        raise UserError(
            f"{flag} {path}: no such folder; a stage leaves its model in outputs-STAGE/RECIPE/model (`make status`), "
            "build_base.py fetches one from the hub"
        )
    models.require_model_folder(path, flag)
    faults = []
    try:
        config, tokenizer = (
            json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
            for file in (folder / "config.json", words / "tokenizer_config.json")
        )
        shards = json.loads(index.read_text())["weight_map"] if (index := folder / INDEX).exists() else {}
    except (ValueError, KeyError) as error:
        raise UserError(
            f"{flag} {path}: a .json file in it is damaged ({error}); make the model again"
        ) from None
    lost = sorted(name for name in set(shards.values()) if not (folder / name).exists())
    if lost:
        faults.append(f"{flag} {path}: not a complete model folder: {', '.join(lost)} missing")
    kind = " ".join(config.get("architectures") or [])
    if reward != ("SequenceClassification" in kind) and kind:
        faults.append(
            f"{flag} {path}: {'not a reward model' if reward else 'a reward model, which writes no text'} ({kind})"
        )
    templates = [words / "chat_template.jinja", words / "chat_template.json"]
    if not tokenizer.get("chat_template") and not any(file.exists() for file in templates):
        faults.append(
            f"{flag} {words}: its tokenizer has no chat template, so it can't be asked as it was trained; SFT with "
            "--template_name leaves a model with one"
        )
    if faults:
        raise UserError(*faults)


def load(
    load_model: Callable[..., Any], path: str, dtype: str, flag: str, tokenizer_path: str | None = None
) -> tuple[Any, Any]:
    """(model, tokenizer) by models.load_causal or models.load_reward. Raises UserError for what can't be loaded."""
    settle_libraries()
    from safetensors import SafetensorError
    from transformers.utils import logging

    logging.disable_progress_bar()
    try:
        return load_model(path, dtype=dtype), models.load_tokenizer(tokenizer_path or path)
    except (OSError, ValueError, SafetensorError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"{flag} {path}: can't be loaded: {reason}") from None


def render_prompt(tokenizer: PreTrainedTokenizerBase, messages: list[Message]) -> str:
    """The conversation as the model sees it, up to where the assistant's next words begin."""
    return tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)


def end_of_turn(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The token that the chat template puts after an assistant's words, as a list; empty where it has none."""
    probe = "a1"
    messages = [{"role": "user", "content": "q1"}, {"role": "assistant", "content": probe}]
    after = tokenizer.apply_chat_template(messages, tokenize=False).rpartition(probe)[2]
    ids = tokenizer(after, add_special_tokens=False)["input_ids"]
    special = {*tokenizer.all_special_ids, *tokenizer.get_added_vocab().values()}
    return ids[:1] if ids and ids[0] in special else []


def stop_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Token ids that end a reply: the template's end of turn, the tokenizer's eos and the model's own."""
    return stops_of(model.generation_config, tokenizer)


def stops_of(settings: GenerationConfig, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The same by the model's generation_config.json."""
    own = settings.eos_token_id
    own = own if isinstance(own, list) else [own]
    ids = [*end_of_turn(tokenizer), tokenizer.eos_token_id, *own]
    return list(dict.fromkeys(token for token in ids if token is not None))


def generate_replies(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[list[Message]],
    max_new_tokens: int = 64,
    batch_size: int = 32,
    progress: Progress | None = None,
    padding_side: str = "left",
    keep: Keep | None = None,
) -> list[Reply]:
    """The model's greedy reply to each conversation, without special tokens, in the order of `prompts`.

    Greedy means greedy: the sampling settings and the repetition penalty that a model folder may bring are set
    aside. A batch equals one prompt at a time as far as the arithmetic does (near-ties in bf16 may differ).
    """
    ids = prompt_ids(tokenizer, prompts)
    stops = stop_ids(model, tokenizer)

    def compute(batch: list[int]) -> list[Any]:
        written = _write(model, tokenizer, [ids[i] for i in batch], max_new_tokens, padding_side)
        return [read_reply(tokenizer, words, stops) for words in written]

    return [Reply(*found) for found in in_batches(_batches(ids, batch_size), compute, progress, keep)]


def prompt_ids(tokenizer: PreTrainedTokenizerBase, prompts: list[list[Message]]) -> list[list[int]]:
    """The token ids of conversations up to where the next reply begins."""
    return _tokenise(tokenizer, [render_prompt(tokenizer, messages) for messages in prompts])


def read_reply(tokenizer: PreTrainedTokenizerBase, written: list[int], stops: list[int]) -> tuple[Any, ...]:
    """(text, tokens, whether it stopped by itself) of what a model wrote; after the first stop token nothing counts."""
    end = next((i for i, token in enumerate(written) if token in stops), None)
    text = tokenizer.decode(written if end is None else written[: end + 1], skip_special_tokens=True)
    return text.strip(), len(written) if end is None else end, end is not None


def _write(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    ids: list[list[int]],
    max_new_tokens: int,
    padding_side: str,
) -> list[list[int]]:
    """What the model writes after each prompt of a batch. Rows that have ended leave it every TOGETHER tokens."""
    import torch

    tokens, mask = (part.to(model.device) for part in _pad(ids, tokenizer.pad_token_id, padding_side))
    width, stops = tokens.shape[1], torch.tensor(stop_ids(model, tokenizer), device=model.device)
    written: list[list[int]] = [[] for _ in ids]
    rows = torch.arange(len(ids), device=model.device)  # which rows are still in the batch
    cache = None
    while True:
        left = min(TOGETHER, max_new_tokens + width - tokens.shape[1])
        with torch.inference_mode(), _settings(model, greedy(model, tokenizer, left)):
            out = model.generate(
                input_ids=tokens, attention_mask=mask, past_key_values=cache, return_dict_in_generate=True
            )
        new = out.sequences[:, tokens.shape[1] :]
        tokens, cache = out.sequences, out.past_key_values
        open_ = ~torch.isin(new, stops).any(1)
        over = tokens.shape[1] - width >= max_new_tokens or not open_.any()
        for row, words in zip(rows.tolist(), tokens[:, width:].tolist(), strict=True):
            written[row] = words  # of a row that has ended, what follows its stop token is padding
        if over:
            return written
        mask = torch.cat([mask, torch.ones_like(new)], dim=1)
        if not open_.all() and hasattr(cache, "batch_select_indices"):
            kept = open_.nonzero()[:, 0]
            cache.batch_select_indices(kept)
            tokens, mask, rows = tokens[kept], mask[kept], rows[kept]


def stream_reply(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    messages: list[Message],
    max_new_tokens: int,
    temperature: float = 0.0,
    streamer: Any = None,
) -> str:
    """One reply; `streamer` (transformers' TextStreamer) prints it as it comes. Temperature 0 is greedy.

    With a temperature, top_p and the like are the model's own. The oldest exchanges are left out where the
    conversation and its reply would not fit the model. Raises UserError where the last question alone does not.
    """
    import torch

    prompt = _fit(model, tokenizer, messages, max_new_tokens)
    settings = greedy(model, tokenizer, max_new_tokens)
    if temperature > 0:
        settings = type(settings).from_dict(model.generation_config.to_dict())
        settings.update(
            do_sample=True, temperature=temperature, max_new_tokens=max_new_tokens, max_length=None
        )
        settings.update(eos_token_id=stop_ids(model, tokenizer), pad_token_id=tokenizer.pad_token_id)
    tokens = torch.tensor([prompt], device=model.device)
    with torch.inference_mode(), _settings(model, settings):
        out = model.generate(input_ids=tokens, attention_mask=torch.ones_like(tokens), streamer=streamer)
    return tokenizer.decode(out[0, len(prompt) :], skip_special_tokens=True).strip()


def greedy(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, max_new_tokens: int
) -> GenerationConfig:
    """Settings of a reproducible reply: the likeliest token each time, until a stop token or the limit."""
    from transformers import GenerationConfig

    return GenerationConfig(
        do_sample=False,
        max_new_tokens=max_new_tokens,
        eos_token_id=stop_ids(model, tokenizer),
        pad_token_id=tokenizer.pad_token_id,
        use_cache=True,  # a folder left by training may say false
    )


def reply_logprobs(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    pairs: list[tuple[list[Message], str]],
    batch_size: int = 32,
    progress: Progress | None = None,
    keep: Keep | None = None,
) -> list[Likelihood]:
    """The log-probability (nats) of each text as the assistant's reply to its conversation, and of its end of turn.

    The words and the end of turn are told apart: the end is equal for all replies and unknown to a model before SFT.
    """
    prompts = [render_prompt(tokenizer, messages) for messages, _ in pairs]
    texts = [prompt + reply for prompt, (_, reply) in zip(prompts, pairs, strict=True)]
    encoded = tokenizer(texts, add_special_tokens=False, return_offsets_mapping=True) if texts else {}
    # Tokenised in one piece, as in training; a token belongs to the reply when it reaches past the prompt.
    starts = [
        next(i for i, (_, end) in enumerate(offsets) if end > len(prompt))
        for prompt, offsets in zip(prompts, encoded.get("offset_mapping", []), strict=True)
    ]
    ending = end_of_turn(tokenizer)
    rows = [[*ids, *ending] for ids in encoded.get("input_ids", [])]
    words = [len(row) - len(ending) - start for row, start in zip(rows, starts, strict=True)]

    def compute(batch: list[int]) -> list[Any]:
        scores = token_logprobs(model, [rows[i] for i in batch], [starts[i] for i in batch])
        return [
            (float(found[: words[i]].double().sum()), words[i], float(found[words[i] :].double().sum()))
            for i, found in zip(batch, scores, strict=True)
        ]

    batches = _batches(rows, batch_size, model.config.get_text_config().vocab_size)
    return [Likelihood(*found) for found in in_batches(batches, compute, progress, keep)]


def document_logprobs(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: list[str],
    batch_size: int = 32,
    progress: Progress | None = None,
    keep: Keep | None = None,
) -> list[Likelihood]:
    """The log-probability (nats) of each document with its end-of-text token.

    The first token follows nothing and is not scored. A document longer than the model's positions (or
    MAX_WINDOW) is scored in windows that share one token, so every other token is scored once.
    """
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None) or MAX_WINDOW
    step = min(positions, MAX_WINDOW) - 1
    windows: list[list[int]] = []
    owners: list[int] = []
    for owner, ids in enumerate(_tokenise(tokenizer, texts)):
        ids = [*ids, tokenizer.eos_token_id]
        for start in range(0, len(ids) - 1, step):
            windows.append(ids[start : start + step + 1])
            owners.append(owner)

    def compute(batch: list[int]) -> list[Any]:
        scores = token_logprobs(model, [windows[i] for i in batch], [1] * len(batch))
        return [(float(found.double().sum()), len(found)) for found in scores]

    batches = _batches(windows, batch_size, model.config.get_text_config().vocab_size)
    totals = [(0.0, 0)] * len(texts)
    for owner, (nats, count) in zip(owners, in_batches(batches, compute, progress, keep), strict=True):
        totals[owner] = (totals[owner][0] + nats, totals[owner][1] + count)
    return [Likelihood(nats, count) for nats, count in totals]


def token_logprobs(model: PreTrainedModel, rows: list[list[int]], starts: list[int]) -> list[torch.Tensor]:
    """Log-probability (nats, float32, on the CPU) of each row's tokens from its start (1 or later) to its end; one batch.

    Logits are made from the batch's first scored position on, not for the prompts.
    """
    import torch

    tokens, mask = _pad(rows, 0, "right")
    first = min(starts)
    scores = []
    with torch.inference_mode():
        out = model(
            input_ids=tokens.to(model.device),
            attention_mask=mask.to(model.device),
            logits_to_keep=torch.arange(first - 1, tokens.shape[1] - 1, device=model.device),
            use_cache=False,
        )
        for row, start, ids, logits in zip(rows, starts, tokens, out.logits, strict=True):
            logits = logits[start - first : len(row) - first].float()
            wanted = ids[start : len(row), None].to(logits.device)
            scores.append((logits.gather(-1, wanted)[:, 0] - logits.logsumexp(-1)).cpu())
    return scores


def reward_scores(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    pairs: list[tuple[list[Message], str]],
    batch_size: int = 32,
    progress: Progress | None = None,
    keep: Keep | None = None,
) -> list[float]:
    """A reward model's score of each text as the assistant's reply, read at its end of turn as in training."""
    import torch

    config = model.config.get_text_config()
    if config.pad_token_id is None:  # the model finds a row's end by it
        config.pad_token_id = tokenizer.pad_token_id
    ending = end_of_turn(tokenizer)
    ids = _tokenise(tokenizer, [render_prompt(tokenizer, messages) + reply for messages, reply in pairs])
    ids = [[*row, *ending] for row in ids]

    def compute(batch: list[int]) -> list[Any]:
        tokens, mask = _pad([ids[i] for i in batch], config.pad_token_id, "right")
        with torch.inference_mode():
            out = model(
                input_ids=tokens.to(model.device), attention_mask=mask.to(model.device), use_cache=False
            )
        return out.logits[:, 0].float().tolist()

    return in_batches(_batches(ids, batch_size), compute, progress, keep)


def in_batches(
    batches: Iterable[list[int]], compute: Compute, progress: Progress | None = None, keep: Keep | None = None
) -> list[Any]:
    """A result a row, in the order of the rows; `batches` name every row once."""
    results: dict[int, Any] = {}
    for batch in batches:
        results |= zip(batch, keep(batch, compute) if keep else compute(batch), strict=True)
        if progress:
            progress(len(batch))
    return [results[i] for i in range(len(results))]


def _tokenise(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[list[int]]:
    return tokenizer(texts, add_special_tokens=False)["input_ids"] if texts else []


def _batches(rows: list[list[int]], batch_size: int, vocabulary: int = 0) -> Iterator[list[int]]:
    """Indices of rows, longest first (a batch that does not fit in memory fails at once), in batches.

    With `vocabulary`, a batch's logits stay under MAX_LOGITS.
    """
    order = sorted(range(len(rows)), key=lambda i: -len(rows[i]))
    while order:
        size = batch_size
        if vocabulary:
            size = max(1, min(size, MAX_LOGITS // (len(rows[order[0]]) * vocabulary)))
        yield order[:size]
        order = order[size:]


def _pad(rows: list[list[int]], pad_id: int, side: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and attention mask, both (rows, longest), int64."""
    import torch

    width = max(map(len, rows))
    tokens = torch.full((len(rows), width), pad_id)
    mask = torch.zeros((len(rows), width), dtype=torch.long)
    for i, row in enumerate(rows):
        place = slice(width - len(row), width) if side == "left" else slice(0, len(row))
        tokens[i, place] = torch.tensor(row)
        mask[i, place] = 1
    return tokens, mask


def _fit(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, messages: list[Message], max_new_tokens: int
) -> list[int]:
    """The prompt's tokens, the oldest exchanges left out until the prompt and its reply fit the model."""
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    system = [message for message in messages[:1] if message["role"] == "system"]
    rest = messages[len(system) :]
    while True:
        ids = _tokenise(tokenizer, [render_prompt(tokenizer, [*system, *rest])])[0]
        if positions is None or len(ids) + max_new_tokens <= positions:
            return ids
        if len(rest) < 3:
            raise UserError(
                f"the question is {len(ids):,} tokens long; with --max_new_tokens {max_new_tokens} the model holds "
                f"{positions:,}: shorten it, or lower --max_new_tokens"
            )
        rest = rest[2:]


@contextmanager
def _settings(model: PreTrainedModel, settings: GenerationConfig) -> Iterator[None]:
    """Generate with these settings alone: what generate() is given is filled up from the model's own otherwise."""
    own = model.generation_config
    model.generation_config = settings
    try:
        yield
    finally:
        model.generation_config = own
