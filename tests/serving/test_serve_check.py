"""What make serve-check calls equal, a near tie and a fault, by numbers; and the guard in front of vLLM."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from stagecraft.serving import comparing
from stagecraft.serving.asking import Answer
from stagecraft.serving.comparing import Pair, Reference
from stagecraft.serving.guard import Guard

WORDS = ["<stop>", "a", "b", "c", "d", "e", "f"]
STEPS = 5


class Tokenizer:
    """Seven words."""

    def decode(self, tokens: list[int], skip_special_tokens: bool = False) -> str:
        return "".join(WORDS[token] for token in tokens if token or not skip_special_tokens)


def pair(
    tokens: list[int] | None,
    logprobs: list[float] | None = None,
    second: float = -3.0,
    text: str = "",
    exact_flip: tuple[float, ...] = (),
) -> Pair:
    """transformers says a a a a a with -0.1 each, b is `second`; the server says what is given."""
    rows = torch.full((STEPS, len(WORDS)), -9.0)
    rows[:, 1], rows[:, 2] = -0.1, second
    ours = Reference([5, 6], [1] * STEPS, rows, "a" * STEPS, False)
    if tokens is not None and logprobs is None:
        logprobs = [float(rows[i][token]) for i, token in enumerate(tokens)]
    theirs = Answer(text, False, 2, len(tokens or text), tokens, logprobs)
    exact = [[-0.1] * STEPS for _ in exact_flip]
    found = Pair([], ours, theirs, exact=exact, exact_flip=list(exact_flip))
    comparing.compare(found, 0.05, Tokenizer())
    return found


def test_equal_tokens_and_numbers():
    same = pair([1] * STEPS)
    assert comparing.check_tokens([same], 0.05).good
    assert comparing.check_logprobs([same], "bfloat16", 0.05).good


def test_a_flip_between_near_ties_is_no_fault_and_one_between_others_is():
    tie, fault = pair([1, 1, 2, 1, 1], second=-0.19), pair([1, 1, 2, 1, 1], second=-0.21)
    assert (tie.equal, len(tie.ties), tie.fault) == (2, 1, "")
    check = comparing.check_tokens([tie], 0.05)
    assert check.good and "1 flipped between near ties" in check.detail
    check = comparing.check_tokens([tie, fault], 0.05)
    assert check.good is False and "token 3 is 'b' there and 'a' here, 0.11 nats likelier" in check.detail
    apart = pair([1, 1, 2, 1, 1], [-0.1, -0.1, -0.13, -0.1, -0.1], second=-0.19)  # the server's b is 0.06 off
    assert apart.fault and not apart.ties
    # Its number is explained where float32 reads -0.14: then it is 0.01 beyond.
    assert pair([1, 1, 2], [-0.1, -0.1, -0.13], second=-0.19, exact_flip=(-0.14, -0.16)).ties
    assert pair([1, 1, 2], [-0.1, -0.1, -0.13], second=-0.19, exact_flip=(-0.185, -0.2)).fault
    # 0.15 apart in one reading, 0.08 in another: near enough; 0.12: not.
    assert pair([1, 1, 2], second=-0.25, exact_flip=(-0.18, -0.3)).ties
    assert pair([1, 1, 2], second=-0.25, exact_flip=(-0.22, -0.3)).fault


def test_nothing_but_ties_shows_nothing():
    assert comparing.check_tokens([pair([2] * STEPS, second=-0.1)], 0.05).good is None


def test_an_answer_that_ends_too_soon_is_a_fault():
    assert "stops after 3 tokens" in pair([1, 1, 1]).fault


def test_numbers_beyond_the_limit_are_a_fault():
    off = [-0.1, -0.1, -0.1, -0.1, -0.16]
    assert comparing.check_logprobs([pair([1] * STEPS, off)], "float32", 0.05).good is False
    assert comparing.check_logprobs([pair([1] * STEPS, off)], "float32", 0.07).good


def test_in_16_bits_transformers_own_span_counts():
    """0.09 off one reading, but 0.04 beyond the other: rounding explains it. Without the second reading it is a fault."""
    off = [-0.1, -0.1, -0.1, -0.1, -0.19]
    found = pair([1] * STEPS, off)
    assert comparing.check_logprobs([found], "bfloat16", 0.05).good is False
    found.exact = [[-0.1] * STEPS, [-0.1, -0.1, -0.1, -0.1, -0.15]]
    assert comparing.check_logprobs([found], "bfloat16", 0.05).good
    found.exact = [[-0.1] * STEPS, [-0.1, -0.1, -0.1, -0.1, -0.13]]
    assert comparing.check_logprobs([found], "bfloat16", 0.05).good is False


def test_numbers_too_good_for_the_dtype_are_a_fault():
    found = pair([1] * STEPS, [-0.12] * STEPS)
    found.exact = [[-0.12] * STEPS, [-0.11] * STEPS]
    assert comparing.check_dtype([found], "bfloat16").good is False
    found.exact = [[-0.11] * STEPS, [-0.11] * STEPS]
    assert comparing.check_dtype([found], "bfloat16").good


def test_texts_are_compared_where_no_tokens_are_told():
    assert comparing.check_tokens([pair(None, text="aaaaab")], 0.05).good
    assert comparing.check_logprobs([pair(None, text="aaaaa")], "float32", 1e-3).good is None
    assert pair(None, text="aab").fault
    assert pair(None, text="aab", second=-0.12).ties


@pytest.mark.parametrize(
    ("text", "length", "stopped", "good"),
    [("aaaaa", 5, False, None), ("aaa", 4, True, False), ("aaaaa", 6, True, False)],
)
def test_an_answer_that_ends_elsewhere_is_a_fault(
    tmp_path: Path, text: str, length: int, stopped: bool, good: Any
):
    """The server ends within words that transformers goes on with."""
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [0]}')
    found = pair(None, text=text)
    found.theirs = Answer(text, stopped, 2, length, None, None)
    assert stops(found, tmp_path).good is good


def stops(found: Pair, folder: Path) -> comparing.Check:
    from types import SimpleNamespace

    tokenizer = SimpleNamespace(
        eos_token_id=0,
        all_special_ids=[0],
        get_added_vocab=lambda: {},
        apply_chat_template=lambda messages, tokenize: "q1a1",
        decode=Tokenizer().decode,
    )
    callable_tokenizer = type(
        "T", (), {**vars(tokenizer), "__call__": lambda self, *_, **__: {"input_ids": []}}
    )
    callable_tokenizer.decode = lambda self, tokens, **kw: Tokenizer().decode(tokens, **kw)
    callable_tokenizer.apply_chat_template = lambda self, messages, tokenize: "q1a1"
    callable_tokenizer.get_added_vocab = lambda self: {}
    model = SimpleNamespace(generation_config=SimpleNamespace(eos_token_id=[0]))
    return comparing.check_stops([found], folder, model, callable_tokenizer())


def test_a_stop_token_that_the_folder_does_not_tell_is_a_fault(tmp_path: Path):
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [4]}')
    check = stops(pair(None, text="aaaaa"), tmp_path)
    assert check.good is False and "'<stop>' is not in" in check.detail


def test_a_template_is_held_against_the_training_run(tmp_path: Path):
    model = tmp_path / "model"
    model.mkdir()
    (model / "chat_template.jinja").write_text("one")
    assert comparing.check_template(model).good is None
    import hashlib

    outputs = {"adapter/chat_template.jinja": {"sha256": hashlib.sha256(b"one").hexdigest()}}
    (tmp_path / "run.json").write_text(json.dumps({"outputs": outputs}))
    assert comparing.check_template(model).good
    (model / "chat_template.jinja").write_text("two")
    assert comparing.check_template(model).good is False


def test_the_guard_lets_nobody_in_without_the_key(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("VLLM_API_KEY", "sesame")
    sent: list[Any] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        sent.append("in")

    async def send(message: Any) -> None:
        sent.append(message.get("status"))

    def ask(path: str, header: bytes | None) -> Any:
        sent.clear()
        headers = [(b"authorization", header)] if header else []
        asyncio.run(Guard(app)({"type": "http", "path": path, "headers": headers}, None, send))
        return sent[0]

    for path in ("/invocations", "/v1/models", "/tokenize", "/"):
        assert [ask(path, header) for header in (None, b"Bearer x", b"Bearer sesame")] == [401, 401, "in"]
    assert ask("/health", None) == "in"
