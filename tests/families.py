"""What the tests of chat templates share: a small tokenizer for each model family, turns, tools."""

from __future__ import annotations

import json
from functools import cache
from typing import TYPE_CHECKING, Any

from documents import DOCUMENTS

if TYPE_CHECKING:
    from stagecraft.chat.templates import Encoded

CHATML = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
THINK = ["<think>", "</think>", "<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>"]
LLAMA3 = ["<|begin_of_text|>", "<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>"]
ROLES = ["<|system|>", "<|user|>", "<|assistant|>"]
MISTRAL = ["[INST]", "[/INST]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]", "[TOOL_CALLS]", "[TOOL_RESULTS]"]
# name -> (special tokens; bos and eos first), (added tokens that are not special)
SPECIAL: dict[str, tuple[list[str], list[str]]] = {
    "qwen": (CHATML, []),
    "qwen3": (CHATML, THINK),
    "chatml": (CHATML, []),
    "llama3": (LLAMA3, []),
    "llama3.1": (LLAMA3, []),
    "mistral": (["<s>", "</s>", *MISTRAL, "[/TOOL_RESULTS]"], []),
    "gemma": (["<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>"], []),
    "deepseek": (
        ["<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜User｜>", "<｜Assistant｜>"],
        THINK[:2],
    ),
    "glm4": (["[gMASK]", "<|endoftext|>", "<sop>", "<|observation|>", *ROLES], []),
    "phi": (["<s>", "<|endoftext|>", "<|end|>", *ROLES], []),
    "vicuna": (["<s>", "</s>"], []),
    "alpaca": (["<s>", "</s>"], []),
}
END = {
    **dict.fromkeys(("qwen", "qwen3", "chatml"), "<|im_end|>"),
    **dict.fromkeys(("llama3", "llama3.1"), "<|eot_id|>"),
    **dict.fromkeys(("mistral", "vicuna", "alpaca"), "</s>"),
    "gemma": "<end_of_turn>",
    "deepseek": "<｜end▁of▁sentence｜>",
    "glm4": "<|user|>",
    "phi": "<|end|>",
}
SENTENCEPIECE = ("mistral", "vicuna")  # words carry the space before them, bytes stand for what is unknown
NAMES = sorted(SPECIAL)
LEAD = {
    "mistral": " ",
    "vicuna": " ",
    "glm4": "\n",
}  # the white space that the assistant's first token begins with
TRIMS = ("llama3", "llama3.1", "mistral", "gemma", "vicuna", "alpaca")
WITH_TOOLS = ("qwen", "qwen3", "chatml", "llama3", "llama3.1", "mistral", "glm4")
REWRITES = ("qwen3", "mistral", "deepseek")  # what an earlier turn looks like depends on later ones
Message = dict[str, Any]
_TEXTS = [
    *DOCUMENTS,
    "You are a helpful assistant. The assistant gives helpful answers to the user's questions.\n\nq: a\n",
    "### Instruction:\nq\n\n### Response:\na\n\nUSER: q ASSISTANT: a user\nsystem\nassistant\n",
    '{"name": "find_page", "arguments": {"title": "t"}}\n',
]


@cache
def _backend(name: str) -> str:
    """The tokenizer.json of a family: byte-level BPE, or BPE over words with a leading mark as in sentencepiece."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

    pieces = name in SENTENCEPIECE
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True) if pieces else models.BPE())
    if pieces:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
        steps = [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
        tokenizer.decoder = decoders.Sequence(steps)
    else:
        split = pre_tokenizers.Split(Regex(r" ?[^\s\d\p{P}]+|\d| ?\p{P}+|\s+"), "isolated")
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
        )
        tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=700,
        special_tokens=[*(["<unk>"] if pieces else []), *SPECIAL[name][0]],
        initial_alphabet=[] if pieces else sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_TEXTS, trainer)
    if pieces:
        state = json.loads(tokenizer.to_str())
        for byte in range(256):
            state["model"]["vocab"][f"<0x{byte:02X}>"] = len(state["model"]["vocab"])
        tokenizer = Tokenizer.from_str(json.dumps(state))
    tokenizer.add_tokens(SPECIAL[name][1])
    return tokenizer.to_str()


def tokenizer_of(name: str) -> Any:
    """A fresh tokenizer with the family's special tokens and no chat template."""
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    special = SPECIAL[name][0]
    bos = {} if name in ("qwen", "qwen3", "chatml") else {"bos_token": special[0]}
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(_backend(name)),
        eos_token=special[2] if special is CHATML else special[1],
        name_or_path=f"small-{name}",
        **bos,
    )


def turns(*texts: str, system: str | None = None) -> list[Message]:
    """User and assistant by turns, after a system turn if there is one."""
    said = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]
    return [*([] if system is None else [{"role": "system", "content": system}]), *said]


def thinking(thought: str, answer: str) -> str:
    return f"<think>\n{thought}\n</think>\n\n{answer}"


TOOLS = [
    {
        "type": "function",
        "function": {
            "name": name,
            "description": 'Looks up <é> & "x"',
            "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
        },
    }
    for name in ("weather", "time")
]
ARGUMENTS = {"city": '城市 "q"\n{', "days": [1, None, 2.5], "name": "time"}


def calls(*names: str) -> Message:
    made = [{"type": "function", "function": {"name": name, "arguments": ARGUMENTS}} for name in names]
    return {"role": "assistant", "content": "", "tool_calls": made}


def result(content: str) -> Message:
    return {"role": "tool", "name": "weather", "content": content}


CALLING = [
    *turns("Rain?", system="s"),
    calls("weather"),
    result('{"rain": "no\\n"}'),
    *turns("x", "No rain.", "And the time?")[1:],
    calls("time"),
    result("12"),
    {"role": "assistant", "content": "Noon."},
]


def words(name: str, message: Message) -> str:
    """What the decoded tokens of a turn must be."""
    content = message["content"].strip() if name in TRIMS else message["content"]
    lead = "" if name in SENTENCEPIECE else LEAD.get(name, "")  # such decoders drop the first space
    return lead + content + END[name]


def said(messages: list[Message]) -> list[Message]:
    return [message for message in messages if message["role"] == "assistant"]


def decoded(tokenizer, encoded: Encoded) -> list[str]:
    return [tokenizer.decode(encoded.input_ids[start:end]) for start, end in encoded.spans]
