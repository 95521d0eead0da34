"""Chat template -> token ids and loss mask, from one rendering, proven on every row.

A template marks what the assistant says with {% generation %} ... {% endgeneration %}. The text inside the marks
must be exactly the assistant's words plus one end-of-turn token; a template or a row for which that does not
hold is refused. The template saved with a model renders the same text without the marks, which runtimes other
than transformers may reject.
"""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from stagecraft.errors import UserError
from stagecraft.rows import Message

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FOLDER = Path(__file__).resolve().parents[2] / "templates"
_MARK = re.compile(r"\{%-?\s*(?:end)?generation\s*-?%\}")
# Conversations on which two templates must render the same text to count as the same template.
_PROBES: list[list[Message]] = [
    [{"role": "user", "content": "q1"}, {"role": "assistant", "content": "a1"}],
    [
        {"role": "system", "content": "s"},
        {"role": "user", "content": "q1"},
        {"role": "assistant", "content": "a1"},
        {"role": "user", "content": "q2"},
        {"role": "assistant", "content": "a2"},
    ],
]


class TemplateFault(ValueError):
    """Why a template can't be shown to train on exactly the assistant's words."""


@dataclass(frozen=True)
class ChatTemplate:
    """A template whose assistant spans have been checked."""

    name: str
    text: str  # with {% generation %} marks
    end_of_turn: str

    @property
    def saved_text(self) -> str:
        """The template as it is saved with a model: the same rendering, no marks."""
        return _MARK.sub("", self.text)


@dataclass(frozen=True)
class Encoded:
    """Token ids of a conversation and the spans (start, end) of token positions that carry loss."""

    input_ids: list[int]
    spans: list[tuple[int, int]]

    @property
    def labels(self) -> list[int]:
        """input_ids where the assistant speaks, -100 elsewhere."""
        labels = [-100] * len(self.input_ids)
        for start, end in self.spans:
            labels[start:end] = self.input_ids[start:end]
        return labels


def load_template(tokenizer: PreTrainedTokenizerBase, name: str | None) -> ChatTemplate:
    """The named template file, or the one that renders as the tokenizer's own template does."""
    known = {file.stem: file for file in sorted(FOLDER.glob("*.jinja"))}
    if name is None:
        return _own_template(tokenizer, known)
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1)
        raise UserError(
            f"--template_name {name}: no such template; known: {', '.join(known)}"
            + (f'; did you mean "{near[0]}"?' if near else "")
        )
    return _checked(tokenizer, name, known[name].read_text(encoding="utf-8"))


def render(
    text: str, messages: list[Message], tokenizer: PreTrainedTokenizerBase, prompt: bool = False
) -> str:
    """The conversation as the model sees it; with `prompt`, up to where the assistant's next words begin."""
    return _render(text, messages, tokenizer, prompt)[0]


def encode(
    template: ChatTemplate, tokenizer: PreTrainedTokenizerBase, conversations: list[list[Message]]
) -> list[Encoded]:
    """Render and tokenise conversations in one batch. Raises TemplateFault."""
    texts, spans = [], []
    for messages in conversations:
        text, found = _render(template.text, messages, tokenizer)
        _check_spans(text, found, messages, template.end_of_turn)
        texts.append(text)
        spans.append(found)
    batch = tokenizer(texts, add_special_tokens=False, return_offsets_mapping=True)
    return [
        Encoded(ids, [_token_span(offsets, span, text) for span in found])
        for ids, offsets, found, text in zip(
            batch["input_ids"], batch["offset_mapping"], spans, texts, strict=True
        )
    ]


def _own_template(tokenizer: PreTrainedTokenizerBase, known: dict[str, Path]) -> ChatTemplate:
    own = tokenizer.chat_template
    if not own:
        raise UserError(
            f"{tokenizer.name_or_path} has no chat template; name one with --template_name ({', '.join(known)})"
        )
    if _MARK.search(own):
        return _checked(tokenizer, "the tokenizer's own", own)
    for name, file in known.items():
        text = file.read_text(encoding="utf-8")
        if _render_alike(text, own, tokenizer):
            return _checked(tokenizer, name, text)
    raise UserError(
        f"the chat template of {tokenizer.name_or_path} does not mark what the assistant says ({{% generation %}}), "
        f"and no file in templates/ renders as it does; name one with --template_name ({', '.join(known)})"
    )


def _render_alike(text: str, own: str, tokenizer: PreTrainedTokenizerBase) -> bool:
    try:
        return all(render(text, probe, tokenizer) == render(own, probe, tokenizer) for probe in _PROBES)
    except TemplateFault:
        return False


def _checked(tokenizer: PreTrainedTokenizerBase, name: str, text: str) -> ChatTemplate:
    """The template, after its marks, its end of turn and its saved form were found right on the probes."""
    try:
        rendered, spans = _render(text, _PROBES[0], tokenizer)
        if len(spans) != 1:
            raise TemplateFault("it marks no assistant text with {% generation %}")
        end_of_turn = rendered[slice(*spans[0])].removeprefix("a1")
        template = ChatTemplate(name, text, end_of_turn)
        if len(tokenizer(end_of_turn, add_special_tokens=False)["input_ids"]) != 1:
            raise TemplateFault(f"its end of turn {end_of_turn!r} is not one token of this tokenizer")
        encode(template, tokenizer, _PROBES)
        if any(render(template.saved_text, p, tokenizer) != render(text, p, tokenizer) for p in _PROBES):
            raise TemplateFault("without its {% generation %} marks it renders another text")
    except TemplateFault as reason:
        raise UserError(f"template {name} can't be used with {tokenizer.name_or_path}: {reason}") from None
    return template


def _render(
    text: str, messages: list[Message], tokenizer: PreTrainedTokenizerBase, prompt: bool = False
) -> tuple[str, list[tuple[int, int]]]:
    from jinja2 import TemplateError
    from transformers.utils.chat_template_utils import render_jinja_template

    try:
        rendered, spans = render_jinja_template(
            [messages],
            chat_template=text,
            return_assistant_tokens_mask=bool(_MARK.search(text)),
            add_generation_prompt=prompt,
            **tokenizer.special_tokens_map,
        )
    except TemplateError as error:  # it does not parse, or it refuses the conversation (raise_exception)
        raise TemplateFault(f"it fails: {' '.join(str(error).split())}") from None
    return rendered[0], [tuple(span) for span in spans[0]] if spans else []


def _check_spans(text: str, spans: list[tuple[int, int]], messages: list[Message], end_of_turn: str) -> None:
    marked = [text[start:end] for start, end in spans]
    wanted = [m["content"] + end_of_turn for m in messages if m["role"] == "assistant"]
    if marked != wanted:
        first = next(
            (pair for pair in zip(marked, wanted, strict=False) if pair[0] != pair[1]), (marked, wanted)
        )
        raise TemplateFault(f"it marks {first[0]!r} where the assistant says {first[1]!r}")


def _token_span(offsets: list[tuple[int, int]], span: tuple[int, int], text: str) -> tuple[int, int]:
    """The tokens that lie inside a character span. A token across its edge would train on (or hide) other text."""
    inside = [i for i, (start, end) in enumerate(offsets) if start < span[1] and end > span[0]]
    if not inside or offsets[inside[0]][0] < span[0] or offsets[inside[-1]][1] > span[1]:
        around = text[max(0, span[0] - 10) : span[0] + 10]
        raise TemplateFault(f"a token crosses the edge of what the assistant says, near {around!r}")
    return inside[0], inside[-1] + 1
