"""A conversation on a terminal: questions, commands, answers as they are written."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from stagecraft import naming
from stagecraft.data import forms, rows
from stagecraft.data.rows import Message
from stagecraft.errors import UserError
from stagecraft.talk.appending import append_rows, check_file
from stagecraft.talk.sources import CUT, LIMIT, Source

HELP = """\
/reset         begin again; the system message stays
/system TEXT   set the system message and begin again; without TEXT there is none
/model PLACE   answer with another model from here on: sft, a folder, BASE+ADAPTER, or http://HOST:PORT/v1#MODEL
/save FILE     append the conversation to FILE.jsonl, as a row that the SFT stage reads
/help          these lines
/exit          end; so does Ctrl-D
Ctrl-C cuts an answer short. Anything else is a question."""
# What a terminal would take for commands. Joiners and direction marks, which emoji and Arabic need, stay.
CONTROLS = {code: "\ufffd" for code in (*range(32), *range(127, 160)) if chr(code) not in "\n\t"}


class Talk:
    """What has been said, and who answers."""

    def __init__(
        self,
        source: Source,
        open_place: Callable[[str, str], Source],
        system: str | None,
        max_new_tokens: int,
        temperature: float,
        recipe: str,
    ) -> None:
        self.source = source
        self._open = open_place  # (place as written, what to call it in an error) -> a source
        self._recipe = recipe
        self._limits = (max_new_tokens, temperature)
        self.messages: list[Message] = system_message(system)

    def run(self) -> None:
        """Questions and answers until /exit or the end of input."""
        import readline  # noqa: F401 -- gives input() line editing and history

        print(f"{self.source.about}. /help lists the commands; Ctrl-C cuts an answer short, Ctrl-D ends.")
        while True:
            try:
                text = input("> ").strip()
            except EOFError:
                print()
                return
            except KeyboardInterrupt:
                print("\n(Ctrl-D or /exit ends)")
                continue
            if text == "/exit":
                return
            try:
                if text.startswith("/"):
                    self._command(text)
                elif text:
                    self._ask(text)
            except UserError as error:
                print(error)
            except KeyboardInterrupt:  # while a model is loaded
                print("\n(left as it was)")

    def _ask(self, question: str) -> None:
        asked: list[Message] = [*self.messages, {"role": "user", "content": question}]
        said = ""
        answer = self.source.stream(asked, *self._limits)
        ended = CUT
        try:
            while True:
                piece = next(answer)
                said += piece
                print(piece.translate(CONTROLS), end="", flush=True)
        except StopIteration as end:
            ended = end.value
        except KeyboardInterrupt:
            answer.close()
        print()
        if ended == CUT:
            print("(cut short: question and answer are left out of the history)")
        elif not said:
            print("(no words; the question is left out of the history)")
        else:
            if ended == LIMIT:
                print(f"(cut off at --max_new_tokens {self._limits[0]})")
            self.messages = [*asked, {"role": "assistant", "content": said}]

    def _command(self, text: str) -> None:
        name, _, rest = text.partition(" ")
        command = {
            "/reset": self._reset,
            "/system": self._system,
            "/model": self._model,
            "/save": self._save,
            "/help": lambda _: print(HELP),
        }.get(name)
        if command is None:
            print(f"(no command {name}; /help lists them)")
        else:
            command(rest.strip())

    def _reset(self, rest: str) -> None:
        if rest:
            raise UserError(f"(/reset takes no words; nothing was done. /system {rest} would set them)")
        self.messages = [message for message in self.messages if message["role"] == "system"]
        print("(history cleared)")

    def _system(self, text: str) -> None:
        self.messages = system_message(text)
        print(f"({'system message set' if text else 'no system message'}, history cleared)")

    def _model(self, word: str) -> None:
        if not word:
            there = ", ".join(naming.finished(self._recipe)) or "none"
            print(f"({self.source.about}; finished stages: {there}; /model PLACE takes another)")
            return
        source = self._open(word, "/model")
        self.source.close()
        self.source = source
        print(f"({source.about}; the history goes on)")

    def _save(self, name: str) -> None:
        if not name:
            raise UserError("(/save FILE: name a file that ends in .jsonl)")
        if not any(message["role"] == "assistant" for message in self.messages):
            raise UserError("(nothing to save: no answer yet)")
        path = Path(name).expanduser()
        check_file(path, "sft", "/save")
        row = forms.form_of(rows.Conversation(self.messages, ""))
        count = append_rows(path, [row], "sft", "/save")
        print(f"(saved: row {count:,} of {path})")


def system_message(text: str | None) -> list[Message]:
    """A conversation's beginning: the system message, if there is one."""
    return [{"role": "system", "content": text}] if text else []
