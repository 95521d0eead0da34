"""Files -> checked, split, tokenised datasets, with every row counted.

A tokenised corpus is kept in .cache/tokenised under a key made of the files' content, the tokenizer, the template,
the arguments that matter and VERSION, so that a second start reads it at once and any change makes it anew.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shutil
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stagecraft import rows as row_formats
from stagecraft import templates
from stagecraft.arguments import (
    DataArguments,
    PreferenceDataArguments,
    PretrainingDataArguments,
    SFTDataArguments,
)
from stagecraft.errors import UserError
from stagecraft.rows import Conversation, Document, Preference, Row
from stagecraft.templates import ChatTemplate

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

VERSION = 1  # raise it when the code below makes other tokens from the same rows
CACHE = Path(".cache/tokenised")


@dataclass
class Corpus:
    """Tokenised rows and what became of the raw ones."""

    train: Dataset
    valid: Dataset | None
    counts: dict[str, int]
    files: list[dict[str, Any]]  # {"path", "bytes", "sha256"}

    def describe(self) -> str:
        """One line for the terminal."""
        return "data: " + ", ".join(f"{name} {value:,}" for name, value in self.counts.items())


def load_documents(data: PretrainingDataArguments, tokenizer: PreTrainedTokenizerBase) -> Corpus:
    """Documents joined by the end-of-document token and cut into blocks of block_size tokens (the last is shorter)."""

    def encode(documents: list[Document]) -> list[dict[str, list[int]]]:
        ids = tokenizer([document.text for document in documents], add_special_tokens=False)["input_ids"]
        stream = [token for document in ids for token in (*document, tokenizer.eos_token_id)]
        blocks = [stream[i : i + data.block_size] for i in range(0, len(stream), data.block_size)]
        return [{"input_ids": block, "labels": block} for block in blocks if len(block) > 1]

    return _load(data, "pt", tokenizer, None, encode)


def load_conversations(
    data: SFTDataArguments, tokenizer: PreTrainedTokenizerBase, template: ChatTemplate
) -> Corpus:
    """Conversations as input_ids and labels. A row over model_max_length loses its oldest turns, never its answer."""

    def encode(conversations: list[Conversation]) -> list[dict[str, list[int]]]:
        encoded = []
        for first, messages in zip(
            templates.encode(template, tokenizer, [c.messages for c in conversations]),
            [c.messages for c in conversations],
            strict=True,
        ):
            row = first
            while len(row.input_ids) > data.model_max_length and _exchanges(messages) > 1:
                messages = _without_oldest_exchange(messages)
                row = templates.encode(template, tokenizer, [messages])[0]
            if len(row.input_ids) > data.model_max_length:
                encoded.append({"dropped": f"longer than {data.model_max_length} tokens"})
                continue
            cut = {} if row is first else {"noted": "oldest turns dropped to fit"}
            encoded.append({"input_ids": row.input_ids, "labels": row.labels, **cut})
        return encoded

    return _load(data, "sft", tokenizer, template, encode)


def load_preferences(
    data: PreferenceDataArguments, tokenizer: PreTrainedTokenizerBase, template: ChatTemplate, kind: str
) -> Corpus:
    """Preferences as prompt_ids, chosen_ids and rejected_ids (dpo), or as whole chosen_ids and rejected_ids (rm).

    Both answers of a row follow the same prompt tokens. A long prompt loses its oldest turns; a row whose last
    question or answer does not fit is dropped and counted.
    """

    def encode(preferences: list[Preference]) -> list[dict[str, Any]]:
        return [_encode_preference(data, tokenizer, template, kind, row) for row in preferences]

    return _load(data, kind, tokenizer, template, encode)


def _encode_preference(
    data: PreferenceDataArguments,
    tokenizer: PreTrainedTokenizerBase,
    template: ChatTemplate,
    kind: str,
    row: Preference,
) -> dict[str, Any]:
    prompt, noted = row.prompt, {}
    while True:
        answers = [
            [*prompt, {"role": "assistant", "content": answer}] for answer in (row.chosen, row.rejected)
        ]
        chosen, rejected = templates.encode(template, tokenizer, answers)
        start = chosen.spans[-1][0]
        if start <= data.max_source_length or _exchanges(prompt) <= 1:
            break
        prompt, noted = _without_oldest_exchange(prompt), {"noted": "oldest turns dropped to fit"}
    prompt_ids = tokenizer(
        templates.render(template.text, prompt, tokenizer, prompt=True), add_special_tokens=False
    )["input_ids"]
    if not prompt_ids == chosen.input_ids[:start] == rejected.input_ids[: rejected.spans[-1][0]]:
        raise templates.TemplateFault("the prompt's tokens differ between training and generation")
    if start > data.max_source_length:
        return {"dropped": f"prompt longer than {data.max_source_length} tokens"}
    ids = [encoded.input_ids[slice(*encoded.spans[-1])] for encoded in (chosen, rejected)]
    if max(map(len, ids)) > data.max_target_length:
        return {"dropped": f"answer longer than {data.max_target_length} tokens"}
    if kind == "rm":
        return {"chosen_ids": prompt_ids + ids[0], "rejected_ids": prompt_ids + ids[1], **noted}
    return {"prompt_ids": prompt_ids, "chosen_ids": ids[0], "rejected_ids": ids[1], **noted}


def _exchanges(messages: list[row_formats.Message]) -> int:
    return sum(message["role"] == "user" for message in messages)


def _without_oldest_exchange(messages: list[row_formats.Message]) -> list[row_formats.Message]:
    system = [message for message in messages[:1] if message["role"] == "system"]
    return system + messages[len(system) + 2 :]


def _load(
    data: DataArguments,
    kind: str,
    tokenizer: PreTrainedTokenizerBase,
    template: ChatTemplate | None,
    encode: Any,
) -> Corpus:
    from datasets import load_from_disk

    _check_numbers(data)
    files = [_describe_file(path) for path in row_formats.list_files(data.train_file_dir)]
    valid_dir = data.validation_file_dir
    if valid_dir and Path(valid_dir).resolve() == Path(data.train_file_dir).resolve():
        print(f"validation folder {valid_dir} is the training folder: rows are split off instead")
        valid_dir = None
    held_out = row_formats.list_files(valid_dir, "--validation_file_dir") if valid_dir else []
    valid_files = [_describe_file(path) for path in held_out]
    folder = CACHE / _key(data, kind, files, valid_files, tokenizer, template)
    if (folder / "counts.json").exists() and not data.overwrite_cache:
        counts = json.loads((folder / "counts.json").read_text())
    else:
        train, valid, counts = _split(data, kind, valid_dir)
        encoded: dict[str, Dataset] = {}
        for name, part in (("train", train), ("valid", valid)):
            size = len(part) if kind == "pt" else 1000  # documents are one stream of blocks
            encoded[name] = _tokenise(part, size, encode, counts, data.preprocessing_num_workers)
        counts |= {"training rows": len(encoded["train"]), "validation rows": len(encoded["valid"])}
        counts |= _count_tokens(encoded["train"])
        _keep(folder, encoded, counts)
    if not counts["training rows"]:
        raise UserError(
            f"--train_file_dir {data.train_file_dir}: no row is left to train on", _reasons(counts)
        )
    valid = load_from_disk(str(folder / "valid")) if counts["validation rows"] else None
    return Corpus(load_from_disk(str(folder / "train")), valid, counts, files + valid_files)


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


def _split(
    data: DataArguments, kind: str, valid_dir: str | None
) -> tuple[list[Row], list[Row], dict[str, int]]:
    """Training and validation rows, exact duplicates and rows that leak into validation taken out and counted."""
    read = row_formats.read_rows(data.train_file_dir, kind)
    counts: dict[str, int] = {"rows read": len(read)}
    unique = {content_hash(row): row for row in reversed(read)}
    train = [row for row in read if unique[content_hash(row)] is row]
    counts["duplicates removed"] = len(read) - len(train)
    if valid_dir:
        valid = row_formats.read_rows(valid_dir, kind, "--validation_file_dir")
        held = {content_hash(row) for row in valid}
        kept = [row for row in train if content_hash(row) not in held]
        counts["leaks into validation removed"] = len(train) - len(kept)
        train = kept
    else:
        size = round(len(train) * data.validation_split_percentage / 100)
        held = set(sorted(map(content_hash, train))[:size])
        valid = [row for row in train if content_hash(row) in held]
        train = [row for row in train if content_hash(row) not in held]
    if data.max_train_samples is not None:
        counts["left out by --max_train_samples"] = max(0, len(train) - data.max_train_samples)
        train = train[: data.max_train_samples]
    if data.max_eval_samples is not None:
        counts["left out by --max_eval_samples"] = max(0, len(valid) - data.max_eval_samples)
        valid = valid[: data.max_eval_samples]
    return train, valid, counts


def _tokenise(
    part: list[Row], size: int, encode: Any, counts: dict[str, int], workers: int | None
) -> Dataset:
    """Encode rows in batches, over several processes when asked; a row that says "dropped" is counted, not kept."""
    from datasets import Dataset
    from tqdm import tqdm

    batches = [part[i : i + size] for i in range(0, len(part), max(1, size))]
    try:
        if workers and workers > 1 and len(batches) > 1:
            encoded = _encode_in_processes(batches, encode, workers)
        else:
            bar = tqdm(batches, desc="tokenising", unit="k rows", disable=None if len(batches) > 1 else True)
            encoded = [item for batch in bar for item in encode(batch)]
    except templates.TemplateFault:
        raise UserError(*_template_faults(part, encode)) from None
    tally = Counter(item[key] for item in encoded for key in ("dropped", "noted") if key in item)
    for reason, number in sorted(tally.items()):
        counts[reason] = counts.get(reason, 0) + number
    kept = [{k: v for k, v in item.items() if k.endswith(("ids", "labels"))} for item in encoded]
    return Dataset.from_list([item for item in kept if item])


def _template_faults(part: list[Row], encode: Any) -> list[str]:
    """The rows of a part that the template can't be used on, one by one, each with its place."""
    faults = []
    for row in part:
        try:
            encode([row])
        except templates.TemplateFault as reason:
            faults.append(f"{row.where}: {reason}")
    shown = row_formats.SHOWN_FAULTS
    more = [f"... and {len(faults) - shown} more"] if len(faults) > shown else []
    total = f"{len(faults)} of {len(part)} rows don't go with the chat template. Mend them, or name another template."
    return [*faults[:shown], *more, total]


def _encode_in_processes(batches: list[list[Row]], encode: Any, workers: int) -> list[dict[str, Any]]:
    import multiprocess  # comes with datasets; unlike multiprocessing it can send closures

    with multiprocess.get_context("fork").Pool(workers, _one_thread_each) as pool:
        return [item for batch in pool.imap(encode, batches) for item in batch]


def _one_thread_each() -> None:
    """The tokenizer's threads are not there after a fork; waiting for them would never end."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"


def _count_tokens(train: Dataset) -> dict[str, int]:
    names = train.column_names
    if "labels" in names:
        supervised = sum(sum(label != -100 for label in labels) for labels in train["labels"])
        return {"tokens an epoch": sum(map(len, train["input_ids"])), "supervised": supervised}
    return {"tokens an epoch": sum(len(ids) for name in names for ids in train[name])}


def _keep(folder: Path, encoded: dict[str, Dataset], counts: dict[str, int]) -> None:
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    for name, dataset in encoded.items():
        if len(dataset):
            dataset.save_to_disk(str(temporary / name))
    (temporary / "counts.json").write_text(json.dumps(counts))
    shutil.rmtree(folder, ignore_errors=True)
    temporary.rename(folder)


def _key(
    data: DataArguments,
    kind: str,
    files: list[dict[str, Any]],
    valid_files: list[dict[str, Any]],
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
        [(Path(file["path"]).suffixes[-2:], file["sha256"]) for file in valid_files],
        tokenizer.backend_tokenizer.to_str(),
        tokenizer.special_tokens_map,
        template and template.text,
    ]
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:32]


def _describe_file(path: Path) -> dict[str, Any]:
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while chunk := stream.read(1 << 20):
            digest.update(chunk)
    return {"path": str(path), "bytes": path.stat().st_size, "sha256": digest.hexdigest()}


def content_hash(row: Row) -> str:
    """Content hash after white-space folding: equal for rows that differ in spacing only."""
    content = {k: _folded(v) for k, v in dataclasses.asdict(row).items() if k != "where"}
    return hashlib.sha256(json.dumps(content, ensure_ascii=False, sort_keys=True).encode()).hexdigest()


def _folded(value: Any) -> Any:
    if isinstance(value, str):
        return " ".join(value.split())
    return [{key: _folded(text) for key, text in message.items()} for message in value]


def _reasons(counts: dict[str, int]) -> str:
    return "of the rows read: " + ", ".join(f"{name} {value}" for name, value in counts.items() if value)
