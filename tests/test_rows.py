"""Every format of a row by example, and every fault by its exact message and line."""

from __future__ import annotations

import gzip
import json

import pytest

from stagecraft.errors import UserError
from stagecraft.rows import CANONICAL, Conversation, Document, Preference, read_rows, text_of

USER, BOT = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
SYSTEM = {"role": "system", "content": "s"}
USER2, BOT2 = {"role": "user", "content": "q2"}, {"role": "assistant", "content": "a2"}


def share(*turns: tuple[str, str]) -> list[dict[str, str]]:
    return [{"from": who, "value": text} for who, text in turns]


def faults_of(path, kind: str) -> list[str]:
    with pytest.raises(UserError) as caught:
        read_rows(str(path), kind)
    return str(caught.value).splitlines()


# Documents


def test_documents_of_every_kind_of_file(tmp_path, write_jsonl):
    write_jsonl("a.jsonl", [{"text": "one"}, {"text": "二", "source": "kept out"}])
    (tmp_path / "b.txt").write_text("three\n\nfour\n", encoding="utf-8")
    (tmp_path / "c.json").write_text(json.dumps([{"text": "five"}, {"text": "six"}]), encoding="utf-8")
    (tmp_path / "d.jsonl.gz").write_bytes(gzip.compress(b'{"text": "seven"}\n{"text": "eight"}\n'))
    (tmp_path / "e.txt.gz").write_bytes(gzip.compress(b"nine"))
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "f.jsonl").write_text('{"text": "ten"}', encoding="utf-8")
    (tmp_path / "README.md").write_text("no data\n", encoding="utf-8")
    assert read_rows(str(tmp_path), "pt") == [
        Document("one", f"{tmp_path}/a.jsonl:1"),
        Document("二", f"{tmp_path}/a.jsonl:2"),
        Document("three", f"{tmp_path}/b.txt:1"),
        Document("four", f"{tmp_path}/b.txt:3"),
        Document("five", f"{tmp_path}/c.json: row 1"),
        Document("six", f"{tmp_path}/c.json: row 2"),
        Document("seven", f"{tmp_path}/d.jsonl.gz:1"),
        Document("eight", f"{tmp_path}/d.jsonl.gz:2"),
        Document("nine", f"{tmp_path}/e.txt.gz:1"),
        Document("ten", f"{tmp_path}/sub/f.jsonl:1"),
    ]
    assert read_rows(str(tmp_path / "e.txt.gz"), "pt") == [Document("nine", f"{tmp_path}/e.txt.gz:1")]


@pytest.mark.parametrize("start", [b"", b"\xef\xbb\xbf"], ids=["plain", "BOM"])
@pytest.mark.parametrize("end", [b"\n", b"\r\n"], ids=["LF", "CRLF"])
def test_byte_order_marks_and_line_ends_change_nothing(tmp_path, start, end):
    (tmp_path / "a.jsonl").write_bytes(start + b'{"text": "one"}' + end + end + b'{"text": "two"}' + end)
    (tmp_path / "b.txt").write_bytes(start + b"three" + end + end + b"four" + end)
    (tmp_path / "c.json").write_bytes(start + b"[" + end + b'{"text": "five"}' + end + b"]" + end)
    found = [(row.text, row.where.rsplit("/", 1)[1]) for row in read_rows(str(tmp_path), "pt")]
    assert found == [
        ("one", "a.jsonl:1"),
        ("two", "a.jsonl:3"),
        ("three", "b.txt:1"),
        ("four", "b.txt:3"),
        ("five", "c.json: row 1"),
    ]


def test_only_a_line_feed_ends_a_line(write_jsonl):
    """Characters that other line splitters stop at are text."""
    text = "a\u2028b\u0085c\x0bd"
    path = write_jsonl("a.jsonl", [{"text": text}, {"text": "e"}])
    assert [(row.text, row.where) for row in read_rows(str(path), "pt")] == [
        (text, f"{path}:1"),
        ("e", f"{path}:2"),
    ]


# Conversations


@pytest.mark.parametrize(
    ("row", "messages"),
    [
        ({"conversations": share(("human", "q"), ("gpt", "a"))}, [USER, BOT]),
        ({"conversations": share(("user", "q"), ("assistant", "a"))}, [USER, BOT]),
        ({"conversations": share(("system", "s"), ("human", "q"), ("gpt", "a"))}, [SYSTEM, USER, BOT]),
        (
            {"conversations": share(("human", "q"), ("gpt", "a"), ("human", "q2"), ("gpt", "a2"))},
            [USER, BOT, USER2, BOT2],
        ),
        ({"conversations": share(("human", "q"), ("gpt", "a")), "system": "s"}, [SYSTEM, USER, BOT]),
        ({"conversations": share(("human", "q"), ("gpt", "a")), "system": ""}, [USER, BOT]),
        (
            {"conversations": share(("system", "s"), ("human", "q"), ("gpt", "a")), "system": "ignored"},
            [SYSTEM, USER, BOT],
        ),
        ({"messages": [USER, BOT]}, [USER, BOT]),
        ({"messages": [SYSTEM, USER, BOT, USER2, BOT2], "id": 7}, [SYSTEM, USER, BOT, USER2, BOT2]),
        ({"instruction": "q", "output": "a"}, [USER, BOT]),
        ({"instruction": "q", "input": "", "output": "a"}, [USER, BOT]),
        ({"instruction": "q", "input": "in", "output": "a"}, [{"role": "user", "content": "q\nin"}, BOT]),
        ({"instruction": "q2", "output": "a2", "history": [["q", "a"]]}, [USER, BOT, USER2, BOT2]),
        ({"instruction": "q", "output": "a", "system": "s"}, [SYSTEM, USER, BOT]),
        ({"question": "q", "answer": "a"}, [USER, BOT]),
        ({"question": "q", "answer": "a", "system": "s", "history": None}, [SYSTEM, USER, BOT]),
    ],
)
def test_conversation_formats(write_jsonl, row, messages):
    path = write_jsonl("rows.jsonl", [row])
    assert read_rows(str(path), "sft") == [Conversation(messages, f"{path}:1")]


# Preferences


@pytest.mark.parametrize("kind", ["rm", "dpo"])
@pytest.mark.parametrize(
    ("row", "prompt"),
    [
        (
            {
                "system": "s",
                "history": [["q", "a"]],
                "question": "q2",
                "response_chosen": "+",
                "response_rejected": "-",
            },
            [SYSTEM, USER, BOT, USER2],
        ),
        (
            {"system": "", "history": [], "question": "q", "response_chosen": "+", "response_rejected": "-"},
            [USER],
        ),
        ({"question": "q", "response_chosen": "+", "response_rejected": "-"}, [USER]),
        ({"prompt": "q", "chosen": "+", "rejected": "-"}, [USER]),
        ({"prompt": "q", "chosen": "+", "rejected": "-", "system": "s"}, [SYSTEM, USER]),
        (
            {
                "prompt": [SYSTEM, USER, BOT, USER2],
                "chosen": [{"role": "assistant", "content": "+"}],
                "rejected": [{"role": "assistant", "content": "-"}],
            },
            [SYSTEM, USER, BOT, USER2],
        ),
        (
            {"prompt": share(("human", "q")), "chosen": share(("gpt", "+")), "rejected": share(("gpt", "-"))},
            [USER],
        ),
        ({"question": "q", "good_answer": "+", "bad_answer": "-"}, [USER]),
        (
            {"question": "q2", "good_answer": "+", "bad_answer": "-", "history": [["q", "a"]]},
            [USER, BOT, USER2],
        ),
    ],
)
def test_preference_formats(write_jsonl, kind, row, prompt):
    path = write_jsonl("rows.jsonl", [row])
    assert read_rows(str(path), kind) == [Preference(prompt, "+", "-", f"{path}:1")]


def test_formats_can_stand_side_by_side(write_jsonl, tmp_path):
    write_jsonl("d/a.jsonl", [{"question": "q", "answer": "a"}, {"messages": [USER, BOT]}])
    write_jsonl("d/b.jsonl", [{"instruction": "q", "output": "a"}])
    assert [row.messages for row in read_rows(str(tmp_path / "d"), "sft")] == [[USER, BOT]] * 3


def test_text_of_a_row_is_all_its_words():
    assert text_of(Document("t", "")) == "t"
    assert text_of(Conversation([SYSTEM, USER, BOT], "")) == "s\nq\na"
    assert text_of(Preference([SYSTEM, USER], "+", "-", "")) == "s\nq\n+\n-"


# Faults: one row each, on line 3 of its file, after a good row and a blank line

GOOD = {
    "pt": {"text": "t"},
    "sft": {"messages": [USER, BOT]},
    "rm": {"prompt": "q", "chosen": "+", "rejected": "-"},
    "dpo": {"prompt": "q", "chosen": "+", "rejected": "-"},
}
SFT_FORMATS = (
    'unknown format; expected "conversations", "messages", "instruction" and "output", '
    'or "question" and "answer"'
)
PAIR_FORMATS = (
    'unknown format; expected "question", "response_chosen" and "response_rejected", "prompt", "chosen" and '
    '"rejected", or "question", "good_answer" and "bad_answer"'
)
ANY = [
    ("{", "not JSON: Expecting property name enclosed in double quotes at column 2"),
    ('{"a": 1', "not JSON: Expecting ',' delimiter at column 8"),
    ("[1]", "must be an object ({...}), not list"),
    ('"text"', "must be an object ({...}), not str"),
    ("[" * 100_000, "not JSON: nested too deeply"),
]
PT = [
    ({}, 'no "text" (keys: none)'),
    ({"txt": "t", "id": 1}, 'no "text" (keys: txt, id)'),
    ({"text": 1}, '"text" must be text, not int'),
    ({"text": None}, '"text" must be text, not null'),
    ({"text": " \n"}, '"text" is empty'),
]
SFT = [
    ({}, f"{SFT_FORMATS} (keys: none)"),
    ({"text": "t"}, f"{SFT_FORMATS} (keys: text)"),
    ({"instruction": "q"}, f"{SFT_FORMATS} (keys: instruction)"),
    ({"conversations": "q"}, '"conversations" must be a list of turns'),
    ({"conversations": []}, '"conversations" must be a list of turns, not an empty one'),
    ({"messages": ["q", "a"]}, '"messages" turn 1 must be an object, not str'),
    (
        {"conversations": share(("human", "q"), ("bot", "a"))},
        "\"conversations\" turn 2: unknown role 'bot'; known: human, user, gpt, assistant, system",
    ),
    (
        {"messages": [{"role": ["user"], "content": "q"}]},
        "\"messages\" turn 1: unknown role ['user']; known: human, user, gpt, assistant, system",
    ),
    (
        {"messages": [{"content": "q"}]},
        '"messages" turn 1: unknown role None; known: human, user, gpt, assistant, system',
    ),
    (
        {"conversations": share(("human", "q"), ("human", "q"), ("gpt", "a"))},
        '"conversations" has two "human" turns in a row (turns 1 and 2)',
    ),
    (
        {"messages": [USER, BOT, {"role": "assistant", "content": "a2"}]},
        '"messages" has two "assistant" turns in a row (turns 2 and 3)',
    ),
    ({"messages": [USER, SYSTEM, BOT]}, '"messages" turn 2: a system turn can only be the first'),
    ({"messages": [BOT]}, '"messages": the first turn must be the user\'s'),
    ({"messages": [SYSTEM, BOT]}, '"messages": the first turn must be the user\'s'),
    ({"messages": [SYSTEM]}, '"messages": the first turn must be the user\'s'),
    ({"messages": [USER]}, "the last turn is the user's; it must be the assistant's"),
    ({"messages": [USER, BOT, USER2]}, "the last turn is the user's; it must be the assistant's"),
    ({"messages": [USER, {"role": "assistant"}]}, '"messages" turn 2: no "content" (keys: role)'),
    ({"messages": [USER, {"role": "assistant", "content": " "}]}, '"messages" turn 2: "content" is empty'),
    (
        {"messages": [USER, {"role": "assistant", "content": ["a"]}]},
        '"messages" turn 2: "content" must be text, not list',
    ),
    ({"instruction": "", "output": "a"}, '"instruction" is empty'),
    ({"instruction": "q", "output": ""}, '"output" is empty'),
    ({"instruction": "q", "input": 3, "output": "a"}, '"input" must be text, not int'),
    ({"question": "q", "answer": None}, '"answer" must be text, not null'),
    ({"question": "q", "answer": "a", "system": 1}, '"system" must be text, not int'),
    (
        {"question": "q", "answer": "a", "history": "h"},
        '"history" must be a list of [question, answer] pairs, not str',
    ),
    (
        {"question": "q", "answer": "a", "history": [["q", "a"], ["q"]]},
        '"history" entry 2 must be a [question, answer] pair of texts',
    ),
    (
        {"question": "q", "answer": "a", "history": [["q", " "]]},
        '"history" entry 1 must be a [question, answer] pair of texts',
    ),
]
PAIR = [
    ({}, f"{PAIR_FORMATS} (keys: none)"),
    ({"question": "q", "response_chosen": "+"}, f"{PAIR_FORMATS} (keys: question, response_chosen)"),
    (
        {"response_chosen": "+", "response_rejected": "-"},
        'no "question" (keys: response_chosen, response_rejected)',
    ),
    ({"prompt": "q", "chosen": "+", "rejected": 1}, '"rejected" must be text, not int'),
    ({"prompt": "q", "chosen": "", "rejected": "-"}, '"chosen" is empty'),
    ({"prompt": "q", "chosen": "+", "rejected": "+"}, "chosen and rejected are the same text"),
    ({"question": "q", "good_answer": "+", "bad_answer": "+"}, "chosen and rejected are the same text"),
    (
        {"prompt": [USER, BOT], "chosen": "+", "rejected": "-"},
        "the prompt's last turn is the assistant's; it must be the user's",
    ),
    (
        {"prompt": [BOT, USER], "chosen": "+", "rejected": "-"},
        '"prompt": the first turn must be the user\'s',
    ),
    (
        {"prompt": "q", "chosen": [USER], "rejected": "-"},
        '"chosen": the first turn must be the assistant\'s',
    ),
    (
        {"prompt": "q", "chosen": [BOT, USER], "rejected": "-"},
        '"chosen" must be one assistant turn, not 2 turns',
    ),
]
FAULTS = (
    [(kind, *case) for kind in CANONICAL for case in ANY]
    + [("pt", *case) for case in PT]
    + [("sft", *case) for case in SFT]
    + [(kind, *case) for kind in ("rm", "dpo") for case in PAIR]
)


@pytest.mark.parametrize(("kind", "row", "message"), FAULTS, ids=lambda value: str(value)[:60])
def test_a_fault_is_told_with_its_line(write_jsonl, kind, row, message):
    path = write_jsonl("rows.jsonl", [GOOD[kind], "", row])
    assert faults_of(path, kind) == [f"{path}:3: {message}", "1 of 2 rows are bad. Mend or remove them."]


def test_every_fault_of_a_folder_is_told_in_one_pass(tmp_path, write_jsonl):
    kinds = [row for row, _ in SFT]
    write_jsonl("d/a.jsonl", [{"messages": [USER, BOT]}, *kinds[:5]])
    (tmp_path / "d" / "b.json").write_text(
        json.dumps([{"messages": [USER, BOT]}, kinds[5]]), encoding="utf-8"
    )
    write_jsonl("d/c.jsonl", ["{", {"messages": [USER, BOT]}])
    messages = [message for _, message in SFT]
    assert faults_of(tmp_path / "d", "sft") == [
        *[f"{tmp_path}/d/a.jsonl:{i + 2}: {messages[i]}" for i in range(5)],
        f"{tmp_path}/d/b.json: row 2: {messages[5]}",
        f"{tmp_path}/d/c.jsonl:1: not JSON: Expecting property name enclosed in double quotes at column 2",
        "7 of 10 rows are bad. Mend or remove them.",
    ]


def test_of_many_faults_twenty_are_shown_and_all_counted(write_jsonl):
    path = write_jsonl("rows.jsonl", [{"text": "t"}] * 5 + [{}] * 33)
    faults = faults_of(path, "pt")
    assert faults[:20] == [f'{path}:{line}: no "text" (keys: none)' for line in range(6, 26)]
    assert faults[20:] == ["... and 13 more", "33 of 38 rows are bad. Mend or remove them."]


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        (
            "a.jsonl",
            b'{"text": "a"}\n{"text": "\xc3("}\n',
            ":2: not UTF-8 (byte 0xc3); convert the file to UTF-8",
        ),
        (
            "a.jsonl",
            '{"text": "a"}\n'.encode("utf-16"),
            ":1: not UTF-8 (byte 0xff); convert the file to UTF-8",
        ),
        # With a byte order mark positions are counted from behind it; the byte must be named all the same.
        ("a.txt", b"\xef\xbb\xbfa\nb\n\xff\xfe", ":3: not UTF-8 (byte 0xff); convert the file to UTF-8"),
        ("a.json", b'[{"text": "a"},\n{"text": }]', ":2: not JSON: Expecting value at column 10"),
        ("a.json", b'{"text": "a"}', ":1: must hold an array of rows ([...])"),
        ("a.jsonl", b"", ": holds no rows"),
        ("a.jsonl", b"\n \n", ": holds no rows"),
        ("a.json", b"[]", ": holds no rows"),
        ("a.jsonl.gz", b"no gzip", ": can't be read: Not a gzipped file (b'no')"),
        (
            "a.jsonl.gz",
            gzip.compress(b'{"text": "a"}\n' * 50)[:-8],
            ": can't be read: Compressed file ended before the end-of-stream marker was reached",
        ),
    ],
)
def test_a_broken_file_is_told(tmp_path, name, data, message):
    (tmp_path / name).write_bytes(data)
    assert faults_of(tmp_path, "pt")[0] == f"{tmp_path}/{name}{message}"


@pytest.mark.parametrize("at", [10, -20], ids=["first block", "checksum"])
def test_damaged_gzip_data_is_told(tmp_path, at):
    path = tmp_path / "a.jsonl.gz"
    data = bytearray(gzip.compress(b"".join(b'{"text": "%d"}\n' % (i * 7919) for i in range(500))))
    data[at] = data[at] | 0x06 if at > 0 else data[at] ^ 0xFF  # 0x06: a block of no known type
    path.write_bytes(data)
    assert faults_of(path, "pt")[0].startswith(f"{path}: can't be read: ")


def test_half_a_surrogate_pair_is_told(write_jsonl):
    """JSON can spell it, but it is no character: no tokenizer takes it."""
    path = write_jsonl("a.jsonl", ['{"text": "\\ud83d"}'])
    assert faults_of(path, "pt")[0].startswith(f"{path}:1: ")
    # Control: the whole pair is a character.
    assert read_rows(str(write_jsonl("b.jsonl", ['{"text": "\\ud83d\\ude00"}'])), "pt")[0].text == "😀"


def test_a_number_too_long_to_read_is_told(write_jsonl):
    path = write_jsonl("a.jsonl", [GOOD["pt"], '{"text": "t", "id": ' + "9" * 5000 + "}"])
    assert faults_of(path, "pt")[0].startswith(f"{path}:2: not JSON: ")


def test_a_missing_or_empty_folder_is_told_with_its_flag(tmp_path):
    assert faults_of(tmp_path / "none", "pt") == [f"--train_file_dir {tmp_path}/none: no such file or folder"]
    expected = (
        f"--train_file_dir {tmp_path}: no .jsonl, .json, .txt file (or one of these with .gz) in the folder"
    )
    assert faults_of(tmp_path, "pt") == [expected]
    with pytest.raises(UserError, match=f"^--validation_file_dir {tmp_path}: no "):
        read_rows(str(tmp_path), "pt", "--validation_file_dir")


def test_the_sample_data_has_no_fault(root):
    for folder, kinds in (("pretrain", ["pt"]), ("finetune", ["sft"]), ("reward", ["rm", "dpo"])):
        for kind in kinds:
            assert len(read_rows(str(root / "data" / folder), kind)) > 100
