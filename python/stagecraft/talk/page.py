"""The web page: models side by side, and votes that become preference rows."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

# Before Gradio is imported: it tells nobody that it runs, and looks for no newer version.
os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")

import gradio as gr

from stagecraft.errors import UserError
from stagecraft.talk import board
from stagecraft.talk.appending import append_rows
from stagecraft.talk.session import BAD, LETTERS, TIE, Session
from stagecraft.talk.sources import CUT, LIMIT, Source
from stagecraft.talk.words import EN, LANGUAGES, words_for

TICK = 0.1  # seconds between two looks at what the models have written
VISITORS = 16  # who may wait for answers at once; models in this process answer one after another
FONTS = ["system-ui", "-apple-system", "PingFang SC", "Microsoft YaHei", "Noto Sans CJK SC", "sans-serif"]
Update = dict[Any, Any]


class Page:
    """Components and what happens when they are used. `settings`: system, temperature, max_new_tokens at the start."""

    def __init__(self, sources: list[Source], votes_file: Path, settings: dict[str, Any]) -> None:
        self.sources, self.votes_file = sources, votes_file
        self.several = len(sources) > 1
        self._writing: set[Session] = set()  # whose answers are under way
        self.i18n = gr.I18n(**LANGUAGES)
        with gr.Blocks(title="Stagecraft", analytics_enabled=False) as self.blocks:
            self._lay_out(settings)
            self._wire()

    def launch(self, **settings: Any) -> Any:
        """Start the server; returns when it listens."""
        theme = gr.themes.Base(
            primary_hue="blue", neutral_hue="slate", font=FONTS, font_mono=["ui-monospace", "monospace"]
        ).set(
            button_primary_background_fill="*primary_600", button_primary_background_fill_hover="*primary_700"
        )
        return self.blocks.queue(default_concurrency_limit=VISITORS).launch(
            theme=theme, css=board.CSS, i18n=self.i18n, footer_links=[], ssr_mode=False, quiet=True,
            prevent_thread_lock=True, max_threads=4 * VISITORS, **settings,
        )  # fmt: skip

    def close(self) -> None:
        """End answers that are under way, and the server. Blocks.close() would wait 5 s for pages that are open."""
        for session in list(self._writing):
            session.stop.set()
        self.blocks.server.should_exit = True
        self.blocks.server.thread.join(1)

    # ---- What is on it

    def _lay_out(self, settings: dict[str, Any]) -> None:
        word, names = self.i18n, [source.name for source in self.sources]
        self.session = gr.State(Session())
        self.head = gr.HTML(board.head(names, EN))
        self.board = gr.HTML(board.board(Session(), self.several, EN), elem_id="sc-board")
        self.note = gr.HTML("", elem_id="sc-note")
        with gr.Column(visible=False, elem_id="sc-vote") as self.voting:
            which = "which" if len(names) == 2 else "which_more"
            self.which = gr.HTML(f'<p class="sc-which">{EN[which]}</p>')
            with gr.Row(elem_id="sc-votes"):
                self.votes = {
                    vote: gr.Button(
                        self._vote_label(vote, EN), variant="secondary", elem_id=f"sc-vote-{vote}"
                    )
                    for vote in [*range(len(names)), TIE, BAD]
                }
        with gr.Group(elem_id="sc-ask"):
            self.question = gr.Textbox(
                label=word("question"), placeholder=word("placeholder"), lines=1, max_lines=10, autofocus=True,
                submit_btn=False,
            )  # fmt: skip
        with gr.Row():
            self.send = gr.Button(word("send"), variant="primary", elem_id="sc-send", min_width=90)
            self.stop = gr.Button(word("stop"), interactive=False, elem_id="sc-stop", min_width=90)
            self.new = gr.Button(word("new"), elem_id="sc-new", min_width=90)
        with gr.Accordion(word("settings"), open=False):
            self.system = gr.Textbox(settings["system"], label=word("system"), lines=2, max_lines=10)
            with gr.Row():
                self.temperature = gr.Slider(
                    0, 2, settings["temperature"], step=0.05, label=word("temperature"), min_width=220
                )
                self.tokens = gr.Slider(
                    1, max(4096, settings["max_new_tokens"]), settings["max_new_tokens"], step=1,
                    label=word("tokens"), min_width=220,
                )  # fmt: skip
            self.blind = gr.Checkbox(settings["blind"], label=word("blind"), visible=self.several)
        self.foot = gr.HTML(board.foot(str(self.votes_file), self.several, EN))

    def _vote_label(self, vote: int | str, words: dict[str, str]) -> str:
        two = len(self.sources) == 2
        if isinstance(vote, int):
            return words["better" if two else "best"].format(LETTERS[vote])
        return words[vote if vote == TIE or two else "bad_more"]

    def _wire(self) -> None:
        asking = [self.question, self.system, self.temperature, self.tokens, self.blind, self.session]
        everything = [self.board, self.note, self.question, self.send, self.stop, self.new, self.voting]
        everything += self.votes.values()
        quiet: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
        for event in (self.question.submit, self.send.click):
            event(self._ask, asking, everything, **quiet)
        self.stop.click(lambda session: session.stop.set(), self.session, None, queue=False, **quiet)
        self.new.click(self._clear, self.session, everything, **quiet)
        for vote, button in self.votes.items():
            button.click(self._voted(vote), self.session, everything, **quiet)
        fixed = [self.head, self.board, self.which, self.foot, *self.votes.values()]
        self.blocks.load(self._translate, self.session, fixed, **quiet)

    # ---- What happens

    def _translate(self, session: Session, request: gr.Request) -> Update:
        """What was laid out in English, in the visitor's language."""
        words, names = _words(request), [source.name for source in self.sources]
        which = words["which" if len(names) == 2 else "which_more"]
        return {
            self.head: board.head(names, words),
            self.board: board.board(session, self.several, words),
            self.which: f'<p class="sc-which">{which}</p>',
            self.foot: board.foot(str(self.votes_file), self.several, words),
        } | {button: gr.update(value=self._vote_label(vote, words)) for vote, button in self.votes.items()}

    def _ask(
        self,
        question: str,
        system: str,
        temperature: float,
        tokens: int,
        blind: bool,
        session: Session,
        request: gr.Request,
    ) -> Iterator[Update]:
        words = _words(request)
        if not question.strip():
            yield {self.note: board.note(words["blank"])}
            return
        with session.lock:
            if any(answer.ended is None for answer in session.answers):  # Enter, while the models still write
                return
            session.begin(question.strip(), system.strip(), blind and self.several, self.sources)
        workers = session.answer_all(int(tokens), float(temperature))
        self._writing.add(session)
        try:
            shown = board.board(session, self.several, words)
            yield self._state(session, words) | {self.question: ""}
            while any(worker.is_alive() for worker in workers):
                time.sleep(TICK)
                if (now := board.board(session, self.several, words)) != shown:
                    shown = now
                    yield {self.board: shown}
        finally:  # also where the visitor has gone
            session.stop.set()
            self._writing.discard(session)
        stopped = self.several and any(answer.ended == CUT for answer in session.answers)
        yield self._state(session, words, words["stopped"] if stopped else "")

    def _clear(self, session: Session, request: gr.Request) -> Update:
        session.stop.set()
        session.clear()
        return self._state(session, _words(request)) | {self.question: ""}

    def _voted(self, vote: int | str) -> Callable[[Session, gr.Request], Update]:
        """What a button does. (Gradio finds the parameter that wants the request in a function, not in a partial.)"""

        def voted(session: Session, request: gr.Request) -> Update:
            return self._vote(vote, session, _words(request))

        return voted

    def _vote(self, vote: int | str, session: Session, words: dict[str, str]) -> Update:
        with session.lock:
            if not session.can_vote() or (isinstance(vote, int) and not session.answers[vote].counts):
                return {self.note: board.note(words["too_late"])}
            try:
                said = self._save(vote, session, words)
            except UserError as error:  # a full disk: the vote can be given again
                return {self.note: board.note(str(error))}
            session.vote = vote
        names = ", ".join(f"{LETTERS[i]} {answer.source.name}" for i, answer in enumerate(session.answers))
        if session.blind:
            said += " " + words["were"].format(names)
        return self._state(session, words, said)

    def _save(self, vote: int | str, session: Session, words: dict[str, str]) -> str:
        """Save what a vote says; returns what to tell the voter."""
        if not isinstance(vote, int):
            return words[f"none_{vote}"]
        if session.answers[vote].ended == LIMIT:  # a model would learn to end in the middle of a sentence
            return words["none_limit"]
        pairs = session.preferences(vote)
        if not pairs:
            return words["none_equal"]
        count = append_rows(self.votes_file, pairs, "dpo", "--votes_file")
        said = words["saved_one" if len(pairs) == 1 else "saved"]
        return said.format(rows=len(pairs), file=self.votes_file, count=f"{count:,}")

    def _state(self, session: Session, words: dict[str, str], note: str = "") -> Update:
        """Everything as the session has it."""
        writing = any(answer.ended is None for answer in session.answers)
        can_vote = session.can_vote()
        return {
            self.board: board.board(session, self.several, words),
            self.note: board.note(note),
            self.send: gr.update(interactive=not writing),
            self.stop: gr.update(interactive=writing),
            self.new: gr.update(interactive=not writing),
            self.voting: gr.update(visible=can_vote),
        } | {
            button: gr.update(
                interactive=can_vote and (isinstance(vote, str) or session.answers[vote].counts)
            )
            for vote, button in self.votes.items()
        }


def _words(request: gr.Request) -> dict[str, str]:
    return words_for(request.headers.get("accept-language"))
