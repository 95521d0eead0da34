"""Where answers come from: a model in this process, or a server. Both give an answer as pieces of text."""

from __future__ import annotations

import gc
import queue
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Generator
from typing import Any

from stagecraft import generation, places
from stagecraft.data.rows import Message
from stagecraft.errors import UserError
from stagecraft.places import Place
from stagecraft.remote import connect, refusals

WHOLE, LIMIT, CUT = "stop", "length", "cut"  # how an answer ended: by itself, at the token limit, by the user
GLANCE = 0.1  # seconds until a consumer that waits for a token looks whether it shall stop
Show = Callable[[str], None]  # called with all the text so far; raises _Stop when nobody wants more


class _Stop(Exception):
    """Ends an answer inside the model's loop."""


class Source(ABC):
    """Gives answers. One may be asked from several threads."""

    def __init__(self, place: Place, about: str) -> None:
        self.place, self.name, self.about = place, place.name, about

    def stream(
        self,
        messages: list[Message],
        max_new_tokens: int,
        temperature: float = 0.0,
        stop_event: threading.Event | None = None,
    ) -> Generator[str, None, str]:
        """The answer in pieces, none of which ends within a character; the generator returns how it ended.

        Joined they are the answer without white space around it. Closing the generator, or setting `stop_event`,
        ends the work at the next token. Raises UserError for what can't be answered.
        """
        wanted = _Wanted(stop_event)
        pieces: queue.SimpleQueue[Any] = queue.SimpleQueue()
        arguments = (messages, max_new_tokens, temperature, wanted, pieces)
        worker = threading.Thread(target=self._work, args=arguments, daemon=True)
        worker.start()
        try:
            while wanted():
                try:
                    piece = pieces.get(timeout=GLANCE)
                except queue.Empty:
                    continue
                if isinstance(piece, str):
                    yield piece
                elif isinstance(piece, BaseException):
                    raise piece
                else:
                    return piece[0]
            return CUT
        finally:
            wanted.over = True
            worker.join(self._patience)

    # How long to wait for the worker's end. A model in this process must not compute on while Python shuts down.
    _patience: float | None = None

    def _work(
        self,
        messages: list[Message],
        max_new_tokens: int,
        temperature: float,
        wanted: _Wanted,
        pieces: queue.SimpleQueue[Any],
    ) -> None:
        said = ""

        def show(text: str, last: bool = False) -> None:
            nonlocal said
            if not wanted():
                raise _Stop
            # A replacement character at the end is most often a character whose other bytes are still to come.
            ready = text.strip() if last else text.rstrip("\ufffd").strip()
            if ready.startswith(said) and len(ready) > len(said):
                pieces.put(ready[len(said) :])
                said = ready

        try:
            text, ended = self._reply(messages, max_new_tokens, temperature, show)
            show(text, last=True)
            pieces.put((ended,))
        except _Stop:
            pieces.put((CUT,))
        except Exception as error:
            pieces.put(error)

    @abstractmethod
    def _reply(
        self, messages: list[Message], max_new_tokens: int, temperature: float, show: Show
    ) -> tuple[str, str]:
        """(the whole answer, how it ended), shown as it grows."""

    @abstractmethod
    def close(self) -> None:
        """Give back what it holds; it is not asked again."""


class _Wanted:
    """Whether somebody still waits for the answer."""

    def __init__(self, stop_event: threading.Event | None) -> None:
        self.over, self._stop = False, stop_event

    def __call__(self) -> bool:
        return not self.over and not (self._stop and self._stop.is_set())


class LocalSource(Source):
    """A model in this process; one answer at a time."""

    def __init__(self, place: Place, model: Any, tokenizer: Any) -> None:
        super().__init__(place, f"{place.path} on {model.device}")
        self._model, self._tokenizer, self._turn = model, tokenizer, threading.Lock()
        self._ends = set(generation.stop_ids(model, tokenizer))

    def _reply(
        self, messages: list[Message], max_new_tokens: int, temperature: float, show: Show
    ) -> tuple[str, str]:
        import torch

        tokens = _Tokens(self._tokenizer, show)
        with self._turn:
            try:
                text = generation.stream_reply(
                    self._model, self._tokenizer, messages, max_new_tokens, temperature, tokens
                )
            except torch.OutOfMemoryError:
                raise UserError(
                    f"{self.name}: out of memory; shorten the conversation or lower --max_new_tokens"
                ) from None
        return text, WHOLE if tokens.ids and tokens.ids[-1] in self._ends else LIMIT

    def close(self) -> None:
        import torch

        self._model = self._tokenizer = None
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


class _Tokens:
    """What generate() calls its streamer: the prompt first, then every token.

    All of the answer is decoded each time: 0.5 ms for 1,000 tokens, and right for every tokenizer. transformers' own
    streamers keep words back until the space behind them, which Chinese has not.
    """

    def __init__(self, tokenizer: Any, show: Show) -> None:
        self.ids: list[int] = []
        self._tokenizer, self._show, self._prompt = tokenizer, show, True

    def put(self, value: Any) -> None:
        if self._prompt:
            self._prompt = False
            return
        self.ids += value.flatten().tolist()
        self._show(self._tokenizer.decode(self.ids, skip_special_tokens=True))

    def end(self) -> None:
        pass


class ServerSource(Source):
    """A server that speaks OpenAI's API."""

    _patience = 1.0  # it may not say a word for minutes, and waiting for it costs nobody anything

    def __init__(self, place: Place) -> None:
        self._client, self._model = connect(place.path, place.flag)
        super().__init__(place, f"{self._model} on {place.path.partition('#')[0]}")

    def _reply(
        self, messages: list[Message], max_new_tokens: int, temperature: float, show: Show
    ) -> tuple[str, str]:
        text, ended = "", WHOLE
        with (
            refusals(self.place.path, self.place.flag),
            self._client.chat.completions.create(
                model=self._model,
                messages=messages,
                max_tokens=max_new_tokens,
                temperature=temperature,
                stream=True,
            ) as chunks,
        ):
            for chunk in chunks:
                for choice in chunk.choices[:1]:
                    text += choice.delta.content or ""
                    ended = LIMIT if choice.finish_reason == "length" else ended
                    show(text)
        return text, ended

    def close(self) -> None:
        self._client.close()


def open_source(place: Place, dtype: str) -> Source:
    """Connect to the server, or load the model. Raises UserError where that fails."""
    if place.kind == "server":
        return ServerSource(place)
    try:
        return LocalSource(place, *places.load(place, dtype))
    except MemoryError as error:
        raise UserError(f"{place.flag} {place.path}: does not fit into memory ({error})") from None
    except RuntimeError as error:
        if "out of memory" not in str(error).lower():
            raise
        raise UserError(f"{place.flag} {place.path}: does not fit into memory beside what is there") from None


def open_all(wanted: list[Place], dtype: str) -> list[Source]:
    """All of them, servers first: whether one answers is known before a model is loaded. In the order given."""
    opened: dict[Place, Source] = {}
    faults = []
    for place in sorted(wanted, key=lambda place: place.kind != "server"):
        if faults and place.kind != "server":
            break
        try:
            opened[place] = open_source(place, dtype)
        except UserError as error:
            faults.append(str(error))
    if faults:
        raise UserError(*faults)
    return [opened[place] for place in wanted]
