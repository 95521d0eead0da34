"""One visitor's conversation with one to four models: question, answers side by side, vote, and so on.

The models share one conversation: it goes on with the answer that was voted best (without a vote with the first whole
one), so that all are asked the same and a vote is between answers to one prompt.
"""

from __future__ import annotations

import random
import threading
from dataclasses import dataclass
from typing import Any

from stagecraft.data import forms, rows
from stagecraft.data.rows import Message
from stagecraft.talk.sources import CUT, LIMIT, WHOLE, Source
from stagecraft.talk.terminal import system_message

LETTERS = "ABCD"
TIE, BAD = "tie", "bad"  # votes beside the number of the best answer; both save nothing


@dataclass
class Answer:
    """What one model says. `ended` is None while it writes, and "failed" with the reason in `fault`."""

    source: Source
    text: str = ""
    ended: str | None = None
    fault: str = ""

    @property
    def counts(self) -> bool:
        """Whether it can be judged: words, not broken off by the user or a fault."""
        return self.ended in (WHOLE, LIMIT) and bool(self.text)


class Session:
    """The conversation as it stands. (No dataclass: Gradio would take it apart to describe its page.)"""

    def __init__(self) -> None:
        self.history: list[tuple[str, str]] = []
        self.system, self.question = "", ""
        self.answers: list[Answer] = []
        self.blind = False
        self.vote: int | str | None = None
        self.stop = threading.Event()
        self.lock = threading.Lock()  # a double click is two votes at the same time

    def __deepcopy__(self, memo: dict[int, Any]) -> Session:
        return Session()  # Gradio copies the first value for every visitor, and a lock can't be copied

    def clear(self) -> None:
        """A new conversation."""
        self.history, self.answers, self.question, self.vote = [], [], "", None

    def begin(self, question: str, system: str, blind: bool, sources: list[Source]) -> None:
        """Take up a question; which model is A is drawn each time where names are hidden."""
        if (kept := self.kept()) is not None:
            self.history.append((self.question, self.answers[kept].text))
        if blind:
            sources = random.sample(sources, len(sources))
        self.question, self.system, self.blind, self.vote = question, system, blind, None
        self.answers = [Answer(source) for source in sources]
        self.stop = threading.Event()

    def answer_all(self, max_new_tokens: int, temperature: float) -> list[threading.Thread]:
        """Every model writes its answer, in a thread of its own."""
        asked = self.prompt()
        workers = [
            threading.Thread(
                target=_write, args=(answer, asked, max_new_tokens, temperature, self.stop), daemon=True
            )
            for answer in self.answers
        ]
        for worker in workers:
            worker.start()
        return workers

    def prompt(self) -> list[Message]:
        """The conversation up to the question."""
        messages = system_message(self.system)
        for question, answer in self.history:
            messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        return [*messages, {"role": "user", "content": self.question}]

    def kept(self) -> int | None:
        """Which answer the conversation goes on with; None where there is none to go on with."""
        if isinstance(self.vote, int):
            return self.vote
        return next((i for i, answer in enumerate(self.answers) if answer.counts), None)

    def can_vote(self) -> bool:
        """Whether there are two answers or more to judge, and no vote yet."""
        done = all(answer.ended for answer in self.answers)
        return done and self.vote is None and sum(answer.counts for answer in self.answers) > 1

    def names_hidden(self) -> bool:
        return self.blind and self.vote is None

    def preferences(self, best: int) -> list[dict[str, Any]]:
        """The rows that a vote for one answer makes: one for each other answer that differs."""
        chosen = self.answers[best].text
        losers = [answer.text for i, answer in enumerate(self.answers) if i != best and answer.counts]
        losers = list(dict.fromkeys(text for text in losers if rows.folded(text) != rows.folded(chosen)))
        return [forms.preference_form(rows.Preference(self.prompt(), chosen, text, "")) for text in losers]


def _write(
    answer: Answer, asked: list[Message], max_new_tokens: int, temperature: float, stop: threading.Event
) -> None:
    pieces = answer.source.stream(asked, max_new_tokens, temperature, stop)
    try:
        while True:
            answer.text += next(pieces)
    except StopIteration as end:
        answer.ended = end.value or CUT
    except Exception as error:  # shown in this model's column; the others go on
        answer.fault, answer.ended = str(error) or type(error).__name__, "failed"
