"""Rows that training has seen are found in every kind of training data, and rows that only look like them are not."""

import gzip
import json
from pathlib import Path

import pytest

from stagecraft.data.rows import Document, Preference
from stagecraft.errors import UserError
from stagecraft.evaluation import leaks
from stagecraft.evaluation.sets import Choice, EvalSets, Question, read_eval_sets

ROOT = Path(__file__).resolve().parents[2]
SHORT = "发烧时怎么办？"
LONG = "My daughter has had a high fever since Monday evening and refuses to drink, what should we do for her tonight?"
TEXT = "感冒的常见症状包括鼻塞、流清涕和打喷嚏。多喝温水并充分休息，是家里能做的事。高烧超过三天不退，就该去呼吸内科看医生。"
CHOSEN = "Offer small sips of water every few minutes, keep her cool, and see a doctor tonight if she stays drowsy."
WHERE = "train/"


def asked(content):
    return [{"role": "system", "content": "be brief"}, {"role": "user", "content": content}]


def sets():
    return EvalSets(
        documents=[Document(TEXT, "documents.jsonl:1"), Document("流感会发烧。", "documents.jsonl:2")],
        answers=[
            Question(asked(SHORT), "喝水", "fact", "answers.jsonl:1"),
            Question(asked(LONG), "sips", None, "answers.jsonl:2"),
        ],
        choices=[Choice(asked("How do I treat a cold?"), ["rest", "run"], 0, None, "choices.jsonl:1")],
        preferences=[
            Preference(asked("What should I do about her fever?"), CHOSEN, "Nothing.", "preferences.jsonl:1")
        ],
        questions=[Question(asked("你好"), "?", None, "questions.jsonl:1")],
    )


def conversation(*turns):
    return {
        "messages": [{"role": ("user", "assistant")[i % 2], "content": turn} for i, turn in enumerate(turns)]
    }


def pair(question, chosen, rejected="go away"):
    return {"question": question, "response_chosen": chosen, "response_rejected": rejected}


def write(folder, *rows, name="train.jsonl"):
    folder.mkdir(parents=True, exist_ok=True)
    data = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
    (folder / name).write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
    return str(folder)


HARMLESS = {
    "pt": [{"text": "流感会传染。"}, {"text": "A cold is treated with rest. Fever calls for water."}],
    "sft": [conversation("感冒怎么办？", "多休息。"), conversation("hello", "hi", "and now?", "rest")],
    "rm": [
        pair("发烧怎么办？", "喝水"),
        pair("What should I do about her fever?", "Give her water to drink."),
    ],
}


@pytest.mark.parametrize(
    ("stage", "row", "found"),
    [
        ("pt", {"text": TEXT.replace("，", " , ")}, [("documents", 1)]),
        ("pt", {"text": "流感会发烧"}, [("documents", 2)]),
        ("pt", {"text": f"As one mother asked: {LONG} Here is what we told her."}, [("answers", 2)]),
        ("pt", {"text": f"What should I do about her fever? {CHOSEN}"}, [("preferences", 1)]),
        ("sft", conversation("你好", f"书上说：{TEXT}"), [("documents", 1)]),
        ("sft", conversation("发烧时怎么办", "去医院。"), [("answers", 1)]),
        ("sft", conversation("hello", "hi", "发烧时 怎么办?", "rest"), [("answers", 1)]),
        ("sft", conversation(LONG.upper(), "water"), [("answers", 2)]),
        ("sft", conversation("how do I  treat a cold", "rest"), [("choices", 1)]),
        ("sft", conversation("What should I do about her fever?", CHOSEN), [("preferences", 1)]),
        ("rm", pair(SHORT, "喝水"), [("answers", 1)]),
        ("rm", pair("How do I treat a cold?", "rest"), [("choices", 1)]),
        ("rm", pair("What should I do about her fever?", CHOSEN, "no"), [("preferences", 1)]),
        ("dpo", pair("why?", "no", TEXT), [("documents", 1)]),
        ("dpo", pair("why?", TEXT), [("documents", 1)]),
        # Controls: half a document; a short question in a document, in a longer one, as an answer; another word; an
        # answer without its question (9 of the pair's 16 runs); the question with another answer.
        ("pt", {"text": TEXT[: len(TEXT) // 2]}, []),
        ("pt", {"text": f"{SHORT}多喝水。"}, []),
        ("sft", conversation(f"{SHORT}多久能好？", "三天。"), []),
        ("sft", conversation("你好", SHORT), []),
        ("sft", conversation("发烧时怎么吃？", "吃粥。"), []),
        ("sft", conversation("Anything else?", CHOSEN), []),
        ("rm", pair("What should I do about her fever?", "Keep her cool."), []),
    ],
)
def test_a_planted_row_is_found(tmp_path, stage, row, found):
    kind = {"dpo": "rm"}.get(stage, stage)
    folder = write(tmp_path / stage, HARMLESS[kind][0], row, HARMLESS[kind][1])
    hits = leaks.find(sets(), {stage: folder})
    assert [(leak.name, leak.where) for leak in hits] == [(name, f"{name}.jsonl:{n}") for name, n in found]
    assert all(leak.source == f"{folder}/train.jsonl:2" and 0.8 <= leak.overlap <= 1 for leak in hits)


def test_the_share_of_runs_decides(tmp_path):
    """A near copy: the runs over one changed word are lost, 13 of them where it stands in the middle."""
    words = [f"w{chr(97 + i // 26)}{chr(97 + i % 26)}" for i in range(100)]
    given = EvalSets(documents=[Document(" ".join(words), "documents.jsonl:1")])

    def changed(*places):
        copy = [("other" if i in places else word) for i, word in enumerate(words)]
        return leaks.find(given, {"pt": write(tmp_path, {"text": f"Before. {' '.join(copy)} And after."})})

    [one] = changed(50)
    assert one.overlap == pytest.approx(75 / 88)  # 100 words have 88 runs
    [edge] = changed(2, 97)
    assert edge.overlap == pytest.approx(82 / 88)
    assert changed(30, 70) == []  # 62 / 88
    assert changed(*range(9, 100, 10)) == []
    # The same sentences, cut in two training rows of which neither holds enough.
    halves = [{"text": " ".join(words[:60])}, {"text": " ".join(words[40:])}]
    assert leaks.find(given, {"pt": write(tmp_path, *halves)}) == []


def test_the_row_most_like_it_is_told_and_folders_are_read_once(tmp_path):
    near = TEXT.replace("看医生", "找大夫")
    folder = write(tmp_path / "pt", {"text": near}, {"text": TEXT}, {"text": TEXT})
    [leak] = leaks.find(sets(), {"pt": folder})
    assert (leak.source, leak.overlap, leak.text) == (f"{folder}/train.jsonl:2", 1.0, TEXT)
    [leak] = leaks.find(sets(), {"pt": write(tmp_path / "near", {"text": near})})
    assert 0.8 <= leak.overlap < 1
    both = write(tmp_path / "pairs", pair(SHORT, "喝水"))
    read = []
    found = leaks.find(sets(), {"rm": both, "dpo": both}, progress=read.append)
    assert len(found) == 1 and sum(read) == leaks.weigh({"rm": both, "dpo": both})


def test_files_of_every_kind_have_their_places(tmp_path):
    write(tmp_path, {"text": "流感会传染。"}, {"text": TEXT}, name="a.jsonl.gz")
    (tmp_path / "b.json").write_text(
        json.dumps([{"text": "x"}, {"text": "流感会发烧。"}], ensure_ascii=False)
    )
    (tmp_path / "c.txt").write_text(f"{LONG}\n{'{'}not json\n")
    read = []
    found = leaks.find(sets(), {"pt": str(tmp_path)}, progress=read.append)
    assert [(leak.where, leak.source.removeprefix(f"{tmp_path}/")) for leak in found] == [
        ("documents.jsonl:1", "a.jsonl.gz:2"),
        ("documents.jsonl:2", "b.json: row 2"),
        ("answers.jsonl:2", "c.txt:1"),
    ]
    assert sum(read) == leaks.weigh({"pt": str(tmp_path)})


def test_processes_find_what_one_finds(tmp_path):
    filler = [{"text": f"row {i} " + "注意休息，多喝温水。" * 60} for i in range(2600)]
    filler[1300]["text"] = TEXT
    filler[2599]["text"] = f"asked: {LONG}"
    folder = write(tmp_path, *filler)
    assert leaks.weigh({"pt": folder}) > 4 << 20
    found = leaks.find(sets(), {"pt": folder}, workers=2)
    assert [(leak.name, leak.source.rpartition(":")[2]) for leak in found] == [
        ("documents", "1301"),
        ("answers", "2600"),
    ]
    assert found == leaks.find(sets(), {"pt": folder}, workers=1)


def test_leaked_rows_are_left_out_and_no_other(tmp_path):
    given = sets()
    found = leaks.find(given, {"sft": write(tmp_path, conversation(SHORT, TEXT))})
    assert {leak.name for leak in found} == {"documents", "answers"}
    left = leaks.without(given, found)
    assert [row.where for row in left.documents] == ["documents.jsonl:2"]
    assert [row.where for row in left.answers] == ["answers.jsonl:2"]
    assert (left.choices, left.preferences, left.questions) == (
        given.choices,
        given.preferences,
        given.questions,
    )
    assert len(given.answers) == 2 and leaks.without(given, []) == given


def test_rows_of_training_that_can_not_be_read_are_passed_over(tmp_path):
    (tmp_path / "train.jsonl").write_text(
        '{"text": 5}\n{"nothing"\n{"messages": []}\n' + json.dumps({"text": TEXT}) + "\n"
    )
    [leak] = leaks.find(sets(), {"pt": str(tmp_path)})
    assert leak.source.endswith(":4")
    assert leaks.find(EvalSets(), {"pt": str(tmp_path)}) == [] and leaks.find(sets(), {}) == []


def test_every_folder_that_is_wrong_is_told(tmp_path):
    with pytest.raises(UserError) as error:
        leaks.weigh({"pt": str(tmp_path / "none"), "ppo": "x", "sft": str(tmp_path)})
    first, second, third = str(error.value).splitlines()
    assert first == f"--train_data pt {tmp_path / 'none'}: no such file or folder"
    assert second == "--train_data ppo=x: the stages with training data are pt, sft, rm, dpo"
    assert third.startswith(f"--train_data sft {tmp_path}: no .jsonl")


def test_the_sample_data_has_no_leak_and_a_copy_of_it_has(tmp_path):
    folders = {"pt": "data/pretrain", "sft": "data/finetune", "rm": "data/reward", "dpo": "data/reward"}
    sample = read_eval_sets(str(ROOT / "data/eval"))
    assert leaks.find(sample, {stage: str(ROOT / folder) for stage, folder in folders.items()}) == []
    copied = [{"text": row.text} for row in sample.documents[:3]]
    asked_before = [conversation(row.text, "?") for row in sample.answers[:4]]
    found = leaks.find(
        sample, {"pt": write(tmp_path / "pt", *copied), "sft": write(tmp_path / "sft", *asked_before)}
    )
    names = [leak.name for leak in found]
    assert (names.count("documents"), names.count("answers"), names.count("choices")) == (3, 4, 4)
