"""Files -> checked, split, tokenised datasets, with every row counted.

A tokenised corpus is kept in .cache/tokenised under a key made of the files' content, the tokenizer, the template,
the arguments that matter and VERSION, so that a second start reads it at once and any change makes it anew. Of
several processes (torchrun) the first makes it and the others wait for its lock, before there is a process group
that could time out.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shutil
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from stagecraft.arguments import (
    DataArguments,
    PreferenceDataArguments,
    PretrainingDataArguments,
    SFTDataArguments,
)
from stagecraft.chat import templates
from stagecraft.chat.templates import ChatTemplate, TemplateFault
from stagecraft.data import intake, readers, tokenised
from stagecraft.data.intake import EncodeRows, Item, Survey
from stagecraft.data.rows import Conversation, Document, Message, Preference
from stagecraft.errors import UserError, first_faults
from stagecraft.files import write_json

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

VERSION = 3  # raise it when this code, rows.py or templates.py makes other tokens from the same files
CACHE = Path(".cache/tokenised")
TRAIN, VALID = 1, 2  # the parts of a choice of rows
PARTS = {TRAIN: "training", VALID: "validation"}


@dataclass
class Corpus:
    """Tokenised rows and what became of the raw ones."""

    train: Dataset
    valid: Dataset | None
    counts: dict[str, int]
    files: list[dict[str, Any]]  # {"path", "bytes", "sha256"}
    lengths: dict[str, int] = field(default_factory=dict)  # tokens of a training row: p50, p95, max
    skipped: list[str] = field(default_factory=list)  # places and reasons of bad rows left out as asked
    note: str = ""  # how validation rows were chosen

    @property
    def thoughts(self) -> int:
        """Answers that hold a thought, of both parts: what ChatTemplate.as_trained() wants to know."""
        return self.counts.get(intake.THOUGHTS, 0)

    def describe(self) -> str:
        """What to tell on the terminal: how it was split, and what became of the rows."""
        counts = "data: " + ", ".join(f"{name} {value:,}" for name, value in self.counts.items())
        return f"{self.note}\n{counts}" if self.note else counts


@dataclass
class Choice:
    """Which rows go where: for each good row of `found` (and of `held`, a validation folder's) its part, or 0."""

    found: Survey
    held: Survey | None
    train: np.ndarray
    valid: np.ndarray | None
    counts: dict[str, int]

    @property
    def surveys(self) -> list[tuple[Survey, np.ndarray]]:
        """What to encode: rows and their parts."""
        return [(self.found, self.train), *([(self.held, self.valid)] if self.held else [])]


def load_documents(data: PretrainingDataArguments, tokenizer: PreTrainedTokenizerBase) -> Corpus:
    """Documents joined by the end-of-document token and cut into blocks of block_size tokens (the last is shorter)."""

    def encode(documents: list[Document]) -> list[Item]:
        ids = tokenizer([document.text for document in documents], add_special_tokens=False)["input_ids"]
        return [{"input_ids": [*document, tokenizer.eos_token_id]} for document in ids]

    return _load(data, "pt", tokenizer, None, encode)


def load_conversations(
    data: SFTDataArguments, tokenizer: PreTrainedTokenizerBase, template: ChatTemplate
) -> Corpus:
    """Conversations as input_ids and labels; --on_long_rows says what becomes of a row over model_max_length."""

    def encode(conversations: list[Conversation]) -> list[Item]:
        talks, tools = [c.messages for c in conversations], [c.tools for c in conversations]
        encoded = templates.encode(template, tokenizer, talks, tools)
        items = [
            {"input_ids": row.input_ids, "spans": row.spans}
            if len(row.input_ids) <= data.model_max_length
            else _shorten_conversation(data, tokenizer, template, row, conversation)
            for row, conversation in zip(encoded, conversations, strict=True)
        ]
        answers = [conversation.messages[-1]["content"] for conversation in conversations]
        return [
            item | {"thought": templates.has_thought(answer)}
            for item, answer in zip(items, answers, strict=True)
        ]

    return _load(data, "sft", tokenizer, template, encode)


def _shorten_conversation(
    data: SFTDataArguments,
    tokenizer: PreTrainedTokenizerBase,
    template: ChatTemplate,
    row: templates.Encoded,
    conversation: Conversation,
) -> Item:
    limit, messages = data.model_max_length, conversation.messages
    if data.on_long_rows == "error":
        raise TemplateFault(f"has {len(row.input_ids):,} tokens; --model_max_length is {limit:,}")
    if data.on_long_rows == "truncate":
        spans = [(start, min(end, limit)) for start, end in row.spans if start < limit]
        if not spans:
            return {"dropped": f"no supervised token among the first {limit:,}"}
        return {"input_ids": row.input_ids[:limit], "spans": spans, "noted": f"cut at {limit:,} tokens"}
    while data.on_long_rows == "drop_turns" and len(row.input_ids) > limit and _exchanges(messages) > 1:
        messages = _without_oldest_exchange(messages)
        row = templates.encode(template, tokenizer, [messages], [conversation.tools])[0]
    if len(row.input_ids) > limit:
        return {"dropped": f"longer than {limit:,} tokens"}
    return {"input_ids": row.input_ids, "spans": row.spans, "noted": "oldest turns dropped to fit"}


def load_preferences(
    data: PreferenceDataArguments, tokenizer: PreTrainedTokenizerBase, template: ChatTemplate, kind: str
) -> Corpus:
    """Preferences as prompt_ids, chosen_ids and rejected_ids (dpo), or as whole chosen_ids and rejected_ids (rm).

    Both answers of a row follow the same prompt tokens, however long it is: a long prompt loses its oldest turns, and a
    row whose last question or whose answer does not fit is dropped, or its answers cut (--on_long_rows).
    """

    def encode(preferences: list[Preference]) -> list[Item]:
        return [
            _encode_preference(data, tokenizer, template, kind, row)
            | {"thought": templates.has_thought(row.chosen)}
            for row in preferences
        ]

    return _load(data, kind, tokenizer, template, encode)


def _encode_preference(
    data: PreferenceDataArguments,
    tokenizer: PreTrainedTokenizerBase,
    template: ChatTemplate,
    kind: str,
    row: Preference,
) -> Item:
    prompt, counted = row.prompt, {}
    while True:
        answers = [
            [*prompt, {"role": "assistant", "content": answer}] for answer in (row.chosen, row.rejected)
        ]
        chosen, rejected = templates.encode(template, tokenizer, answers, [row.tools, row.tools])
        prompt_ids = chosen.input_ids[: chosen.spans[-1][0]]
        fits = len(prompt_ids) <= data.max_source_length
        if fits or _exchanges(prompt) <= 1 or data.on_long_rows in ("skip", "error"):
            break
        prompt, counted = _without_oldest_exchange(prompt), {"noted": "oldest turns dropped to fit"}
    if prompt_ids != rejected.input_ids[: rejected.spans[-1][0]]:
        raise TemplateFault("the two answers follow different prompt tokens")
    thinking = template.thinking_for(row.chosen)
    asked = templates.render(
        template.text, prompt, tokenizer, prompt=True, tools=row.tools, thinking=thinking
    )
    if prompt_ids != tokenizer(asked, add_special_tokens=False)["input_ids"]:
        raise TemplateFault("the prompt's tokens differ between training and generation")
    ids = [encoded.input_ids[slice(*encoded.spans[-1])] for encoded in (chosen, rejected)]
    reason = _too_long(data, len(prompt_ids), max(map(len, ids)))
    if reason and data.on_long_rows == "error":
        raise TemplateFault(reason)
    if reason and (data.on_long_rows != "truncate" or not fits):
        return {"dropped": reason}
    if reason:
        ids = [answer[: data.max_target_length] for answer in ids]
        counted = {"noted": f"answers cut at {data.max_target_length:,} tokens"}
        if ids[0] == ids[1]:
            return {"dropped": f"answers equal in their first {data.max_target_length:,} tokens"}
    if kind == "rm":
        return {"chosen_ids": prompt_ids + ids[0], "rejected_ids": prompt_ids + ids[1], **counted}
    return {"prompt_ids": prompt_ids, "chosen_ids": ids[0], "rejected_ids": ids[1], **counted}


def _too_long(data: PreferenceDataArguments, prompt: int, answer: int) -> str | None:
    if prompt > data.max_source_length:
        return f"prompt longer than {data.max_source_length:,} tokens"
    if answer > data.max_target_length:
        return f"answer longer than {data.max_target_length:,} tokens"
    return None


def _exchanges(messages: list[Message]) -> int:
    return sum(message["role"] == "user" for message in messages)


def _without_oldest_exchange(messages: list[Message]) -> list[Message]:
    """Without the first user turn and what answers it, tools' turns included; a system turn stays."""
    asked = [i for i, message in enumerate(messages) if message["role"] == "user"]
    return messages[: asked[0]] + messages[asked[1] :]


def choose(data: DataArguments, kind: str, flag: str = "--train_file_dir") -> Choice:
    """Read and check every row; say which are trained on and which held out. Raises UserError listing bad rows.

    Without a validation folder (or when it is the training folder) the rows with the smallest content hashes are held
    out: the same ones in any order of rows and files, all copies of a row on one side. Copies within the training rows
    are counted and kept; what is also a validation row is taken out of training. `flag`: how a missing folder is named.
    """
    workers = data.preprocessing_num_workers
    found, held = intake.survey(data.train_file_dir, kind, flag, workers), None
    if _has_validation(data):
        held = intake.survey(data.validation_file_dir, kind, "--validation_file_dir", workers)
    surveys = [found, held] if held else [found]
    refuse_bad_rows(surveys, data.on_bad_rows)
    train, valid = np.full(len(found), TRAIN, np.uint8), None
    counts = {"rows read": len(found) + found.bad, "bad rows skipped": found.bad}
    if held:
        leaks = np.isin(found.hashes, held.hashes)
        train[leaks] = 0
        valid = _first_of_each(held.hashes) * np.uint8(VALID)
        counts["leaks into validation removed"] = int(leaks.sum())
        counts["validation rows read"] = len(held) + held.bad
        counts["bad validation rows skipped"] = held.bad
        copies = len(held) - np.count_nonzero(valid)
    else:
        distinct = np.unique(found.hashes)
        out = np.isin(found.hashes, distinct[: round(len(distinct) * data.validation_split_percentage / 100)])
        train[out] = _first_of_each(found.hashes)[out] * VALID
        copies = np.count_nonzero(train == 0)
    counts["duplicates removed from validation"] = int(copies)
    kept = found.hashes[train == TRAIN]
    counts["duplicates kept in training"] = len(kept) - len(np.unique(kept))
    counts["left out by --max_train_samples"] = _limit(train, TRAIN, data.max_train_samples)
    over = _limit(train if valid is None else valid, VALID, data.max_eval_samples)
    counts["left out by --max_eval_samples"] = over
    return Choice(found, held, train, valid, counts)


def refuse_bad_rows(
    surveys: list[Survey], on_bad_rows: str, unmarked: int = 0, more: Sequence[str] = ()
) -> None:
    """Raise UserError with the bad rows of all surveys, unless they are to be skipped.

    `unmarked` rows turned out to be bad later; `more` says why.
    """
    faults = [*(fault for survey in surveys for fault in survey.faults), *more]
    bad = sum(survey.bad for survey in surveys) + unmarked
    if not bad or on_bad_rows == "skip":
        return
    total = sum(len(survey) + survey.bad for survey in surveys)
    hint = "Mend them, or leave them out with --on_bad_rows skip (they will be counted)."
    raise UserError(*first_faults(faults, bad), f"{bad:,} of {total:,} rows are bad. {hint}")


def _has_validation(data: DataArguments) -> bool:
    folder = data.validation_file_dir
    return bool(folder) and Path(folder).resolve() != Path(data.train_file_dir).resolve()


def _first_of_each(hashes: np.ndarray) -> np.ndarray:
    first = np.zeros(len(hashes), bool)
    first[np.unique(hashes, return_index=True)[1]] = True
    return first


def _limit(choice: np.ndarray, part: int, at_most: int | None) -> int:
    """Leave out what is over the limit; returns how many rows that is."""
    over = np.flatnonzero(choice == part)[len(choice) if at_most is None else at_most :]
    choice[over] = 0
    return len(over)


def _load(
    data: DataArguments,
    kind: str,
    tokenizer: PreTrainedTokenizerBase,
    template: ChatTemplate | None,
    encode: EncodeRows,
) -> Corpus:
    _check_numbers(data)
    files = tokenised.describe_files(readers.list_files(data.train_file_dir))
    held = (
        readers.list_files(data.validation_file_dir, "--validation_file_dir") if _has_validation(data) else []
    )
    held_files = tokenised.describe_files(held)
    folder = CACHE / _key(data, kind, files, held_files, tokenizer, template)
    with tokenised.lock(folder):
        # Of several processes only the first is asked to make it again; the others take what it made.
        again = data.overwrite_cache and os.environ.get("LOCAL_RANK", "0") == "0"
        if again or not (folder / "made.json").exists():
            _make(data, kind, encode, folder)
        made = json.loads((folder / "made.json").read_text())
    counts = made["counts"]
    if not counts["training rows"]:
        reasons = ", ".join(f"{name} {value:,}" for name, value in counts.items() if value)
        raise UserError(
            f"--train_file_dir {data.train_file_dir}: no row is left to train on",
            f"of the rows read: {reasons}",
        )
    train, valid = (
        tokenised.open_rows(folder / f"{name}.arrow") if counts[f"{name} rows"] else None
        for name in PARTS.values()
    )
    return Corpus(
        train, valid, counts, files + held_files, made["lengths"], made["skipped"], _split_note(data)
    )


def _split_note(data: DataArguments) -> str:
    """Where validation rows come from when nobody gave a folder of them."""
    if _has_validation(data):
        return ""
    why = "no validation folder"
    if data.validation_file_dir:
        why = f"validation folder {data.validation_file_dir} is the training folder"
    return f"{why}: {data.validation_split_percentage:g} % of the rows are held out by content hash"


def _make(data: DataArguments, kind: str, encode: EncodeRows, folder: Path) -> None:
    """Tokenise into `folder`: the rows of each part, then made.json; under a temporary name until whole."""
    choice = choose(data, kind)
    temporary = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    writers = {
        part: tokenised.BlockWriter(temporary / f"{name}.arrow", data.block_size)
        if isinstance(data, PretrainingDataArguments)
        else tokenised.Writer(temporary / f"{name}.arrow")
        for part, name in PARTS.items()
    }
    tally: dict[int, Counter[str]] = {part: Counter() for part in PARTS}
    surveys = [survey for survey, _ in choice.surveys]
    unmarked, faults = 0, []  # rows that the template can't be used on
    for found, parts in choice.surveys:
        for batch in intake.encode(found, parts, encode, data.preprocessing_num_workers):
            unmarked += len(batch.faults)
            faults += batch.faults[: max(0, intake.KEPT_FAULTS - len(faults))]
            for part, columns in batch.columns.items():
                writers[part].write(columns)
            for part, counts in batch.counts.items():
                tally[part].update(counts)
    refuse_bad_rows(surveys, data.on_bad_rows, unmarked, faults)
    for writer in writers.values():
        writer.close()
    skipped = [fault for survey in surveys for fault in survey.faults] + faults
    made = {
        "counts": _count(choice.counts, tally, writers, unmarked),
        "lengths": writers[TRAIN].quantiles(),
        "skipped": skipped[: intake.KEPT_FAULTS],
    }
    write_json(temporary / "made.json", made)
    shutil.rmtree(folder, ignore_errors=True)
    temporary.rename(folder)


def _count(
    chosen: dict[str, int],
    tally: dict[int, Counter[str]],
    writers: dict[int, tokenised.Writer],
    unmarked: int,
) -> dict[str, int]:
    """Every count that is not zero, in the order of a row's way; rows and tokens of both parts in any case."""
    counts = chosen | {"rows the template can't mark, skipped": unmarked}
    reasons = sorted({*tally[TRAIN], *tally[VALID]} - {"tokens", "supervised", "rows"})
    counts |= {reason: tally[TRAIN][reason] + tally[VALID][reason] for reason in reasons}
    if isinstance(writers[TRAIN], tokenised.BlockWriter):  # whose rows are blocks
        counts |= {f"{PARTS[part]} documents": tally[part]["rows"] for part in PARTS}
        counts["tokens left over"] = sum(writer.left_over for writer in writers.values())
    always = {f"{PARTS[part]} rows": writers[part].rows for part in PARTS}
    always |= {"tokens an epoch": tally[TRAIN]["tokens"] - writers[TRAIN].left_over}
    always |= {"supervised": tally[TRAIN]["supervised"]} if tally[TRAIN]["supervised"] else {}
    return {name: number for name, number in counts.items() if number or name == "rows read"} | always


def _check_numbers(data: DataArguments) -> None:
    faults = []
    for name, value in dataclasses.asdict(data).items():
        low = 0 if name in ("max_eval_samples", "validation_split_percentage") else 1
        if isinstance(value, (int, float)) and not isinstance(value, bool) and value < low:
            faults.append(f"--{name} must be at least {low}, not {value}")
    if data.validation_split_percentage >= 100:
        faults.append(
            f"--validation_split_percentage must be below 100, not {data.validation_split_percentage}"
        )
    if faults:
        raise UserError(*faults)


def _key(
    data: DataArguments,
    kind: str,
    files: list[dict[str, Any]],
    held_files: list[dict[str, Any]],
    tokenizer: PreTrainedTokenizerBase,
    template: ChatTemplate | None,
) -> str:
    elsewhere = ("train_file_dir", "validation_file_dir", "preprocessing_num_workers", "overwrite_cache")
    parts = [
        VERSION,
        kind,
        {k: v for k, v in dataclasses.asdict(data).items() if k not in elsewhere},
        # The suffix says how the bytes are read.
        [(Path(file["path"]).suffixes[-2:], file["sha256"]) for file in files],
        [(Path(file["path"]).suffixes[-2:], file["sha256"]) for file in held_files],
        tokenizer.backend_tokenizer.to_str(),
        tokenizer.special_tokens_map,
        template and template.text,
    ]
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:32]
