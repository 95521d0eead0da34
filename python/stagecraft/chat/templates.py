"""Chat template -> token ids and loss mask, from one rendering, proven on every row.

A template marks what the assistant says with {% generation %} ... {% endgeneration %}. The text inside the
marks must be exactly the assistant's words plus one end-of-turn token; a template or a row for which that does
not hold is refused. The template saved with a model renders the same text without the marks, which runtimes
other than transformers may reject.

A tokenizer's own template without marks is replaced by the file in templates/ that renders the same text. Where
no file does, its spans are derived: it renders each conversation a second time with stand-ins for the
assistant's words, and what it puts between them must be what it puts between the words themselves.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import repeat
from pathlib import Path
from typing import TYPE_CHECKING

from stagecraft.chat import masks, probes
from stagecraft.chat.masks import short
from stagecraft.chat.rendering import MARK, Message, TemplateFault, Tools, renderer
from stagecraft.chat.spoken import check_calls, check_others, forms
from stagecraft.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["ChatTemplate", "Encoded", "TemplateFault", "encode", "has_thought", "load_template", "render"]

FOLDER = Path(__file__).resolve().parents[3] / "templates"
_MARK = re.compile(r"\{%-?\s*(?:end)?generation\s*-?%\}")
# Before a template: a thought has to be asked for. "is defined" leaves the word to whoever says enable_thinking.
_UNASKED = "{% set enable_thinking = enable_thinking is defined and enable_thinking %}"
_STAND_IN = "\ufdd1{}\ufdd2"  # like the mark: code points that no text needs


@dataclass(frozen=True)
class ChatTemplate:
    """A template whose assistant spans have been checked."""

    name: str
    text: str  # with {% generation %} marks, unless derived
    end_of_turn: str
    call_end: str = ""  # what ends a turn with tool calls; empty: it renders none
    lead: str = ""  # the white space that the assistant's first token begins with
    trims: bool = False  # words lose the white space at their edges
    drops_thinking: bool = False  # <think> blocks before the last question are left out
    derived: bool = False  # no marks: spans come from a second rendering

    @property
    def saved_text(self) -> str:
        """The template as it is saved with a model: the same rendering, no marks."""
        return _MARK.sub("", self.text)

    def as_trained(self, thoughts: int) -> str:
        """The template to save with a model that was trained on so many answers with a thought.

        Without any, one that deals in thoughts asks for none unless it is told to: the prompt is then what stood before
        the answers in training, wherever the model is asked.
        """
        asks = "enable_thinking" in self.text and not thoughts
        return (_UNASKED if asks else "") + self.saved_text

    def thinking_for(self, answer: str) -> bool | None:
        """The `thinking` with which a prompt is what stands before this answer in training.

        False for an answer without a thought where the template deals in thoughts (Qwen3 puts an empty one before
        it), else None.
        """
        return False if self.drops_thinking and not has_thought(answer) else None


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


def has_thought(answer: str) -> bool:
    """Whether an answer holds a <think> block that is not empty."""
    return "</think>" in answer and bool(answer.partition("</think>")[0].rpartition("<think>")[2].strip())


def load_template(tokenizer: PreTrainedTokenizerBase, name: str | None) -> ChatTemplate:
    """The named template file, or the one that renders as the tokenizer's own template does."""
    if not tokenizer.is_fast:
        raise UserError(
            f"{tokenizer.name_or_path}: its tokenizer has no tokenizer.json, without which masks can't be proven"
        )
    known = {file.stem: file for file in sorted(FOLDER.glob("*.jinja"), key=lambda file: file.stem)}
    if name is None:
        return _own_template(tokenizer, known)
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1)
        raise UserError(
            f"--template_name {name}: no such template; known: {', '.join(known)}"
            + (f'; did you mean "{near[0]}"?' if near else "")
        )
    return _usable(tokenizer, name, known[name].read_text(encoding="utf-8"))


def render(
    text: str,
    messages: list[Message],
    tokenizer: PreTrainedTokenizerBase,
    prompt: bool = False,
    tools: Tools = None,
    thinking: bool | None = None,
) -> str:
    """The conversation as the model sees it; with `prompt`, up to where the assistant's next words begin.

    `thinking` is the template's enable_thinking; None leaves it to the template. Raises TemplateFault.
    """
    return "".join(renderer(text, tokenizer, prompt, thinking)(messages, tools))


def encode(
    template: ChatTemplate,
    tokenizer: PreTrainedTokenizerBase,
    conversations: Sequence[list[Message]],
    tools: Sequence[Tools] | None = None,
) -> list[Encoded]:
    """Render and tokenise conversations, with the tools offered in each, in one batch. Raises TemplateFault."""
    cut = _cutter(template, tokenizer)
    rows = []
    for messages, offered in zip(conversations, tools or repeat(None), strict=tools is not None):
        pieces = cut(messages, offered)
        _check_row(template, pieces, messages, offered)
        rows.append(pieces)
    ends = (template.end_of_turn, template.call_end) if template.call_end else (template.end_of_turn,)
    return [Encoded(ids, spans) for ids, spans in masks.tokenise(tokenizer, rows, ends)]


def _cutter(
    template: ChatTemplate, tokenizer: PreTrainedTokenizerBase
) -> Callable[[list[Message], Tools], list[str]]:
    """A function (messages, tools) -> [outside, inside, outside, ...]."""
    rendered = renderer(template.text, tokenizer)
    if not template.derived:
        return rendered

    def cut(messages: list[Message], tools: Tools) -> list[str]:
        return _derive(template, messages, "".join(rendered(messages, tools)), rendered, tools)

    return cut


def _derive(
    template: ChatTemplate,
    messages: list[Message],
    text: str,
    rendered: Callable[[list[Message], Tools], list[str]],
    tools: Tools,
) -> list[str]:
    """Cut `text`, the rendering of messages, where a rendering with stand-ins for the assistant's words has these."""
    turns = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    if any(messages[i].get("tool_calls") for i in turns):
        raise TemplateFault(
            "it has no {% generation %} marks, and what it makes of tool calls can't be derived"
        )
    stand_ins = {i: _STAND_IN.format(i) for i in turns}
    other = "".join(
        rendered([{**m, "content": stand_ins.get(i, m["content"])} for i, m in enumerate(messages)], tools)
    )
    around = re.split(_STAND_IN.format(r"(\d+)"), other)
    if list(map(int, around[1::2])) != turns:
        raise TemplateFault("it doesn't render each of the assistant's turns once, in order")
    around, said = around[::2], [messages[i]["content"] for i in turns]
    if template.trims:
        said = [words.strip() for words in said]
    if text != "".join(part for pair in zip(around, [*said, ""], strict=True) for part in pair):
        raise TemplateFault("what it puts around the assistant's words depends on the words")
    for k, words in enumerate(said):
        before, after = around[k], around[k + 1]
        if not after.startswith(template.end_of_turn) or not before.endswith(template.lead):
            raise TemplateFault(f"it puts {short(after[:20])} after what the assistant says")
        said[k] = template.lead + words + template.end_of_turn
        around[k] = before.removesuffix(template.lead)
        around[k + 1] = after.removeprefix(template.end_of_turn)
    return [part for pair in zip(around, said, strict=False) for part in pair] + around[-1:]


def _check_row(template: ChatTemplate, pieces: list[str], messages: list[Message], tools: Tools) -> None:
    """Each marked text is what the assistant says in that turn, and everyone else's words are outside."""
    said = [message for message in messages if message["role"] == "assistant"]
    inside = pieces[1::2]
    plain = [template.lead + message["content"] + template.end_of_turn for message in said]
    if inside != plain or any(message.get("tool_calls") for message in said):
        if any(MARK in message["content"] for message in messages):
            raise TemplateFault(f"the row holds U+{ord(MARK):04X}, which is no character; take it out")
        if len(pieces) % 2 == 0 or len(inside) != len(said):
            raise TemplateFault(f"it marks {len(inside)} texts where the assistant has {len(said)} turns")
        last_question = max((i for i, m in enumerate(messages) if m["role"] == "user"), default=-1)
        turns = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
        for i, marked in zip(turns, inside, strict=True):
            _check_turn(template, marked, messages[i], earlier=i < last_question)
    check_others(pieces[::2], messages, tools)


def _check_turn(template: ChatTemplate, marked: str, message: Message, earlier: bool) -> None:
    calls = message.get("tool_calls")
    end = (template.call_end if calls else None) or template.end_of_turn
    words = forms(message["content"], template.trims, template.drops_thinking, earlier)
    body = marked.removeprefix(template.lead).removesuffix(end)
    if not marked.endswith(end):
        pass
    elif calls:
        begins = next((form for form in words if body.startswith(form)), None)
        if begins is not None:
            return check_calls(body[len(begins) :], calls)
    elif body in words and marked == template.lead + body + end:
        return None
    raise TemplateFault(
        f"it marks {short(marked)} where the assistant says {short(message['content'] + end)}"
    )


def _own_template(tokenizer: PreTrainedTokenizerBase, known: dict[str, Path]) -> ChatTemplate:
    own = tokenizer.chat_template
    if isinstance(own, dict):
        own = own.get("default")
    names = f"name one with --template_name ({', '.join(known)})"
    own = own and own.removeprefix(_UNASKED)  # what a stage trains on decides that again
    if not own:
        raise UserError(f"{tokenizer.name_or_path} has no chat template; {names}")
    if _MARK.search(own):
        return _usable(tokenizer, "the tokenizer's own", own)
    for name, file in known.items():
        text = file.read_text(encoding="utf-8")
        if probes.render_alike(text, own, tokenizer):
            return _usable(tokenizer, name, text)
    try:
        return _checked(tokenizer, "the tokenizer's own", own, derived=True)
    except TemplateFault as reason:
        raise UserError(
            f"the chat template of {tokenizer.name_or_path} does not mark what the assistant says "
            f"({{% generation %}}), no file in templates/ renders as it does, and its marks can't be derived: "
            f"{reason}; {names}"
        ) from None


def _usable(tokenizer: PreTrainedTokenizerBase, name: str, text: str) -> ChatTemplate:
    try:
        return _checked(tokenizer, name, text)
    except TemplateFault as reason:
        raise UserError(f"template {name} can't be used with {tokenizer.name_or_path}: {reason}") from None


def _checked(tokenizer: PreTrainedTokenizerBase, name: str, text: str, derived: bool = False) -> ChatTemplate:
    """The template, after its marks, its end of turn and its saved form were found right on the probes."""
    rendered = renderer(text, tokenizer)
    if derived:
        lead, end = probes.find_ends(text, tokenizer)
    else:
        lead, end = probes.marked_ends(rendered)
    if len(tokenizer.backend_tokenizer.encode(end, add_special_tokens=False).ids) != 1:
        raise TemplateFault(f"its end of turn {end!r} is not one token of this tokenizer")
    template = ChatTemplate(name, text, end, lead=lead, derived=derived)
    template = replace(
        template,
        trims=probes.trims(rendered, end),
        drops_thinking=probes.drops_thinking(rendered),
        call_end="" if derived else probes.call_end(rendered, tokenizer, end),
    )
    encode(template, tokenizer, probes.PLAIN)
    probes.check_prompt(text, tokenizer)
    saved = renderer(template.saved_text, tokenizer)
    for messages, tools in probes.accepted(rendered):
        if saved(messages, tools) != ["".join(rendered(messages, tools))]:
            raise TemplateFault("without its {% generation %} marks it renders another text")
    return template
