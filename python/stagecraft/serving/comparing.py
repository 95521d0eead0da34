"""A served model against its folder: template, prompts, stop tokens, the first greedy tokens and their numbers.

Two engines add in different orders, so where a model holds two tokens equally likely either may come out. Such a flip is
told by its numbers: by how much less likely this model holds the token that the server chose. Above the limit it is a
fault.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stagecraft import generation
from stagecraft.data.rows import Message
from stagecraft.serving import asking
from stagecraft.serving.engines import stop_tokens

if TYPE_CHECKING:
    import torch

FIRST = 5  # tokens compared of each answer
LIMITS = {"float32": 1e-3, "bfloat16": 0.05, "float16": 0.05}  # nats between two engines in one dtype
MAX_PARAMETERS = 4e9  # above it no second copy in float32 is loaded to tell the server's dtype
FINER = 4  # a server so many times nearer to float32 than its dtype is does not compute in that dtype


@dataclass
class Check:
    """One line of the table. `good` None: not compared, and `detail` says why."""

    name: str
    good: bool | None
    detail: str


@dataclass
class Reference:
    """What transformers makes of one prompt: ids, greedy tokens, and the distribution before each of them."""

    ids: list[int]
    tokens: list[int]
    logprobs: torch.Tensor  # [tokens, vocabulary], float32
    text: str
    stopped: bool


@dataclass
class Pair:
    """One prompt's answers, and how far they can be compared."""

    messages: list[Message]
    ours: Reference
    theirs: asking.Answer
    exact: list[list[float]] = field(default_factory=list)  # float32's readings of our first tokens
    exact_flip: list[float] = field(
        default_factory=list
    )  # and of the server's token where the first one differs
    ties: list[float] = field(default_factory=list)  # by how much the server's other token is less likely
    equal: int = 0
    fault: str = ""

    @property
    def flip(self) -> int | None:
        """The place of the first token that differs, of those that are compared and where both have one."""
        both = zip(self.ours.tokens[:FIRST], self.theirs.tokens or [], strict=False)
        return next((i for i, (ours, theirs) in enumerate(both) if ours != theirs), None)

    def ours_of(self, place: int) -> float:
        """Our log-probability of our own token there."""
        return float(self.ours.logprobs[place][self.ours.tokens[place]])


def reference(model: Any, tokenizer: Any, messages: list[Message], count: int) -> Reference:
    """Greedy, alone in its batch, by transformers."""
    import torch

    ids = tokenizer(generation.render_prompt(tokenizer, messages), add_special_tokens=False)["input_ids"]
    # Its own settings are filled in where given ones say nothing: they are set aside for good.
    model.generation_config = generation.greedy(model, tokenizer, count)
    with torch.inference_mode():
        prompt = torch.tensor([ids], device=model.device)
        out = model.generate(
            input_ids=prompt,
            attention_mask=torch.ones_like(prompt),
            output_logits=True,
            return_dict_in_generate=True,
        )
    tokens = out.sequences[0, len(ids) :].tolist()
    logprobs = torch.stack([step[0] for step in out.logits]).float().log_softmax(-1).cpu()
    stopped = tokens[-1] in generation.stop_ids(model, tokenizer)
    return Reference(ids, tokens, logprobs, tokenizer.decode(tokens, skip_special_tokens=True), stopped)


def check_template(folder: Path) -> Check:
    """The folder's template against the one that its training run left."""
    file = folder / "chat_template.jinja"
    if not file.exists():
        return Check(
            "template", None, "not compared: it is in tokenizer_config.json, not in a file of its own"
        )
    found = hashlib.sha256(file.read_bytes()).hexdigest()
    run = folder.parent / "run.json"
    try:
        outputs = json.loads(run.read_text(encoding="utf-8"))["outputs"]
        trained = next(
            outputs[name] for name in (f"adapter/{file.name}", f"model/{file.name}") if name in outputs
        )
    except (OSError, ValueError, KeyError, TypeError, StopIteration):
        return Check(
            "template", None, f"not compared with a training run: no hash in {run}; sha256 {found[:12]}"
        )
    if trained["sha256"] == found:
        return Check("template", True, f"sha256 {found[:12]}, as the training run left it")
    return Check("template", False, f"{file} is {found[:12]}, the training run left {trained['sha256'][:12]}")


def check_prompts(server: asking.Server, pairs: list[Pair], tokenizer: Any) -> Check:
    """Token ids of every rendered prompt; their number where the server tells no more."""
    if not server.is_vllm:
        off = [pair for pair in pairs if pair.theirs.prompt_length != len(pair.ours.ids)]
        if off:
            lengths = f"{off[0].theirs.prompt_length} tokens there, {len(off[0].ours.ids)} here"
            return Check("prompts", False, f"{len(off)} of {len(pairs)} have other lengths ({lengths})")
        return Check(
            "prompts",
            True,
            f"{len(pairs)} of {len(pairs)} are as long; the server does not tell their tokens",
        )
    asked = [(pair.messages, pair.ours.ids) for pair in pairs] + _with_turns(pairs[0].messages, tokenizer)
    wrong = [ids for messages, ids in asked if asking.prompt_ids(server, messages) != ids]
    detail = (
        f"{len(asked) - len(wrong)} of {len(asked)} are the same tokens (one with system and earlier turns)"
    )
    return Check("prompts", not wrong, detail)


def _with_turns(messages: list[Message], tokenizer: Any) -> list[tuple[list[Message], list[int]]]:
    """A longer conversation, where the template takes one."""
    turns: list[Message] = [
        {"role": "system", "content": "Answer shortly."},
        messages[-1],
        {"role": "assistant", "content": "Yes."},
        messages[-1],
    ]
    try:
        text = generation.render_prompt(tokenizer, turns)
    except Exception:  # noqa: BLE001 -- a template raises what it likes where it knows no system message
        return []
    return [(turns, tokenizer(text, add_special_tokens=False)["input_ids"])]


def compare(pair: Pair, limit: float, tokenizer: Any) -> None:
    """The first tokens of two answers, up to a flip; log-probabilities where the server tells them."""
    if pair.theirs.tokens is None:
        _compare_texts(pair, limit, tokenizer)
        return
    wanted = pair.ours.tokens[:FIRST]
    for i, token in enumerate(wanted):
        if i >= len(pair.theirs.tokens):
            pair.fault = (
                f"the server stops after {i} tokens, transformers writes {tokenizer.decode([token])!r}"
            )
            return
        other = pair.theirs.tokens[i]
        row = pair.ours.logprobs[i]
        if other != token:
            off = _beyond((pair.theirs.logprobs or [])[i], [float(row[other]), *pair.exact_flip])
            words = tokenizer.decode([other]), tokenizer.decode([token])
            gaps = [reading[i] - flip for reading, flip in zip(pair.exact, pair.exact_flip, strict=True)]
            _flip(pair, min([float(row[token] - row[other]), *gaps]), limit, i, *words, off)
            return
        pair.equal += 1


def _compare_texts(pair: Pair, limit: float, tokenizer: Any) -> None:
    """Without token ids: the text of the first tokens, and near ties where it departs."""
    theirs = pair.theirs.text.strip()
    for i in range(min(FIRST, len(pair.ours.tokens))):
        text = tokenizer.decode(pair.ours.tokens[: i + 1], skip_special_tokens=True).strip()
        if not theirs.startswith(text.rstrip("�")):
            best, second = pair.ours.logprobs[i].topk(2).values.tolist()
            _flip(pair, best - second, limit, i, theirs[: len(text) + 3], text)
            return
        pair.equal += 1


def _flip(
    pair: Pair, gap: float, limit: float, place: int, theirs: str, ours: str, off: float | None = None
) -> None:
    """`off`: how far the server's number for its token is beyond transformers' readings of it, where it tells one.

    Two tokens that are each within the limit can change places when they are up to two limits apart, in the reading that
    holds them nearest (`gap`).
    """
    allowed = limit if off is None else 2 * limit
    if gap <= allowed and (off or 0.0) <= limit:
        pair.ties.append(gap)
        return
    number = "" if off is None else f", and {theirs!r} itself is {off:.3g} off"
    pair.fault = (
        f"token {place + 1} is {theirs!r} there and {ours!r} here, {gap:.3g} nats likelier (a tie would be within "
        f"{allowed:g}){number}"
    )


def _beyond(theirs: float, readings: list[float]) -> float:
    """How far a server's log-probability lies outside the span of transformers' readings of it."""
    return max(min(readings) - theirs, theirs - max(readings), 0.0)


def check_tokens(pairs: list[Pair], limit: float) -> Check:
    """The first greedy tokens of every prompt."""
    faults = [pair for pair in pairs if pair.fault]
    total = sum(pair.equal for pair in pairs)
    ties = [gap for pair in pairs for gap in pair.ties]
    detail = f"first {FIRST} of {len(pairs)} answers: {total} equal"
    if all(pair.theirs.tokens is None for pair in pairs):
        detail += " by their text"
    if ties:
        detail += f", {len(ties)} flipped between near ties (at most {max(ties):.2g} apart)"
    if faults:
        return Check("tokens", False, f"{len(faults)} of {len(pairs)} answers differ: {faults[0].fault}")
    if total < len(pairs):  # more flips than tokens: nothing was shown
        return Check(
            "tokens", None, f"not compared: {detail}; the model holds too many tokens equally likely"
        )
    return Check("tokens", True, detail)


def check_logprobs(pairs: list[Pair], dtype: str, limit: float) -> Check:
    """Log-probabilities of the compared tokens, against the span of transformers' own readings of them.

    In 16 bits the same model computed twice is up to 0.1 apart (measured on a model of 1M parameters that is 0.07 from
    its own weights in exact arithmetic): an engine can't be nearer to one reading than that reading is to the truth.
    """
    told = [(pair, i) for pair in pairs if pair.theirs.logprobs for i in range(pair.equal)]
    if not told:
        return Check("log-probs", None, "not compared: the server tells no log-probabilities")
    plain, beyond = [], []
    for pair, i in told:
        theirs = (pair.theirs.logprobs or [])[i]
        here = pair.ours_of(i)
        plain.append(abs(theirs - here))
        beyond.append(_beyond(theirs, [here, *(reading[i] for reading in pair.exact)]))
    detail = f"{len(told)} tokens, at most {max(plain):.2g} from transformers"
    if pairs[0].exact:
        detail += f" in {dtype}, {max(beyond):.2g} beyond what {dtype} and float32 arithmetic give it"
    return Check("log-probs", max(beyond) <= limit, f"{detail} (limit {limit:g})")


def check_stops(pairs: list[Pair], folder: Path, model: Any, tokenizer: Any) -> Check:
    """The ids in the folder, which servers read, against those that the kit stops at; and where answers end."""
    wanted, there = sorted(generation.stop_ids(model, tokenizer)), stop_tokens(folder)
    lost = sorted(set(wanted) - set(there))
    if lost:
        words = ", ".join(repr(tokenizer.decode([token])) for token in lost)
        return Check(
            "stop tokens",
            False,
            f"{words} is not in {folder}/generation_config.json, so servers go on after it",
        )
    same = [pair for pair in pairs if _same_words(pair)]
    ended = [pair for pair in same if pair.ours.stopped or pair.theirs.stopped]
    for pair in ended:
        ours, theirs = (pair.ours.stopped, len(pair.ours.tokens)), (pair.theirs.stopped, pair.theirs.length)
        if ours != theirs:
            says = [
                f"{'stops' if stopped else 'goes on'} after {count} tokens"
                for stopped, count in (theirs, ours)
            ]
            return Check(
                "stop tokens", False, f"the same words, but the server {says[0]} and transformers {says[1]}"
            )
    if not ended:
        return Check(
            "stop tokens",
            None,
            f"{wanted}; not compared: no answer ends within its limit on both sides alike",
        )
    return Check("stop tokens", True, f"{wanted}; {len(ended)} of {len(pairs)} answers end at the same token")


def _same_words(pair: Pair) -> bool:
    """Whether one answer's words are the other's, or go on from them."""
    ours, theirs = pair.ours.text.strip(), pair.theirs.text.strip()
    if pair.ours.stopped and pair.theirs.stopped:
        return ours == theirs
    return theirs.startswith(ours) if pair.ours.stopped else ours.startswith(theirs) and bool(theirs)


def check_dtype(pairs: list[Pair], dtype: str) -> Check:
    """Whether the server's numbers are as far from float32 as this dtype's are. float32 itself is the limit's business."""
    told = [(pair, i) for pair in pairs if pair.theirs.logprobs for i in range(pair.equal)]
    if not told:
        return Check("dtype", None, "not compared: the server tells no log-probabilities")
    if dtype == "float32":
        return Check("dtype", True, f"{dtype}, by the limit of log-probs")
    if not told[0][0].exact:
        return Check(
            "dtype", None, f"not compared: above {MAX_PARAMETERS:g} parameters no copy in float32 is loaded"
        )
    here = sum(abs(pair.ours_of(i) - pair.exact[0][i]) for pair, i in told) / len(told)
    there = sum(abs((pair.theirs.logprobs or [])[i] - pair.exact[0][i]) for pair, i in told) / len(told)
    detail = f"{there:.2g} from float32 on average, {dtype} here is {here:.2g}"
    if there < here / FINER:
        return Check("dtype", False, f"the server does not compute in {dtype}: {detail}")
    if dtype == "float16" and there > here * FINER:
        return Check("dtype", False, f"the server computes more coarsely than {dtype}: {detail}")
    return Check("dtype", True, f"{dtype}: {detail}")


def read_exactly(pairs: list[Pair], model: Any, dtype: str) -> None:
    """Two more readings of each pair's first tokens by a model in float32: its own weights, and those rounded to dtype.

    Of the server's token as well, where the first one differs.
    """
    import torch

    rows = [[*pair.ours.ids, *pair.ours.tokens[:FIRST]] for pair in pairs]
    starts = [len(pair.ours.ids) for pair in pairs]
    for rounded in (False, True):
        if rounded:
            model.to(getattr(torch, dtype)).float()
        for pair, row, start in zip(pairs, rows, starts, strict=True):
            [score] = generation.token_logprobs(model, [row], [start])
            pair.exact.append(score.tolist())
            if (place := pair.flip) is not None:
                row = [*row[: start + place], (pair.theirs.tokens or [])[place]]
                [score] = generation.token_logprobs(model, [row], [start + place])
                pair.exact_flip.append(float(score[0]))
