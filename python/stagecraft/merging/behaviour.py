"""Does the complete model answer as base and adapter together do? Asked of both, in a process of its own.

PEFT applies the adapter here, so the arithmetic of the merge is held against an implementation that shares nothing
with it, and the folder is loaded as a user would load it: configuration, tokenizer, ties and all.
"""

from __future__ import annotations

import gc
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stagecraft.errors import ProofFailed
from stagecraft.processes import die_with_parent

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# KL per token between base + adapter and the saved merge. Rounding gives 1e-12 in fp32 and up to 1e-3 in 16 bits; a
# wrong scale or a lost tensor gives .8 and more.
KL_LIMIT = {"float32": 1e-6, "float64": 1e-6, "bfloat16": 1e-2, "float16": 1e-2}
# The same for the scores of a reward model, relative to the larger of 1 and the largest score.
SCORE_LIMIT = {"float32": 1e-4, "float64": 1e-4, "bfloat16": 5e-2, "float16": 5e-2}
MAX_TOKENS = 128  # a text; logits of 150,000 words are 0.6 MB a token
TEXTS = (
    "The harbour was quiet that morning; only the gulls and the slow creak of ropes could be heard.",
    "To convert 37.5 degrees Celsius to Fahrenheit, multiply by 9, divide by 5 and add 32: 99.5.",
    "发烧三天以上，或者出现呼吸困难，应当尽快去医院就诊；平时多喝水，注意休息。",
    "def median(values):\n    ordered = sorted(values)\n    middle = len(ordered) // 2\n    return ordered[middle]\n",
    "Frage: Wie viele Beine hat eine Spinne? Antwort: acht. Pregunta: ¿y un insecto? Respuesta: seis.",
)
CHAT = [
    {"role": "user", "content": "Which is heavier, a kilogram of iron or a kilogram of feathers?"},
    {
        "role": "assistant",
        "content": "Neither: both weigh one kilogram. The feathers only take up more room.",
    },
]


@dataclass
class Question:
    """What to compare: everything a new process needs to know."""

    base: Path
    adapters: list[Path]
    weights: list[float]
    merged: Path
    dtype: str
    reward: bool = False
    head_rows: int | None = None  # labels of a head that the base does not have
    vocabulary: int | None = None  # rows of the embedding where they are not the base's
    device: str = "auto"
    trust_remote_code: bool = False
    prompt: str | None = None


def check_behaviour(question: Question) -> dict[str, Any]:
    """Ask in a clean process and judge. Returns the figures, with "answer" where there was a prompt.

    Raises ProofFailed where the merged model is not base + adapter.
    """
    # spawn: nothing of this process is there, least of all tensors that were read before.
    context = get_context("spawn")
    with ProcessPoolExecutor(max_workers=1, mp_context=context, initializer=die_with_parent) as pool:
        try:
            figures = pool.submit(_compare, question).result()
        except BrokenProcessPool:
            raise ProofFailed(
                "the process that loads base and model died (out of memory?); --no_validate merges without this check"
            ) from None
        except Exception as error:  # whatever a library says that can't load one of the two
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise ProofFailed(f"base, adapter or the written model does not load: {reason}") from None
    _judge(figures, question)
    return figures


def _judge(figures: dict[str, Any], question: Question) -> None:
    kind = "scores" if question.reward else "KL a token"
    limit = (SCORE_LIMIT if question.reward else KL_LIMIT)[question.dtype]
    gap, moved = figures["gap_to_adapter"], figures["gap_to_base"]
    if not gap <= limit:  # NaN fails too
        raise ProofFailed(
            f"the merged model is {gap:.3g} ({kind}) away from base + adapter, the limit in {question.dtype} is {limit:g}; "
            f"the base alone is {moved:.3g} away"
        )
    figures["limit"] = limit


def _compare(question: Question) -> dict[str, Any]:
    """Runs in the new process: on the GPU where there is one and it is large enough, else on the CPU."""
    from stagecraft.console import settle_libraries

    settle_libraries()
    import torch
    from transformers.utils import logging

    logging.disable_progress_bar()
    if question.device != "cpu" and torch.cuda.is_available():
        try:
            return _compare_on("cuda", question)
        except torch.OutOfMemoryError:
            gc.collect()
            torch.cuda.empty_cache()
    return _compare_on("cpu", question)


def _compare_on(device: str, question: Question) -> dict[str, Any]:
    """Logits of base, of base + adapters and of the merged model, and how far they lie apart."""
    from stagecraft import generation, models

    tokenizer = models.load_tokenizer(str(question.merged), question.trust_remote_code)
    model = _load(question, question.base, device)
    words = model.get_input_embeddings().num_embeddings
    longest = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    ids = [text[:, :longest] for text in probe(tokenizer)]
    ids = [text[:, text[0] < min(words, question.vocabulary or words)] for text in ids]
    untouched = None if question.reward else logits(model, ids)
    model = _with_adapters(model, question)
    wanted = logits(model, ids)
    if question.reward:  # the base with the trained head, else its random one would be compared
        untouched = _without_lora(model, ids)
    del model
    gc.collect()
    merged = _load(question, question.merged, device)
    found = logits(merged, ids)
    distance = _score_gap if question.reward else kl
    figures = {
        "gap_to_adapter": distance(wanted, found),
        "gap_to_base": distance(untouched, found),
        "tokens": sum(text.shape[1] for text in ids),
        "device": device,
    }
    if question.prompt is not None:
        messages = [{"role": "user", "content": question.prompt}]
        figures["answer"] = generation.stream_reply(merged, tokenizer, messages, max_new_tokens=256)
    return figures


def _load(question: Question, folder: Path, device: str) -> PreTrainedModel:
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    from stagecraft import models

    # The result's dtype for both, whatever configuration and files of the base say of theirs.
    settings: dict[str, Any] = {"dtype": question.dtype, "trust_remote_code": question.trust_remote_code}
    is_base = folder == question.base
    if not question.reward:
        model = models.load_whole(AutoModelForCausalLM, str(folder), **settings)
    elif is_base:
        labels = {} if question.head_rows is None else {"num_labels": question.head_rows}
        with models.without_load_report():  # the head is the adapter's
            model = AutoModelForSequenceClassification.from_pretrained(folder, **labels, **settings)
    else:
        model = models.load_whole(AutoModelForSequenceClassification, str(folder), **settings)
    return model.to(device).eval()


def _with_adapters(model: PreTrainedModel, question: Question) -> Any:
    from peft import PeftModel
    from peft.tuners.lora import LoraLayer

    if question.vocabulary:
        model.resize_token_embeddings(question.vocabulary, mean_resizing=False)
    first, *others = question.adapters
    model = PeftModel.from_pretrained(model, str(first), adapter_name="0")
    for number, adapter in enumerate(others, 1):
        model.load_adapter(str(adapter), adapter_name=str(number))
    if others or question.weights != [1.0]:
        model.base_model.set_adapter([str(number) for number in range(len(question.adapters))])
        for module in model.modules():
            if isinstance(module, LoraLayer):
                for name in module.scaling:
                    module.scaling[name] *= question.weights[int(name)]
    return model.eval()


def _without_lora(model: Any, ids: list[torch.Tensor]) -> list[torch.Tensor]:
    from peft.tuners.lora import LoraLayer

    for module in model.modules():
        if isinstance(module, LoraLayer):
            module.enable_adapters(False)
    return logits(model, ids)


def probe(tokenizer: PreTrainedTokenizerBase) -> list[torch.Tensor]:
    """Token ids [1, n] of a handful of fixed texts, and of a short conversation where there is a chat template."""
    import torch

    texts = list(TEXTS)
    if tokenizer.chat_template:
        texts.append(tokenizer.apply_chat_template(CHAT, tokenize=False))
    ids = [tokenizer(text, add_special_tokens=False)["input_ids"][:MAX_TOKENS] for text in texts]
    return [torch.tensor([text]) for text in ids if text]


def logits(model: PreTrainedModel, ids: list[torch.Tensor]) -> list[torch.Tensor]:
    """For each text, ids [1, n], what the model gives in float32: [n, words], or a classifier's [labels]."""
    import torch

    with torch.inference_mode():
        return [model(input_ids=text.to(model.device)).logits[0].float().cpu() for text in ids]


def kl(wanted: list[torch.Tensor], found: list[torch.Tensor]) -> float:
    """KL(wanted || found) a token in nats, mean over all tokens, over the words that both have."""
    import torch

    total, tokens = 0.0, 0
    for p, q in zip(wanted, found, strict=True):
        words = min(p.shape[1], q.shape[1])
        for some, others in zip(p[:, :words].split(16), q[:, :words].split(16), strict=True):
            left, right = some.double().log_softmax(-1), others.double().log_softmax(-1)
            total += torch.nn.functional.kl_div(right, left, log_target=True, reduction="sum").item()
            tokens += len(some)
    return total / tokens


def _score_gap(wanted: list[torch.Tensor], found: list[torch.Tensor]) -> float:
    import torch

    p, q = torch.cat(wanted), torch.cat(found)
    return ((p - q).abs().max() / max(1.0, p.abs().max())).item()
