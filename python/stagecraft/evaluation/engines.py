"""What answers for a model while it is evaluated: transformers in this process, vLLM in this process, or a server.

Each is loaded when it is first asked something: of a model whose every task was kept, nothing is. Replies are greedy,
and what goes in is the conversation rendered by the model's own chat template (a server renders it itself).
"""

from __future__ import annotations

import asyncio
import gc
import os
import sys
from dataclasses import dataclass
from functools import cached_property
from importlib.util import find_spec
from typing import Any

from stagecraft import generation, models, places
from stagecraft.data.rows import Message
from stagecraft.errors import UserError
from stagecraft.generation import Keep, Likelihood, Progress, Reply
from stagecraft.manifest import gpus
from stagecraft.places import Place
from stagecraft.remote import PATIENCE, connect, refusals

ENGINES = ("auto", "transformers", "vllm")
AT_ONCE = 16  # requests that a server has before it
# vLLM makes batches of its own out of what it is given; so many times --batch_size are kept as one.
FOR_VLLM = 16
Pairs = list[tuple[list[Message], str]]


@dataclass(frozen=True)
class Settings:
    """How every model is asked."""

    max_new_tokens: int = 64
    batch_size: int = 32
    dtype: str = "auto"
    engine: str = "transformers"  # who writes the replies of folders
    seed: int = 42


def choose_engine(asked: str) -> str:
    """transformers or vllm. Raises UserError where vLLM is asked for and not installed."""
    there = find_spec("vllm") is not None
    if asked == "vllm" and not there:
        raise UserError(
            "--engine vllm: vLLM is not installed here (make setup ENV=gpu); or leave --engine out"
        )
    return "vllm" if asked == "vllm" or asked == "auto" and there and gpus() else "transformers"


def open_model(place: Place, settings: Settings) -> Model | Server:
    """Whatever answers for a place. vLLM writes for complete models only; an adapter on its base has transformers."""
    if place.kind == "server":
        return Server(place, settings)
    return (Vllm if settings.engine == "vllm" and not place.adapter else Model)(place, settings)


class Model:
    """A model in this process, by transformers."""

    def __init__(self, place: Place, settings: Settings) -> None:
        self.place, self.settings = place, settings

    @cached_property
    def loaded(self) -> tuple[Any, Any]:
        """(model, tokenizer)"""
        return places.load(self.place, self.settings.dtype)

    def replies(
        self, prompts: list[list[Message]], keep: Keep | None = None, progress: Progress | None = None
    ) -> list[Reply]:
        """A greedy reply to each conversation."""
        limits = (self.settings.max_new_tokens, self.settings.batch_size)
        return generation.generate_replies(*self.loaded, prompts, *limits, progress, keep=keep)

    def documents(self, texts: list[str], keep: Keep | None, progress: Progress | None) -> list[Likelihood]:
        """The likelihood of each text."""
        return generation.document_logprobs(*self.loaded, texts, self.settings.batch_size, progress, keep)

    def pairs(self, pairs: Pairs, keep: Keep | None, progress: Progress | None) -> list[Likelihood]:
        """The likelihood of each text as the reply to its conversation."""
        return generation.reply_logprobs(*self.loaded, pairs, self.settings.batch_size, progress, keep)

    def close(self) -> None:
        """Give the memory back before the next model is loaded."""
        self.__dict__.pop("loaded", None)
        gc.collect()
        if (torch := sys.modules.get("torch")) and torch.cuda.is_available():
            torch.cuda.empty_cache()


class Vllm(Model):
    """The same, but vLLM writes the replies. Likelihoods stay with transformers, which score whole batches at once."""

    @cached_property
    def engine(self) -> Any:
        """The engine, which takes most of the card while it is there."""
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
        from vllm import LLM

        return LLM(
            model=self.place.base,
            dtype=self.settings.dtype,
            seed=self.settings.seed,
            generation_config="vllm",  # not the folder's own sampling settings
            disable_log_stats=True,
        )

    def replies(
        self, prompts: list[list[Message]], keep: Keep | None = None, progress: Progress | None = None
    ) -> list[Reply]:
        """A greedy reply to each conversation, from the same token ids that transformers would be given."""
        from transformers import GenerationConfig
        from vllm import SamplingParams

        tokenizer = models.load_tokenizer(self.place.tokenizer)
        ids = generation.prompt_ids(tokenizer, prompts)
        stops = generation.stops_of(GenerationConfig.from_pretrained(self.place.base), tokenizer)
        limits = SamplingParams(
            temperature=0,
            max_tokens=self.settings.max_new_tokens,
            stop_token_ids=stops,
            seed=self.settings.seed,
            detokenize=False,
        )

        def compute(batch: list[int]) -> list[Any]:
            prompts = [{"prompt_token_ids": ids[i]} for i in batch]
            written = self.engine.generate(prompts, limits, use_tqdm=False)
            return [
                generation.read_reply(tokenizer, list(one.outputs[0].token_ids), stops) for one in written
            ]

        batches = _pieces(len(ids), FOR_VLLM * self.settings.batch_size)
        return [Reply(*found) for found in generation.in_batches(batches, compute, progress, keep)]

    @cached_property
    def loaded(self) -> tuple[Any, Any]:
        """(model, tokenizer), when the engine has given the card back."""
        self._end_engine()
        return places.load(self.place, self.settings.dtype)

    def close(self) -> None:
        """Give the memory back before the next model is loaded."""
        self._end_engine()
        super().close()

    def _end_engine(self) -> None:
        engine = self.__dict__.pop("engine", None)
        if engine is not None:
            engine.llm_engine.engine_core.shutdown()


class Server:
    """A model behind an OpenAI-compatible API. It gives replies; likelihoods of given texts can't be had."""

    def __init__(self, place: Place, settings: Settings) -> None:
        self.place, self.settings = place, settings

    def replies(
        self, prompts: list[list[Message]], keep: Keep | None = None, progress: Progress | None = None
    ) -> list[Reply]:
        """A greedy reply to each conversation, AT_ONCE requests at a time."""

        def compute(batch: list[int]) -> list[Any]:
            with refusals(self.place.path, self.place.flag):
                return asyncio.run(self._ask([prompts[i] for i in batch]))

        batches = _pieces(len(prompts), max(AT_ONCE, self.settings.batch_size))
        return [Reply(*found) for found in generation.in_batches(batches, compute, progress, keep)]

    @cached_property
    def _connection(self) -> tuple[dict[str, Any], str]:
        client, model = connect(self.place.path, self.place.flag)
        return {"base_url": client.base_url, "api_key": client.api_key, "timeout": PATIENCE}, model

    async def _ask(self, prompts: list[list[Message]]) -> list[Any]:
        import openai

        connection, model = self._connection
        gate = asyncio.Semaphore(AT_ONCE)
        async with openai.AsyncOpenAI(**connection) as client:

            async def ask(messages: list[Message]) -> tuple[str, int, bool]:
                async with gate:
                    answer = await client.chat.completions.create(
                        model=model,
                        messages=messages,
                        temperature=0,
                        max_tokens=self.settings.max_new_tokens,
                        seed=self.settings.seed,
                    )
                first = answer.choices[0]
                stopped = first.finish_reason == "stop"
                # The stop token is counted by servers, and not by us.
                tokens = answer.usage.completion_tokens - stopped if answer.usage else 0
                return (first.message.content or "").strip(), max(0, tokens), stopped

            return await asyncio.gather(*map(ask, prompts))

    def close(self) -> None:
        """There is nothing to give back."""


def _pieces(count: int, size: int) -> list[list[int]]:
    return [list(range(start, min(start + size, count))) for start in range(0, count, size)]
