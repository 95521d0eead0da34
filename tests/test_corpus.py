"""Every row is accounted for, every token is the right one, and a second start reads what the first made."""

from __future__ import annotations

import dataclasses
import json
import random
import shutil
import signal

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from stagecraft.arguments import PreferenceDataArguments, PretrainingDataArguments, SFTDataArguments
from stagecraft.chat import templates
from stagecraft.chat.templates import load_template
from stagecraft.data import corpus, intake, readers
from stagecraft.errors import UserError

# Where a row can go; what is dropped for its length is the rest.
OUT = (
    "training rows",
    "validation rows",
    "duplicates removed from validation",
    "leaks into validation removed",
    "bad rows skipped",
    "bad validation rows skipped",
    "rows the template can't mark, skipped",
    "left out by --max_train_samples",
    "left out by --max_eval_samples",
)


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    """The cache lies in the working folder; every test has its own."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def template(tokenizer):
    return load_template(tokenizer, "chatml")


def talk(*texts: str, **more) -> dict:
    said = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]
    return {"messages": said, **more}


def pair(question: str, chosen: str, rejected: str, **more) -> dict:
    return {"question": question, "response_chosen": chosen, "response_rejected": rejected, **more}


def sft(path, **settings) -> SFTDataArguments:
    return SFTDataArguments(train_file_dir=str(path), **settings)


def ids_of(dataset) -> list[list[int]]:
    return [] if dataset is None else list(dataset["input_ids"])


def dropped(counts: dict[str, int]) -> int:
    return sum(value for name, value in counts.items() if "longer than" in name)


def random_rows(rng: random.Random, number: int, kind: str) -> list[dict]:
    """Short rows, some too long, some of them twice."""
    rows = []
    for i in range(number):
        words = " ".join(rng.choice(["rest", "water", "doctor", "发烧"]) for _ in range(rng.randint(1, 6)))
        words += " long" * 60 * (rng.random() < 0.15)
        if kind == "sft":
            rows.append(talk(f"{i} {words}", f"answer {words}"))
        else:
            rows.append(pair(f"{i} {words}", f"good {words}", "bad"))
    rows += rng.choices(rows, k=number // 4)
    rng.shuffle(rows)
    return rows


# Counts


@pytest.mark.parametrize("kind", ["sft", "rm", "dpo"])
@settings(max_examples=12, derandomize=True, deadline=None, suppress_health_check=list(HealthCheck))
@given(seed=st.integers(0, 2**32))
def test_every_row_is_counted_once(write_jsonl, tokenizer, template, kind, seed):
    """rows read = training + validation + duplicates + leaks + left out + dropped, whatever the flags."""
    rng = random.Random(f"{kind} {seed}")
    rows = random_rows(rng, rng.randint(20, 60), "sft" if kind == "sft" else "pair")
    train = write_jsonl("train/rows.jsonl", rows)
    flags = {
        "train_file_dir": str(train.parent),
        "max_train_samples": rng.choice([None, 5, 1000]),
        "max_eval_samples": rng.choice([None, 1, 1000]),
        "validation_split_percentage": rng.choice([0, 10, 50]),
    }
    read = len(rows)
    if rng.random() < 0.5:
        flags["on_bad_rows"] = "skip"
        spoilt = [rng.choice(["{", json.dumps({"a": 1}), "[]"]) for _ in range(rng.randint(1, 9))]
        with train.open("a") as stream:
            stream.write("\n".join(spoilt))
        read += len(spoilt)
    if rng.random() < 0.5:
        distinct = list({json.dumps(row): row for row in rows}.values())
        valid = rng.sample(distinct, 4) + random_rows(rng, 4, "sft" if kind == "sft" else "pair")
        valid = [*{json.dumps(row): row for row in valid}.values()]
        flags["validation_file_dir"] = str(write_jsonl("valid/rows.jsonl", valid).parent)
        read += len(valid)
    if kind == "sft":
        loaded = corpus.load_conversations(
            SFTDataArguments(**flags, model_max_length=64), tokenizer, template
        )
    else:
        lengths = {"max_source_length": 64, "max_target_length": 40}
        data = PreferenceDataArguments(**flags, **lengths)
        loaded = corpus.load_preferences(data, tokenizer, template, kind)
    counts = loaded.counts
    assert counts["rows read"] + counts.get("validation rows read", 0) == read
    assert counts["training rows"] == len(loaded.train)
    assert counts["validation rows"] == (0 if loaded.valid is None else len(loaded.valid))
    assert read == sum(counts.get(part, 0) for part in OUT) + dropped(counts)


def test_the_counts_of_an_example(write_jsonl, tokenizer, template):
    rows = [talk(f"q{i}", f"a{i}") for i in range(6)]
    path = write_jsonl("train/a.jsonl", [*rows, rows[0], rows[0], talk("q", "long " * 200)])
    valid = write_jsonl("valid/a.jsonl", [rows[1], talk("other", "row")])
    data = sft(path.parent, validation_file_dir=str(valid.parent), max_train_samples=4, model_max_length=100)
    loaded = corpus.load_conversations(data, tokenizer, template)
    tokens = sum(map(len, loaded.train["input_ids"]))
    supervised = sum(label != -100 for labels in loaded.train["labels"] for label in labels)
    assert loaded.counts == {
        "rows read": 9,
        "leaks into validation removed": 1,
        "validation rows read": 2,
        "duplicates kept in training": 2,
        "left out by --max_train_samples": 4,
        "training rows": 4,
        "validation rows": 2,
        "tokens an epoch": tokens,
        "supervised": supervised,
    }
    assert loaded.describe() == (
        "data: rows read 9, leaks into validation removed 1, validation rows read 2, duplicates kept in training 2, "
        "left out by --max_train_samples 4, "
        f"training rows 4, validation rows 2, tokens an epoch {tokens}, supervised {supervised}"
    )
    assert [file["path"] for file in loaded.files] == [str(path), str(valid)]
    assert all(file["bytes"] and len(file["sha256"]) == 64 for file in loaded.files)


def test_answers_with_a_thought_are_counted(write_jsonl, tokenizer, template):
    rows = [talk("q1", "<think>\nt\n</think>\n\na"), talk("q2", "<think>\n\n</think>\n\na"), talk("q3", "a")]
    path = write_jsonl("rows.jsonl", rows)
    assert corpus.load_conversations(sft(path), tokenizer, template).thoughts == 1
    pairs = [
        {"question": q, "response_chosen": a, "response_rejected": "b"} for q, a in (("q1", "a"), ("q2", "c"))
    ]
    path = write_jsonl("pairs.jsonl", pairs)
    data = PreferenceDataArguments(train_file_dir=str(path), validation_split_percentage=0)
    assert corpus.load_preferences(data, tokenizer, template, "dpo").thoughts == 0  # control


def test_nothing_left_to_train_on_is_told_with_the_reasons(write_jsonl, tokenizer, template):
    rows = [talk(f"q{i} " + "long " * 100, "a") for i in range(3)]
    path = write_jsonl("rows.jsonl", [*rows, rows[0]])
    for _ in range(2):  # the second time from the cache
        with pytest.raises(UserError) as caught:
            corpus.load_conversations(sft(path, model_max_length=20), tokenizer, template)
        assert str(caught.value).splitlines() == [
            f"--train_file_dir {path}: no row is left to train on",
            "of the rows read: rows read 4, duplicates kept in training 1, longer than 20 tokens 4",
        ]


@pytest.mark.parametrize(
    "settings",
    [{"max_train_samples": -1}, {"max_eval_samples": -1}, {"validation_split_percentage": -5.0}],
    ids=str,
)
def test_negative_numbers_are_told(write_jsonl, tokenizer, template, settings):
    path = write_jsonl("rows.jsonl", [talk(f"q{i}", f"a{i}") for i in range(50)])
    with pytest.raises(UserError, match=f"--{next(iter(settings))}"):
        corpus.load_conversations(sft(path, **settings), tokenizer, template)


# The split


def test_the_split_does_not_depend_on_the_order_of_rows_or_files(write_jsonl, tokenizer, template):
    rows = [talk(f"question {i}", f"answer {i}") for i in range(50)]

    def held(name: str, *files: list[dict]) -> set[tuple[int, ...]]:
        for i, file in enumerate(files):
            folder = write_jsonl(f"{name}/{i}.jsonl", file).parent
        loaded = corpus.load_conversations(sft(folder, validation_split_percentage=20), tokenizer, template)
        assert len(loaded.train) == 40
        assert not {*map(tuple, ids_of(loaded.train))} & {*map(tuple, ids_of(loaded.valid))}
        return {*map(tuple, ids_of(loaded.valid))}

    first = held("a", rows)
    assert len(first) == 10
    assert held("b", rows[::-1]) == first
    assert held("c", rows[30:], rows[:30]) == first
    # Control: neither the first nor the last rows are always those split off.
    for part in (rows[:10], rows[-10:]):
        encoded = templates.encode(template, tokenizer, [row["messages"] for row in part])
        assert {tuple(row.input_ids) for row in encoded} != first


def test_training_rows_keep_their_order(write_jsonl, tokenizer, template):
    path = write_jsonl("rows.jsonl", [talk(f"q{i}", f"a{i}") for i in range(20)])
    loaded = corpus.load_conversations(sft(path, validation_split_percentage=0), tokenizer, template)
    expected = [
        f"<|im_start|>user\nq{i}<|im_end|>\n<|im_start|>assistant\na{i}<|im_end|>\n" for i in range(20)
    ]
    assert [tokenizer.decode(ids) for ids in loaded.train["input_ids"]] == expected
    assert loaded.valid is None


def test_a_validation_folder_that_is_the_training_folder_is_split_off_and_said(
    write_jsonl, tokenizer, template, tmp_path
):
    folder = write_jsonl("rows/a.jsonl", [talk(f"q{i}", f"a{i}") for i in range(50)]).parent
    (tmp_path / "link").symlink_to(folder)
    for name in (str(folder), "rows", "link"):
        data = sft(folder, validation_file_dir=name, validation_split_percentage=10)
        loaded = corpus.load_conversations(data, tokenizer, template)
        said = f"validation folder {name} is the training folder: 10 % of the rows are held out by content hash\n"
        assert loaded.describe().startswith(said)
        assert (len(loaded.train), len(loaded.valid)) == (45, 5)
        assert len(loaded.files) == 1
    said = "no validation folder: 2 % of the rows are held out by content hash\n"
    assert corpus.load_conversations(sft(folder), tokenizer, template).describe().startswith(said)
    data = sft(folder, validation_file_dir=str(write_jsonl("valid/a.jsonl", [talk("v", "v")]).parent))
    assert corpus.load_conversations(data, tokenizer, template).describe().startswith("data: ")


def test_a_validation_folder_is_taken_whole(write_jsonl, tokenizer, template):
    train = write_jsonl("train/a.jsonl", [talk(f"q{i}", f"a{i}") for i in range(10)])
    valid = write_jsonl("valid/a.jsonl", [talk(f"v{i}", f"a{i}") for i in range(4)])
    data = sft(train.parent, validation_file_dir=str(valid.parent), validation_split_percentage=50)
    loaded = corpus.load_conversations(data, tokenizer, template)
    assert (len(loaded.train), len(loaded.valid)) == (10, 4)
    assert all("\nv" in tokenizer.decode(ids) for ids in loaded.valid["input_ids"])


# Long rows


def test_a_long_conversation_loses_its_oldest_turns_and_never_its_answer(write_jsonl, tokenizer, template):
    texts = [f"{'question' if i % 2 == 0 else 'answer'} {i // 2}" for i in range(20)]
    messages = [{"role": "system", "content": "be brief"}, *talk(*texts)["messages"]]
    path = write_jsonl("rows.jsonl", [{"messages": messages}])
    whole = templates.encode(template, tokenizer, [messages])[0]
    kept_before = 11
    for length in range(len(whole.input_ids), 0, -7):
        data = sft(path, model_max_length=length, validation_split_percentage=0)
        try:
            loaded = corpus.load_conversations(data, tokenizer, template)
        except UserError as error:
            assert f"longer than {length} tokens 1" in str(error)
            break
        [row] = loaded.train
        assert len(row["input_ids"]) <= length
        kept = tokenizer.decode(row["input_ids"]).count("user\n")
        assert kept <= kept_before
        rest = [messages[0], *messages[1 + 2 * (10 - kept) :]]
        expected = templates.encode(template, tokenizer, [rest])[0]
        assert (row["input_ids"], row["labels"]) == (expected.input_ids, expected.labels)
        if kept < 10:  # no turn more than needed was dropped
            longer = [messages[0], *messages[1 + 2 * (9 - kept) :]]
            assert len(templates.encode(template, tokenizer, [longer])[0].input_ids) > length
        assert loaded.counts.get("oldest turns dropped to fit", 0) == (kept < 10)
        kept_before = kept
    else:
        pytest.fail("no length was too short for the last turn")
    assert kept_before == 1


@pytest.mark.parametrize(
    ("what", "counted", "kept"),
    [
        ("drop_turns", {"oldest turns dropped to fit": 1, "longer than 60 tokens": 1}, ["q0", "q2"]),
        (
            "truncate",
            {"cut at 60 tokens": 2, "no supervised token among the first 60": 1},
            ["q0", "q1", "q3"],
        ),
        ("skip", {"longer than 60 tokens": 3}, ["q0"]),
    ],
)
def test_what_becomes_of_long_rows_is_as_asked(write_jsonl, tokenizer, template, what, counted, kept):
    long = "water " * 60
    lines = [
        talk("q0", "a"),
        talk("q1", long),
        talk(f"q2 {long}", "a", "q2b", "a"),
        talk("q3", "a", "q3", long),
    ]
    if what == "drop_turns":
        lines.pop()
    else:
        lines[2] = talk(f"q2 {long}", "a")
    path = write_jsonl("rows.jsonl", lines)
    data = sft(path, model_max_length=60, validation_split_percentage=0, on_long_rows=what)
    loaded = corpus.load_conversations(data, tokenizer, template)
    assert {name: loaded.counts.get(name) for name in counted} == counted
    assert [tokenizer.decode(ids).split("\n")[1][:2] for ids in loaded.train["input_ids"]] == kept
    assert all(len(row["input_ids"]) <= 60 for row in loaded.train)
    assert all(any(label != -100 for label in row["labels"]) for row in loaded.train)


def test_a_long_row_can_be_an_error(write_jsonl, tokenizer, template):
    path = write_jsonl("rows.jsonl", [talk("q0", "a"), talk("q1", "water " * 60)])
    with pytest.raises(UserError) as caught:
        corpus.load_conversations(sft(path, model_max_length=60, on_long_rows="error"), tokenizer, template)
    first, last = str(caught.value).splitlines()
    assert first.startswith(f"{path}:2: has ") and first.endswith(" tokens; --model_max_length is 60")
    assert last.startswith("1 of 2 rows are bad.")


def test_bad_rows_are_told_or_skipped_counted_and_listed(write_jsonl, tokenizer, template):
    good = [talk(f"q{i}", f"a{i}") for i in range(6)]
    path = write_jsonl("rows.jsonl", [good[0], "{", *good[1:], talk("q", "\nanswer"), {"a": 1}])
    with pytest.raises(UserError) as caught:
        corpus.load_conversations(sft(path), tokenizer, template)
    told = str(caught.value).splitlines()
    assert [line.split(": ")[0] for line in told[:-1]] == [f"{path}:2", f"{path}:9"]
    assert told[-1] == (
        "2 of 9 rows are bad. Mend them, or leave them out with --on_bad_rows skip (they will be counted)."
    )
    data = sft(path, on_bad_rows="skip", validation_split_percentage=0)
    for _ in range(2):  # the second time from the cache
        loaded = corpus.load_conversations(data, tokenizer, template)
        assert loaded.counts["bad rows skipped"] == 2
        assert loaded.counts["rows the template can't mark, skipped"] == 1
        assert len(loaded.train) == 6
        assert [line.split(": ")[0] for line in loaded.skipped] == [f"{path}:{n}" for n in (2, 9, 8)]


def test_files_that_can_not_be_read_are_told_together(write_jsonl, tokenizer, template):
    folder = write_jsonl("rows/a.jsonl", [talk("q", "a")]).parent
    for name in ("b.jsonl", "c.jsonl"):
        (folder / name).symlink_to("/no/such/file")
    with pytest.raises(UserError) as caught:
        corpus.load_conversations(sft(folder), tokenizer, template)
    assert str(caught.value).splitlines() == [
        f"{folder}/{name}.jsonl: can't be read: No such file or directory" for name in "bc"
    ]
    with pytest.raises(UserError, match="can't be read"):
        corpus.choose(sft(folder), "sft")


def test_copies_stay_in_training_but_never_across_the_split(write_jsonl, tokenizer, template):
    rows = [talk(f"q{i}", f"a{i}") for i in range(20)]
    path = write_jsonl("rows.jsonl", [*rows, *rows, talk("q0 ", "a0\n")])
    loaded = corpus.load_conversations(sft(path, validation_split_percentage=25), tokenizer, template)
    assert len(loaded.valid) == 5 and loaded.counts["duplicates removed from validation"] >= 5
    assert loaded.counts["duplicates kept in training"] >= 15
    fold = [
        {"".join(tokenizer.decode(ids).split()) for ids in ids_of(part)}
        for part in (loaded.train, loaded.valid)
    ]
    assert len(fold[0]) == 15 and len(fold[1]) == 5 and not fold[0] & fold[1]


def test_too_long_rows_are_dropped_and_counted(write_jsonl, tokenizer, template):
    lines = [talk(f"q{i}", "water " * length) for i, length in enumerate([1, 200, 2, 300, 3])]
    path = write_jsonl("rows.jsonl", lines)
    data = sft(path, model_max_length=60, validation_split_percentage=0)
    loaded = corpus.load_conversations(data, tokenizer, template)
    assert loaded.counts["longer than 60 tokens"] == 2
    assert [tokenizer.decode(ids).split("\n")[1][:2] for ids in loaded.train["input_ids"]] == [
        "q0",
        "q2",
        "q4",
    ]


def test_the_length_limit_is_the_last_length_that_fits(write_jsonl, tokenizer, template):
    path = write_jsonl("rows.jsonl", [talk("question", "answer")])
    exact = len(templates.encode(template, tokenizer, [talk("question", "answer")["messages"]])[0].input_ids)
    assert len(corpus.load_conversations(sft(path, model_max_length=exact), tokenizer, template).train) == 1
    with pytest.raises(UserError, match="no row is left to train on"):
        corpus.load_conversations(sft(path, model_max_length=exact - 1), tokenizer, template)


def test_a_row_the_template_can_not_mark_is_told_with_its_line(write_jsonl, tokenizer, template):
    """Line ends before and in the answer are one token, so no loss mask is right."""
    path = write_jsonl("rows.jsonl", [talk("q", "a"), talk("q2", "\nanswer"), talk("q3", "a")])
    with pytest.raises(UserError) as caught:
        corpus.load_conversations(sft(path), tokenizer, template)
    assert f"{path}:2" in str(caught.value) and "a token crosses the edge" in str(caught.value)


# Preferences


def preferences(path, **settings) -> PreferenceDataArguments:
    return PreferenceDataArguments(train_file_dir=str(path), validation_split_percentage=0, **settings)


def test_both_answers_follow_the_same_prompt(write_jsonl, tokenizer, template):
    rows = [
        pair("发烧怎么办？", "多喝水。", "不知道。"),
        pair(
            "Cough?", "Rest.", "Run.", system="be brief", history=[["Fever?", "Water."], ["头痛？", "Sleep."]]
        ),
    ]
    path = write_jsonl("rows.jsonl", rows)
    dpo = corpus.load_preferences(preferences(path), tokenizer, template, "dpo").train
    rm = corpus.load_preferences(preferences(path), tokenizer, template, "rm").train
    assert set(dpo.column_names) == {"prompt_ids", "chosen_ids", "rejected_ids"}
    assert set(rm.column_names) == {"chosen_ids", "rejected_ids"}
    for row, ids, whole in zip(rows, dpo, rm, strict=True):
        assert tokenizer.decode(ids["prompt_ids"]).endswith(
            f"{row['question']}<|im_end|>\n<|im_start|>assistant\n"
        )
        assert tokenizer.decode(ids["chosen_ids"]) == row["response_chosen"] + "<|im_end|>"
        assert tokenizer.decode(ids["rejected_ids"]) == row["response_rejected"] + "<|im_end|>"
        assert whole["chosen_ids"] == ids["prompt_ids"] + ids["chosen_ids"]
        assert whole["rejected_ids"] == ids["prompt_ids"] + ids["rejected_ids"]
        assert whole["chosen_ids"] != whole["rejected_ids"]
    assert tokenizer.decode(dpo[1]["prompt_ids"]) == (
        "<|im_start|>system\nbe brief<|im_end|>\n<|im_start|>user\nFever?<|im_end|>\n<|im_start|>assistant\n"
        "Water.<|im_end|>\n<|im_start|>user\n头痛？<|im_end|>\n<|im_start|>assistant\nSleep.<|im_end|>\n"
        "<|im_start|>user\nCough?<|im_end|>\n<|im_start|>assistant\n"
    )


@pytest.mark.parametrize("kind", ["rm", "dpo"])
def test_a_long_prompt_loses_its_oldest_turns(write_jsonl, tokenizer, template, kind):
    history = [[f"question {i}", f"answer {i}"] for i in range(20)]
    path = write_jsonl("rows.jsonl", [pair("last?", "Rest.", "Run.", system="brief", history=history)])
    loaded = corpus.load_preferences(preferences(path, max_source_length=100), tokenizer, template, kind)
    assert loaded.counts["oldest turns dropped to fit"] == 1
    prompt = tokenizer.decode(loaded.train[0]["prompt_ids" if kind == "dpo" else "chosen_ids"])
    assert prompt.startswith("<|im_start|>system\nbrief<|im_end|>\n<|im_start|>user\nquestion ")
    assert "answer 19" in prompt and "last?" in prompt and "answer 0" not in prompt


def test_answers_can_be_cut_but_never_their_prompts(write_jsonl, tokenizer, template):
    long = "water " * 80
    rows = [
        pair("q0", f"good {long}", "bad"),
        pair("q1", f"{long} x", f"{long} y"),
        pair(f"q2 {long}", "a", "b"),
    ]
    lengths = {"max_source_length": 50, "max_target_length": 40, "on_long_rows": "truncate"}
    loaded = corpus.load_preferences(
        preferences(write_jsonl("a.jsonl", rows), **lengths), tokenizer, template, "dpo"
    )
    assert loaded.counts["answers cut at 40 tokens"] == 1
    assert loaded.counts["answers equal in their first 40 tokens"] == 1
    assert loaded.counts["prompt longer than 50 tokens"] == 1
    [row] = loaded.train
    assert len(row["chosen_ids"]) == 40 and tokenizer.decode(row["rejected_ids"]) == "bad<|im_end|>"


@pytest.mark.parametrize("kind", ["rm", "dpo"])
def test_prompts_and_answers_that_do_not_fit_are_dropped_and_counted(write_jsonl, tokenizer, template, kind):
    long = "water " * 80
    rows = [
        pair("q0", "good", "bad"),
        pair(f"q1 {long}", "good", "bad"),
        pair("q2", f"good {long}", "bad"),
        pair("q3", "good", f"bad {long}"),
        pair(f"q4 {long}", f"good {long}", "bad"),
    ]
    lengths = {"max_source_length": 50, "max_target_length": 40}
    loaded = corpus.load_preferences(
        preferences(write_jsonl("a.jsonl", rows), **lengths), tokenizer, template, kind
    )
    assert loaded.counts["prompt longer than 50 tokens"] == 2
    assert loaded.counts["answer longer than 40 tokens"] == 2
    assert len(loaded.train) == 1


# Documents


def documents(path, **settings) -> PretrainingDataArguments:
    return PretrainingDataArguments(train_file_dir=str(path), validation_split_percentage=0, **settings)


@pytest.mark.parametrize("block_size", [2, 7, 64, 1000])
@pytest.mark.parametrize("seed", range(3))
def test_every_token_of_every_document_is_in_the_blocks(write_jsonl, tokenizer, seed, block_size):
    rng = random.Random(seed)
    texts = [
        f"{i} " + " ".join(rng.choices(["water", "休息", "\n", "🙂"], k=rng.randint(1, 30)))
        for i in range(40)
    ]
    path = write_jsonl("rows.jsonl", [{"text": text} for text in texts])
    loaded = corpus.load_documents(documents(path, block_size=block_size), tokenizer)
    stream = []
    for text in texts:
        stream += [*tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    if len(stream) % block_size == 1:
        stream.pop()  # a block of one token has nothing to predict
    blocks = list(loaded.train["input_ids"])
    assert [token for block in blocks for token in block] == stream
    assert {len(block) for block in blocks[:-1]} <= {block_size} and 1 < len(blocks[-1]) <= block_size
    assert loaded.train["labels"] == loaded.train["input_ids"]
    assert stream.count(tokenizer.eos_token_id) >= len(texts) - 1
    assert loaded.counts["rows read"] == len(texts)
    assert loaded.counts["tokens an epoch"] == len(stream)


def test_validation_documents_are_other_documents(write_jsonl, tokenizer):
    path = write_jsonl("rows.jsonl", [{"text": f"document {i}"} for i in range(40)])
    data = dataclasses.replace(documents(path), validation_split_percentage=25)
    loaded = corpus.load_documents(data, tokenizer)
    parts = [
        tokenizer.decode(ids_of(part)[0]).split("<|im_end|>")[:-1] for part in (loaded.train, loaded.valid)
    ]
    assert (len(parts[0]), len(parts[1])) == (30, 10)
    assert {*parts[0], *parts[1]} == {f"document {i}" for i in range(40)}


# The cache


@pytest.fixture
def counted(monkeypatch):
    """How many times a corpus was made rather than read."""
    made = []
    make = corpus._make
    monkeypatch.setattr(corpus, "_make", lambda *args: (made.append(1), make(*args)))
    return made


def same(first: corpus.Corpus, second: corpus.Corpus) -> bool:
    def content(loaded):
        parts = [part and part.to_dict() for part in (loaded.train, loaded.valid)]
        return parts, loaded.counts

    return content(first) == content(second)


def test_a_second_start_reads_the_same_without_tokenising(
    write_jsonl, counted, tokenizer, template, tmp_path
):
    folder = write_jsonl("rows/a.jsonl", [talk(f"q{i}", f"a{i}") for i in range(30)]).parent
    data = sft(folder, validation_split_percentage=10)
    first = corpus.load_conversations(data, tokenizer, template)
    assert same(corpus.load_conversations(data, tokenizer, template), first)
    shutil.copytree(folder, tmp_path / "copy")  # the same rows elsewhere are the same rows
    again = corpus.load_conversations(dataclasses.replace(data, train_file_dir="copy"), tokenizer, template)
    assert same(again, first) and again.files[0]["path"] == "copy/a.jsonl"
    assert len(counted) == 1
    # Control: asked to, it tokenises again, to the same end.
    data = dataclasses.replace(data, overwrite_cache=True)
    assert same(corpus.load_conversations(data, tokenizer, template), first)
    assert len(counted) == 2


def test_anything_that_matters_makes_the_cache_anew(write_jsonl, counted, tokenizer, template, tiny_base):
    from stagecraft import models

    rows = [talk(f"q{i}", f"a{i}") for i in range(30)]
    folder = write_jsonl("rows/a.jsonl", rows).parent
    valid = write_jsonl("valid/a.jsonl", [talk("v", "v")]).parent
    data = sft(folder)
    corpus.load_conversations(data, tokenizer, template)

    def misses(data=data, tokenizer=tokenizer, template=template) -> bool:
        before = len(counted)
        corpus.load_conversations(data, tokenizer, template)
        return len(counted) > before

    assert not misses()
    assert misses(dataclasses.replace(data, model_max_length=2047))
    assert misses(dataclasses.replace(data, on_long_rows="skip"))
    assert misses(dataclasses.replace(data, on_bad_rows="skip"))
    assert misses(dataclasses.replace(data, validation_split_percentage=3))
    assert misses(dataclasses.replace(data, max_train_samples=5))
    assert misses(dataclasses.replace(data, validation_file_dir=str(valid)))
    assert misses(template=load_template(tokenizer, "qwen"))
    assert not misses(dataclasses.replace(data, preprocessing_num_workers=1))
    assert not misses()
    other = models.load_tokenizer(str(tiny_base))
    other.add_tokens(["q1"])
    assert misses(tokenizer=other)
    write_jsonl("rows/a.jsonl", [*rows[:-1], talk("q29", "a30")])
    assert misses()
    write_jsonl("valid/a.jsonl", [talk("v", "w")])
    assert misses(dataclasses.replace(data, validation_file_dir=str(valid)))


def test_the_same_bytes_under_another_suffix_are_other_rows(write_jsonl, tokenizer):
    """JSON lines named .txt are text; named rightly, they are rows."""
    lines = [{"text": f"document {i}"} for i in range(5)]
    as_text = corpus.load_documents(documents(write_jsonl("a/rows.txt", lines).parent), tokenizer)
    as_rows = corpus.load_documents(documents(write_jsonl("b/rows.jsonl", lines).parent), tokenizer)
    assert tokenizer.decode(as_text.train[0]["input_ids"]).startswith('{"text": "document 0"}<|im_end|>')
    assert tokenizer.decode(as_rows.train[0]["input_ids"]).startswith("document 0<|im_end|>")


def test_a_cache_that_was_cut_off_is_made_anew(write_jsonl, counted, tokenizer, template, tmp_path):
    """What a killed run left under a temporary name is not taken for a cache."""
    path = write_jsonl("rows.jsonl", [talk(f"q{i}", f"a{i}") for i in range(30)])
    first = corpus.load_conversations(sft(path), tokenizer, template)
    [folder] = [entry for entry in (tmp_path / corpus.CACHE).iterdir() if entry.is_dir()]
    cut_off = folder.rename(folder.with_name(f".{folder.name}.tmp"))
    (cut_off / "made.json").unlink()
    assert same(corpus.load_conversations(sft(path), tokenizer, template), first)
    assert len(counted) == 2
    assert [entry.name for entry in (tmp_path / corpus.CACHE).iterdir() if entry.is_dir()] == [folder.name]


@pytest.fixture
def at_most_20_s():
    """Ends a test that hangs (a pool waits for ever for workers that are stuck)."""

    def end(*_):
        raise TimeoutError("no end after 20 s")

    before = signal.signal(signal.SIGALRM, end)
    signal.alarm(20)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.mark.usefixtures("at_most_20_s")
@pytest.mark.parametrize("threads", ["false", "true"])
def test_several_processes_give_what_one_gives(write_jsonl, tokenizer, template, monkeypatch, threads):
    """With the tokenizer's own threads too, as the stages set them: these don't survive a fork."""
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", threads)
    monkeypatch.setattr(intake, "SMALL", 0)
    monkeypatch.setattr(readers, "CHUNK_BYTES", 10_000)
    path = write_jsonl("rows.jsonl", [talk(f"q{i}", f"a{i}" * (i % 50 + 1)) for i in range(1010)])
    data = sft(path, model_max_length=80, validation_split_percentage=0)
    one = corpus.load_conversations(data, tokenizer, template)
    several = dataclasses.replace(data, preprocessing_num_workers=2, overwrite_cache=True)
    assert same(corpus.load_conversations(several, tokenizer, template), one)
    assert one.counts["longer than 80 tokens"] > 0
