"""The commands: the check's table and its faults, the list of commands and their help, sample, preview, tokenize."""

from __future__ import annotations

import json
import os
import pty
import subprocess
import sys

import pytest

import prepare_data
from stagecraft.data import preview
from stagecraft.errors import UserError

TALK = {"messages": [{"role": "user", "content": "ab"}, {"role": "assistant", "content": "cde"}]}
MEND = "Mend them, or leave them out with --on_bad_rows skip (they will be counted)."
PAIR = {"question": "q", "response_chosen": "+", "response_rejected": "-"}


@pytest.fixture
def check(monkeypatch):
    """check(*flags) is `prepare_data.py FLAGS` in this process."""

    def call(*flags):
        monkeypatch.setattr(sys, "argv", ["prepare_data.py", *map(str, flags)])
        prepare_data.main()

    return call


def told(check, *flags) -> list[str]:
    with pytest.raises(UserError) as caught:
        check(*flags)
    return str(caught.value).splitlines()


def test_the_table(check, write_jsonl, tmp_path, monkeypatch, capsys):
    write_jsonl("finetune/a.jsonl", [TALK, TALK, {"question": "q", "answer": "a long answer"}])
    write_jsonl("finetune/b.jsonl", [{"instruction": "i", "output": "o"}])
    write_jsonl("pretrain/a.jsonl", [{"text": "x" * 1500}] + [{"text": f"{i}"} for i in range(1200)])
    write_jsonl("reward/a.jsonl", [PAIR])
    monkeypatch.chdir(tmp_path)
    check("check", "pretrain", "finetune", "reward")
    assert capsys.readouterr().out.splitlines() == [
        "path      stage  files   rows   kept  copies  turns           p50 / p95 / max",
        "pretrain  pt         1  1,201  1,201       0      -  3 / 4 / 1,500 characters",
        "finetune  sft        2      4      4       1      8    6 / 15 / 15 characters",
        "reward    dpo        1      1      1       0      -      5 / 5 / 5 characters",
    ]


def test_with_a_tokenizer_lengths_are_tokens_and_what_is_left_out_has_its_reason(
    check, write_jsonl, tmp_path, tiny_base, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    long = {"question": "q", "answer": "water " * 99}
    write_jsonl("finetune/a.jsonl", [TALK, TALK, {"question": "q", "answer": "a"}, long, "{"])
    write_jsonl("valid/a.jsonl", [{"question": "q", "answer": "a"}])
    flags = ["--tokenizer", tiny_base, "--model_max_length", "60", "--validation_file_dir", "valid"]
    check("check", "finetune", *flags, "--on_bad_rows", "skip", "--json")
    [found] = json.loads(capsys.readouterr().out)
    assert (found["rows"], found["kept"], found["duplicates"], found["leaks"]) == (6, 3, 1, 1)
    assert found["reasons"] == {"bad rows skipped": 1, "longer than 60 tokens": 1}
    assert found["rows"] == found["kept"] + found["leaks"] + sum(found["reasons"].values())
    assert found["unit"] == "tokens" and found["length"]["max"] <= 60
    assert 0 < found["supervised_share"] < 1 and found["tokens_an_epoch"] == 2 * found["length"]["max"]
    check("check", "finetune", *flags, "--on_bad_rows", "skip")
    assert "finetune (sft): bad rows skipped 1, longer than 60 tokens 1" in capsys.readouterr().out


@pytest.mark.parametrize("stage", ["pt", "sft", "rm", "dpo"])
def test_a_stage_can_be_named(check, write_jsonl, capsys, stage):
    row = {"pt": {"text": "t"}, "sft": TALK}.get(stage, PAIR)
    path = write_jsonl("pretrain/mine=1.jsonl", [row])
    check("check", f"{stage}={path}")
    assert capsys.readouterr().out.splitlines()[1].split()[:4] == [str(path), stage, "1", "1"]


def test_rows_of_evaluation_are_checked_too(check, write_jsonl, tmp_path, capsys):
    write_jsonl("eval/answers.jsonl", [{"question": "q", "answer": "a", "split": "fact"}] * 2)
    write_jsonl("eval/documents.jsonl", [{"text": "t"}])
    check("check", tmp_path / "eval")
    assert capsys.readouterr().out.splitlines()[1].split()[1:4] == ["eval", "2", "3"]
    bad = write_jsonl("other/answers.jsonl", [{"question": "q"}])
    assert told(check, "check", f"eval={bad.parent}")[0].startswith(f'{bad}:1: no "answer"')


def test_the_stage_is_told_by_the_nearest_folder(check, write_jsonl, capsys):
    path = write_jsonl("pretrain/finetune/deep/a.jsonl", [TALK])
    check("check", path)
    assert capsys.readouterr().out.splitlines()[1].split()[1] == "sft"


def test_a_path_of_no_known_stage_is_told(check, write_jsonl):
    path = write_jsonl("mine.jsonl", [TALK])
    assert told(check, "check", path) == [
        f"{path}: which stage is it for? Write STAGE={path}, STAGE being pt|sft|rm|dpo|memory|eval"
    ]


def test_the_faults_of_several_paths_are_told_together_and_the_good_ones_shown(
    check, write_jsonl, tmp_path, capsys
):
    good = write_jsonl("finetune/good.jsonl", [TALK])
    bad = write_jsonl("finetune/bad.jsonl", [TALK, {"messages": []}, "{"])
    pairs = write_jsonl("reward/bad.jsonl", [PAIR | {"response_rejected": "+"}])
    other = write_jsonl("mine.jsonl", [TALK])
    gone = tmp_path / "pretrain" / "gone"
    assert told(check, "check", bad, good, pairs, other, gone) == [
        f'{bad}:2: "messages" must be a list of turns, not an empty one',
        f"{bad}:3: not JSON: Expecting property name enclosed in double quotes at column 2",
        f"2 of 3 rows are bad. {MEND}",
        f"{pairs}:1: chosen and rejected are the same text",
        f"1 of 1 rows are bad. {MEND}",
        f"{other}: which stage is it for? Write STAGE={other}, STAGE being pt|sft|rm|dpo|memory|eval",
        f"PATH {gone}: no such file or folder",
    ]
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 and lines[1].startswith(str(good))


def test_what_is_missing_is_told(check):
    assert told(check, "check") == ["paths is missing: [STAGE=]PATH: files or folders"]
    assert told(check)[0] == "command is missing: what to do"


def test_another_command_is_told(check, tmp_path):
    lines = told(check, "chek", tmp_path)
    assert lines[0] == 'unknown command "chek"; did you mean "check"?'
    assert [line.split()[0] for line in lines[1:]] == ["check", "convert", "sample", "preview", "tokenize"]


def test_help_lists_the_commands_and_each_has_its_own(check, capsys):
    check("--help")
    out = capsys.readouterr().out
    assert all(f"\n  {name} " in out for name in prepare_data.COMMANDS)
    for name, flag in (
        ("convert", "--good_col"),
        ("sample", "--seed"),
        ("preview", "--row"),
        ("tokenize", "--stage"),
    ):
        with pytest.raises(SystemExit) as ended:
            check(name, "--help")
        out = capsys.readouterr().out
        assert ended.value.code == 0 and out.startswith(f"usage: prepare_data.py {name} ")
        assert f"  {flag} " in out and f"prepare_data.py {name}" in out.split("\n", 1)[1]
        assert name == "preview" or "--row" not in out


def test_the_script_ends_with_2_and_no_traceback(run_script, write_jsonl, root):
    bad = write_jsonl("finetune/bad.jsonl", ["{"])
    done = run_script("prepare_data.py", "check", bad)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"{bad}:1: not JSON: ") and "Traceback" not in done.stderr
    done = run_script(
        "prepare_data.py", "check", *(root / "data" / name for name in ("pretrain", "finetune", "reward"))
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert len(done.stdout.splitlines()) == 4


# sample


def test_samples_are_the_kits_own_rows_and_the_seed_decides_which(check, root, tmp_path):
    def made(name, *flags):
        check("sample", "--output", tmp_path / name, "--num_samples", 40, *flags)
        return [json.loads(line) for line in (tmp_path / name).read_text(encoding="utf-8").splitlines()]

    own = [json.loads(line) for line in (root / "data/finetune/train.jsonl").read_text("utf-8").splitlines()]
    first = made("a.jsonl")
    assert len(first) == 40 and all(row in own for row in first)
    assert made("b.jsonl") == first != made("c.jsonl", "--seed", 1)
    alpaca = made("d.jsonl", "--format", "alpaca")
    for row, talk in zip(alpaca, first, strict=True):
        said = [turn["value"] for turn in talk["conversations"] if turn["from"] != "system"]
        history = [text for pair in row.get("history", []) for text in pair]
        assert [*history, row["instruction"], row["output"]] == said and row["input"] == ""
    check("convert", "--to", "sft", "--input", tmp_path / "d.jsonl", "--output", tmp_path / "e.jsonl")
    assert (tmp_path / "e.jsonl").read_bytes() == (tmp_path / "a.jsonl").read_bytes()


def test_more_samples_than_there_are_is_an_error(check, root, tmp_path):
    assert told(check, "sample", "--output", tmp_path / "a.jsonl", "--num_samples", 9999) == [
        "--num_samples 9999: the sample data has 2,560 conversations"
    ]
    own = root / "data/finetune/train.jsonl"
    assert told(check, "sample", "--output", own) == [
        f"--output {own}: is the sample data itself; write elsewhere"
    ]


# preview


@pytest.fixture
def shown(check, capsys):
    """shown(*flags) -> the lines of a preview."""

    def call(*flags):
        capsys.readouterr()
        check("preview", *flags)
        return capsys.readouterr().out.splitlines()

    return call


def test_what_carries_loss_is_in_brackets(shown, write_jsonl, tiny_base, tokenizer):
    turns = [("user", "u1"), ("assistant", "a1"), ("user", "u2"), ("assistant", "a2\nb")]
    path = write_jsonl("a.jsonl", [TALK, {"messages": [{"role": r, "content": c} for r, c in turns]}])
    text = "".join(f"<|im_start|>{role}\n{content}<|im_end|>\n" for role, content in turns)
    tokens = len(tokenizer(text, add_special_tokens=False)["input_ids"])
    assert shown(path, "--row", 2, "--tokenizer", tiny_base) == [
        f"{path}:2  sft  template chatml  tokenizer {tiny_base}",
        "",
        *("<|im_start|>user", "u1<|im_end|>", "<|im_start|>assistant", "⟦a1<|im_end|>⟧"),
        *("<|im_start|>user", "u2<|im_end|>", "<|im_start|>assistant", "⟦a2", "b<|im_end|>⟧"),
        "",
        f"{tokens} tokens, 8 of them carry loss ({8 / tokens:.0%})",
    ]


def test_the_counts_are_those_of_training(shown, write_jsonl, tiny_base, tokenizer, tmp_path, monkeypatch):
    from stagecraft.arguments import SFTDataArguments
    from stagecraft.chat import templates
    from stagecraft.data import corpus

    monkeypatch.chdir(tmp_path)
    path = write_jsonl("a.jsonl", [TALK])
    line = shown(path, "--tokenizer", tiny_base)[-1]
    data = SFTDataArguments(str(path), validation_split_percentage=0)
    counts = corpus.load_conversations(data, tokenizer, templates.load_template(tokenizer, None)).counts
    assert line.startswith(f"{counts['tokens an epoch']} tokens, {counts['supervised']} of them carry loss")


def test_without_a_tokenizer_characters_are_counted(shown, write_jsonl):
    path = write_jsonl("a.jsonl", [TALK])
    lines = shown(path, "--template_name", "chatml")
    assert lines[0] == f"{path}:1  sft  template chatml  no tokenizer"
    assert "⟦cde<|im_end|>⟧" in lines
    text = "<|im_start|>user\nab<|im_end|>\n<|im_start|>assistant\ncde<|im_end|>\n"
    assert lines[-2] == f"{len(text)} characters, 13 of them carry loss ({13 / len(text):.0%})"


def test_every_stage_has_its_preview(shown, write_jsonl, tiny_base):
    pair = write_jsonl(
        "a.jsonl",
        [{"question": "q", "history": [["h", "i"]], "response_chosen": "yes", "response_rejected": "no"}],
    )
    lines = shown(pair, "--tokenizer", tiny_base)
    assert " dpo " in lines[0] and "i<|im_end|>" in lines  # an earlier answer is not compared
    assert lines[lines.index("--- chosen ---") + 1] == "⟦yes<|im_end|>⟧"
    assert lines[lines.index("--- rejected ---") + 1] == "⟦no<|im_end|>⟧"
    assert lines[-1].endswith("the answers' log-probabilities are compared")
    assert shown(f"rm={pair}", "--tokenizer", tiny_base)[-1].endswith("scores each answer at its last token")
    document = write_jsonl("b.jsonl", [{"text": "one\ntwo"}])
    assert shown(document, "--tokenizer", tiny_base)[2:4] == ["⟦one", "two<|im_end|>⟧"]
    assert shown(document)[2:4] == ["⟦one", "two⟧"]
    choice = write_jsonl("c.jsonl", [{"question": "q", "options": ["x", "y"], "answer": "B", "uuid": "u-7"}])
    lines = shown(choice, "--template_name", "chatml")
    assert " memory " in lines[0] and "⟦B:y<|im_end|>⟧" in lines and lines[-1].endswith(": u-7")


def test_the_stage_can_be_said_and_a_folder_tells_it(shown, check, write_jsonl):
    row = {"text": "t", "question": "q", "answer": "a"}
    path = write_jsonl("finetune/a.jsonl", [row])
    assert "  sft  " in shown(path)[0]
    assert "  pt  " in shown(path, "--stage", "pt")[0] and "  pt  " in shown(f"pt={path}")[0]
    assert "  pt  " in shown(write_jsonl("a.jsonl", [row]))[0]
    assert told(check, "preview", path, "--stage", "dpo")[0].startswith(f"{path}:1: unknown format")


def test_rows_are_counted_over_files_and_bad_ones_told(shown, check, write_jsonl, tmp_path):
    write_jsonl("in/a.jsonl", [TALK, "", "{"])
    write_jsonl("in/b.jsonl", [{"strange": 1}, TALK])
    folder = tmp_path / "in"
    assert shown(folder, "--row", 4)[0].startswith(f"{folder}/b.jsonl:2  sft")
    assert told(check, "preview", folder, "--row", 2)[0].startswith(f"{folder}/a.jsonl:3: not JSON")
    assert told(check, "preview", folder, "--row", 3) == [
        f"{folder}/b.jsonl:1: no stage knows this format (keys: strange); docs/formats.md shows what they know"
    ]
    assert told(check, "preview", folder, "--row", 5) == [f"--row 5: {folder} holds 4 rows"]
    assert told(check, "preview", folder, "--row", 0) == ["--row must be at least 1, not 0"]


def test_only_the_fault_that_matters_is_told(check, write_jsonl):
    row = {"question": "q", "options": "A:x,B:y", "correct_answer": "C:z"}
    [line] = told(check, "preview", write_jsonl("a.jsonl", [row]))
    assert ': as memory: "correct_answer"' in line


def test_a_missing_tokenizer_is_told_at_once(check, write_jsonl, tmp_path):
    path = write_jsonl("a.jsonl", [TALK])
    assert told(check, "preview", path, "--tokenizer", tmp_path / "gone") == [
        f"--tokenizer {tmp_path / 'gone'}: no folder with a tokenizer (build_base.py fetches a model from the hub)"
    ]


def test_control_characters_of_a_row_never_reach_the_terminal(shown, write_jsonl):
    path = write_jsonl("a.jsonl", [{"text": "a\x1b[31mb\tc\x07\x9b"}])
    assert shown(path)[2] == "⟦a\\x1b[31mb\tc\\x07\\x9b⟧"


def test_painting():
    parts = [("a", False), ("b", True)]
    assert preview.painted(parts, coloured=False) == "a⟦b⟧"
    assert preview.painted(parts, coloured=True) == "a\x1b[1;32mb\x1b[0m"


@pytest.mark.parametrize(
    ("setting", "coloured"),
    [({}, True), ({"NO_COLOR": "1"}, False), ({"TERM": "dumb"}, False), ({"NO_COLOR": ""}, True)],
)
def test_colours_are_for_terminals(root, write_jsonl, setting, coloured):
    path = write_jsonl("a.jsonl", [{"text": "t"}])
    ours, theirs = pty.openpty()
    env = (
        {name: value for name, value in os.environ.items() if name != "NO_COLOR"}
        | {"TERM": "xterm"}
        | setting
    )
    script = [sys.executable, str(root / "python/prepare_data.py"), "preview", str(path)]
    subprocess.run(script, check=True, stdout=theirs, env=env, timeout=60)
    os.close(theirs)
    out = os.read(ours, 10_000).decode()
    os.close(ours)
    assert ("\x1b[1;32mt\x1b[0m" in out) == coloured and ("⟦t⟧" in out) != coloured


# tokenize


def test_tokenize_keeps_what_the_stage_would_train_on(
    check, write_jsonl, tiny_base, tokenizer, tmp_path, monkeypatch
):
    from datasets import load_from_disk

    from stagecraft.arguments import SFTDataArguments
    from stagecraft.chat import templates
    from stagecraft.data import corpus

    monkeypatch.chdir(tmp_path)
    path = write_jsonl("a.jsonl", [{"question": f"q {i}", "answer": f"a {i}"} for i in range(60)])
    flags = ("--stage", "sft", "--input_dir", path, "--tokenizer", tiny_base, "--output_dir", "made")
    check("tokenize", *flags, "--validation_split_percentage", 10)
    data = SFTDataArguments(str(path), validation_split_percentage=10)
    wanted = corpus.load_conversations(data, tokenizer, templates.load_template(tokenizer, None))
    for name, part in (("train", wanted.train), ("valid", wanted.valid)):
        assert load_from_disk(f"made/{name}").to_dict() == part.to_dict()
    facts = json.loads((tmp_path / "made/tokenised.json").read_text(encoding="utf-8"))
    assert facts["counts"] == wanted.counts and facts["files"] == wanted.files and facts["stage"] == "sft"
    check("tokenize", *flags, "--validation_split_percentage=0")  # it may replace what it made itself
    assert len(load_from_disk("made/train")) == 60 and not (tmp_path / "made/valid").exists()


@pytest.mark.parametrize(
    ("stage", "row", "columns"),
    [
        ("pt", {"text": "t"}, ["input_ids", "labels"]),
        ("rm", PAIR, ["chosen_ids", "rejected_ids"]),
        ("dpo", PAIR, ["chosen_ids", "prompt_ids", "rejected_ids"]),
    ],
)
def test_tokenize_for_every_stage(check, write_jsonl, tiny_base, tmp_path, monkeypatch, stage, row, columns):
    from datasets import load_from_disk

    monkeypatch.chdir(tmp_path)
    path = write_jsonl("a.jsonl", [row])
    flags = ("--input_dir", path, "--tokenizer", tiny_base, "--output_dir", "made")
    check("tokenize", f"--stage={stage}", *flags)
    assert sorted(load_from_disk("made/train").column_names) == columns


def test_tokenize_replaces_nothing_of_the_users(check, write_jsonl, tiny_base, tmp_path):
    path = write_jsonl("mine/a.jsonl", [TALK])
    flags = ("tokenize", "--stage", "sft", "--input_dir", path, "--tokenizer", tiny_base, "--output_dir")
    for folder in (path.parent, path):
        assert told(check, *flags, folder) == [
            f"--output_dir {folder}: holds something else; name a new folder, or an empty one"
        ]
    assert path.exists()


def test_tokenize_takes_the_flags_of_its_stage(check, tmp_path, write_jsonl, tiny_base, monkeypatch):
    settings = tmp_path / "a.yaml"
    settings.write_text("stage: pt\ninput_dir: x\noutput_dir: y\ntokenizer: z\n")
    assert told(check, "tokenize", "--config", settings) == [
        "x: whose rows are they? Say --stage pt|sft|rm|dpo on the command line; it decides which flags there are"
    ]
    from datasets import load_from_disk

    # A folder's name tells it, too.
    monkeypatch.chdir(tmp_path)
    write_jsonl("pretrain/a.jsonl", [{"text": f"water {i}"} for i in range(9)])
    flags = ("--tokenizer", tiny_base, "--output_dir", "made", "--block_size", "8")
    check("tokenize", "--input_dir", "pretrain", *flags)
    assert {len(row) for row in load_from_disk("made/train")["input_ids"]} <= set(range(2, 9))
