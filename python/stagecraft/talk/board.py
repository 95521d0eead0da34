"""The conversation as HTML. All that people and models wrote is text, so nothing in it can run or be fetched."""

from __future__ import annotations

from html import escape

from stagecraft.talk.session import LETTERS, Answer, Session
from stagecraft.talk.sources import CUT, LIMIT

CSS = """
.gradio-container { max-width: 1240px !important; margin: 0 auto !important; }
.gradio-container { --font: system-ui, -apple-system, "Segoe UI", "PingFang SC", "Microsoft YaHei",
  "Noto Sans CJK SC", "Noto Sans SC", sans-serif; font-family: var(--font) !important; }
footer { display: none !important; }
.gradio-container .html-container { padding: 0 !important; }
#sc-note:not(:has(.sc-note)) { display: none; }
.sc-head h1 { font-size: 1.5rem; font-weight: 650; margin: 0 0 .25rem; letter-spacing: -.01em; }
.sc-head p, .sc-foot { color: var(--body-text-color-subdued); margin: 0; line-height: 1.5; }
.sc-foot { font-size: .8rem; }
.sc-foot code { font-size: .95em; overflow-wrap: anywhere; }
.sc-chips { display: flex; flex-wrap: wrap; gap: .4rem; margin-top: .6rem; padding: 0; list-style: none; }
.sc-chips li { font-size: .8rem; border: 1px solid var(--border-color-primary); border-radius: 99px; margin: 0;
  padding: .15rem .7rem; overflow-wrap: anywhere; }
.sc-board { display: flex; flex-direction: column; gap: .9rem; min-height: 7rem; }
.sc-empty { margin: auto; padding: 2rem 1rem; text-align: center; color: var(--body-text-color-subdued);
  max-width: 34rem; line-height: 1.6; }
.sc-text { white-space: pre-wrap; overflow-wrap: anywhere; line-height: 1.65; font-size: .98rem; }
.sc-you { align-self: flex-end; max-width: min(46rem, 88%); background: var(--sc-you);
  border-radius: 14px 14px 3px 14px; padding: .55rem .9rem; }
.sc-past { align-self: flex-start; max-width: min(46rem, 88%); border-radius: 14px 14px 14px 3px; padding: .55rem .9rem;
  border: 1px solid var(--border-color-primary); }
.sc-cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 17rem), 1fr)); gap: .9rem; }
@media (min-width: 641px) { .sc-of-4 { grid-template-columns: 1fr 1fr; } }
.sc-card { border: 1px solid var(--border-color-primary); border-radius: 12px; background: var(--block-background-fill);
  display: flex; flex-direction: column; min-width: 0; overflow: hidden; }
.sc-card header { display: flex; align-items: center; gap: .55rem; padding: .55rem .9rem; min-width: 0;
  border-bottom: 1px solid var(--border-color-primary); }
.sc-letter { flex: none; width: 1.6rem; height: 1.6rem; border-radius: 8px; display: grid; place-items: center;
  font-weight: 700; font-size: .85rem; color: #fff; background: var(--sc-colour); }
.sc-name { font-weight: 600; overflow-wrap: anywhere; min-width: 0; }
.sc-name.sc-hidden { font-weight: 400; font-style: italic; color: var(--body-text-color-subdued); }
.sc-state { margin-left: auto; flex: none; max-width: 55%; font-size: .78rem; text-align: right;
  color: var(--body-text-color-subdued); }
.sc-card .sc-text { padding: .8rem .9rem 1rem; flex: 1; }
.sc-card .sc-text:empty::before { content: "\\2026"; color: var(--body-text-color-subdued); }
.sc-won { border-color: var(--sc-colour); box-shadow: 0 0 0 1px var(--sc-colour); }
.sc-won .sc-state { color: inherit; font-weight: 600; }
.sc-fault { color: var(--sc-fault); font-size: .9rem; }
.sc-0 { --sc-colour: #2563ab; } .sc-1 { --sc-colour: #a8480f; } .sc-2 { --sc-colour: #0f766e; }
.sc-3 { --sc-colour: #7e3fa3; }
.sc-note { padding: .6rem .9rem; border-radius: 10px; background: var(--sc-you); line-height: 1.5;
  overflow-wrap: anywhere; }
.sc-which { font-weight: 600; margin: 0; }
:root, body { --sc-you: #e8eef7; --sc-fault: #b42318; }
body:not(.dark) { --body-text-color-subdued: #55627a !important; }
.dark, .dark body { --sc-you: #26303f; --sc-fault: #ff9d91; }
#sc-vote { gap: .5rem; }
#sc-votes { gap: .6rem; } #sc-votes button { min-width: 7rem; font-weight: 600; }
#sc-vote-0 { --sc-colour: #2563ab; } #sc-vote-1 { --sc-colour: #a8480f; } #sc-vote-2 { --sc-colour: #0f766e; }
#sc-vote-3 { --sc-colour: #7e3fa3; }
#sc-vote-0, #sc-vote-1, #sc-vote-2, #sc-vote-3 { background: var(--sc-colour) !important; color: #fff !important; }
#sc-votes button:hover { filter: brightness(1.12); } #sc-votes button:disabled { opacity: .4; }
#sc-ask textarea { font-size: 1rem; min-height: 3.2rem; }
@media (max-width: 640px) {
  .gradio-container { padding: .75rem !important; }
  .sc-you, .sc-past { max-width: 94%; }
  #sc-votes button { flex: 1 1 42%; min-width: 0; }
}
"""


def head(names: list[str], words: dict[str, str]) -> str:
    """Title, what this is, and who answers."""
    one = "_one" if len(names) == 1 else ""
    chips = "".join(f"<li>{escape(name)}</li>" for name in names)
    return (
        f'<div class="sc-head"><h1>{words["title" + one]}</h1><p>{words["lead" + one]}</p>'
        f'<ul class="sc-chips">{chips}</ul></div>'
    )


def foot(file: str, several: bool, words: dict[str, str]) -> str:
    """Where votes go, and what answers are not."""
    where = words["foot"].format(file=f"<code>{escape(file)}</code>") + " " if several else ""
    return f'<p class="sc-foot">{where}{words["advice"]}</p>'


def board(session: Session, several: bool, words: dict[str, str]) -> str:
    """What has been said so far, and the answers to the last question side by side."""
    if not session.question:
        text = words["empty" if several else "empty_one"]
        return f'<div class="sc-board"><p class="sc-empty">{text}</p></div>'
    past = "".join(
        _said("you", words["you"], question) + _said("past", words["said"], answer)
        for question, answer in session.history
    )
    cards = "".join(_card(i, session, several, words) for i in range(len(session.answers)))
    asked = _said("you", words["you"], session.question)
    return f'<div class="sc-board">{past}{asked}<div class="sc-cards sc-of-{len(session.answers)}">{cards}</div></div>'


def note(text: str) -> str:
    """What came of a vote, or of a mistake."""
    return f'<div class="sc-note" role="status">{escape(text)}</div>' if text else ""


def _said(kind: str, who: str, text: str) -> str:
    return f'<div class="sc-{kind} sc-text" aria-label="{escape(who)}" dir="auto">{escape(text)}</div>'


def _card(number: int, session: Session, several: bool, words: dict[str, str]) -> str:
    answer = session.answers[number]
    letter = f'<span class="sc-letter">{LETTERS[number]}</span>' if several else ""
    hidden = session.names_hidden()
    shown = escape(words["hidden"] if hidden else answer.source.name)
    name = f'<span class="sc-name{" sc-hidden" if hidden else ""}">{shown}</span>'
    won = " sc-won" if session.vote == number else ""
    state = words["won"] if won else _state(answer, words)
    # A fault names the server or the folder, which is as good as the model's name.
    fault = words["failed"] if hidden else answer.fault
    words_said = escape(answer.text or (words["nothing"] if answer.ended and not answer.fault else ""))
    below = f'<div class="sc-fault">{escape(fault)}</div>' if answer.fault else ""
    return (
        f'<article class="sc-card sc-{number}{won}" aria-busy="{str(answer.ended is None).lower()}">'
        f'<header>{letter}{name}<span class="sc-state">{state}</span></header>'
        f'<div class="sc-text" dir="auto">{words_said}{below}</div></article>'
    )


def _state(answer: Answer, words: dict[str, str]) -> str:
    states = {None: "writing", CUT: "cut", LIMIT: "limit", "failed": "failed"}
    return words[states[answer.ended]] if answer.ended in states else ""
