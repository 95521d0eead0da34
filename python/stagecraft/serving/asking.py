"""What a server says about itself and answers, as far as it can: vLLM tells token ids and log-probabilities."""

from __future__ import annotations

import contextlib
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from stagecraft import remote
from stagecraft.data.rows import Message

if TYPE_CHECKING:
    import openai


@dataclass
class Answer:
    """One greedy answer. `tokens` and `logprobs` are None where the server does not tell them."""

    text: str
    stopped: bool
    prompt_length: int
    length: int
    tokens: list[int] | None
    logprobs: list[float] | None


@dataclass
class Server:
    """A model behind an OpenAI-compatible API."""

    client: openai.OpenAI
    url: str
    name: str
    is_vllm: bool


def connect(url: str, name: str) -> Server:
    """Raises UserError where nobody answers, or this model is not served there."""
    import openai

    client, name = remote.connect(f"{url}#{name}" if name else url, "--server")
    try:
        is_vllm = any(model.id == name and model.owned_by == "vllm" for model in client.models.list())
    except openai.InternalServerError:  # a bare `transformers serve`, where the hub's cache is empty
        is_vllm = False
    return Server(client, url, name, is_vllm)


def served_names(url: str) -> list[str]:
    """What is served there."""
    import openai

    client = openai.OpenAI(base_url=url, api_key=os.environ.get("API_KEY") or "none", timeout=remote.PATIENCE)
    with remote.refusals(url, "--server"):
        return [model.id for model in client.models.list()]


def answer(server: Server, messages: list[Message], count: int) -> Answer:
    """The likeliest token each time, until the model stops or `count` are written; penalties are set aside."""
    settings: dict[str, Any] = {"temperature": 0, "max_tokens": count, "frequency_penalty": 0}
    if server.is_vllm:
        settings |= {"logprobs": True, "top_logprobs": 0}
        settings["extra_body"] = {"return_tokens_as_token_ids": True, "repetition_penalty": 1.0}
    with remote.refusals(server.url, "--server"):
        done = server.client.chat.completions.create(model=server.name, messages=messages, **settings)  # type: ignore[call-overload]
    choice = done.choices[0]
    tokens = logprobs = None
    if choice.logprobs and choice.logprobs.content:
        told = choice.logprobs.content
        with contextlib.suppress(ValueError):
            tokens = [int(one.token.removeprefix("token_id:")) for one in told]
            logprobs = [one.logprob for one in told]
    return Answer(
        text=choice.message.content or "",
        stopped=choice.finish_reason == "stop",
        prompt_length=done.usage.prompt_tokens if done.usage else -1,
        length=done.usage.completion_tokens if done.usage else -1,
        tokens=tokens,
        logprobs=logprobs,
    )


def prompt_ids(server: Server, messages: list[Message]) -> list[int] | None:
    """The prompt as the server renders and tokenises it; None where it does not tell."""
    if not server.is_vllm:
        return None
    body = {"model": server.name, "messages": messages, "add_generation_prompt": True}
    with remote.refusals(server.url, "--server"):
        done = server.client.post(
            f"{server.url.rstrip('/').removesuffix('/v1')}/tokenize", body=body, cast_to=object
        )
    return list(done["tokens"])  # type: ignore[index]
