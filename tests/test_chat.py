"""make chat: answers piece by piece, from a folder, an adapter or a server; the terminal's commands on a real one."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import re
import select
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from speakers import teach
from stagecraft import generation, models, naming
from stagecraft.errors import UserError
from stagecraft.places import Place, read_place
from stagecraft.talk import appending, sources

ROOT = Path(__file__).resolve().parents[1]
COLD = "感冒怎么办？"
REST = "感冒时请多喝水，注意休息，三天不退要去医院。🩺 A cold goes by itself: rest, and drink warm water."
MORE, THEN = "还有呢？", "不要熬夜。"
ENVIRONMENT = os.environ | {"PYTHONWARNINGS": "ignore", "TERM": "dumb", "CUDA_VISIBLE_DEVICES": ""}


@pytest.fixture(scope="module")
def speaker(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that knows what helps against a cold, and what comes next in that conversation."""
    return teach(
        tiny_base, tmp_path_factory.mktemp("speaker") / "model", [[COLD, REST], [COLD, REST, MORE, THEN]]
    )


@pytest.fixture(scope="module")
def source(speaker: Path) -> Iterator[sources.Source]:
    opened = sources.open_source(place_of(speaker), "auto")
    yield opened
    opened.close()


def place_of(folder: Path) -> Place:
    return read_place(folder.name, str(folder), "--model")


def asked(text: str) -> list[Any]:
    return [{"role": "user", "content": text}]


# ---- Sources


def test_pieces_make_the_answer_that_is_made_at_once(source: sources.Source, speaker: Path) -> None:
    tokenizer = models.load_tokenizer(str(speaker))
    model = models.load_causal(str(speaker))
    whole = generation.stream_reply(model, tokenizer, asked(COLD), 200)
    pieces = list(source.stream(asked(COLD), 200))
    assert "".join(pieces) == whole == REST and len(pieces) > 20
    assert "".join(source.stream(asked("头痛怎么办？"), 60)) != whole


def test_no_piece_ends_within_a_character(source: sources.Source, speaker: Path) -> None:
    tokenizer = models.load_tokenizer(str(speaker))
    ids = tokenizer(REST)["input_ids"]
    assert any(
        "\ufffd" in tokenizer.decode([token]) for token in ids
    )  # token by token characters would break
    pieces = list(source.stream(asked(COLD), 200))
    assert not any("\ufffd" in piece for piece in pieces) and "🩺" in pieces


def ending(source: sources.Source, *arguments: Any) -> tuple[str, str]:
    """(the text, how it ended)."""
    pieces, text = source.stream(*arguments), ""
    while True:
        try:
            text += next(pieces)
        except StopIteration as end:
            return text, end.value


def test_it_tells_how_an_answer_ended(source: sources.Source) -> None:
    assert ending(source, asked(COLD), 200) == (REST, sources.WHOLE)
    text, how = ending(source, asked(COLD), 5)
    assert how == sources.LIMIT and REST.startswith(text) and 0 < len(text) < 10


def test_a_stop_ends_the_work_at_the_next_token(source: sources.Source) -> None:
    stop = threading.Event()
    pieces = source.stream(asked(COLD), 200, 0.0, stop)
    first = next(pieces)
    stop.set()
    rest = list(pieces)
    assert REST.startswith(first + "".join(rest)) and len(rest) < 40
    assert ending(source, asked(COLD), 200) == (REST, sources.WHOLE)  # and the next answer is whole again


def test_two_threads_that_ask_one_model_get_their_own_answers(source: sources.Source) -> None:
    talk = [*asked(COLD), {"role": "assistant", "content": REST}, *asked(MORE)]
    answers: dict[int, str] = {}
    questions = [asked(COLD), talk, asked(COLD), talk]
    workers = [
        threading.Thread(target=lambda i=i, q=q: answers.update({i: "".join(source.stream(q, 200))}))
        for i, q in enumerate(questions)
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    assert answers == {0: REST, 1: THEN, 2: REST, 3: THEN}


def test_a_question_that_does_not_fit_is_told(source: sources.Source) -> None:
    with pytest.raises(UserError, match="the question is .* tokens long"):
        list(source.stream(asked("头痛 " * 400), 200))


def test_an_adapter_on_its_base_answers_like_the_merged_model(speaker: Path, tmp_path: Path) -> None:
    import torch
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(1)
    config = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False, lora_alpha=8)
    adapted = get_peft_model(models.load_causal(str(speaker)), config)
    adapted.save_pretrained(tmp_path / "adapter")
    adapted.merge_and_unload().save_pretrained(tmp_path / "merged")
    for file in [*speaker.glob("tokenizer*"), speaker / "chat_template.jinja"]:
        shutil.copy(file, tmp_path / "merged")
    place = naming.find(f"{speaker}+{tmp_path / 'adapter'}", "tiny", "--model")
    texts = [
        "".join(sources.open_source(where, "auto").stream(asked(COLD), 40))
        for where in (place, *map(place_of, (tmp_path / "merged", speaker)))
    ]
    assert texts[0] == texts[1] != texts[2]
    assert place.name == "adapter" or place.name == tmp_path.name


# ---- Places


def test_every_wrong_place_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, speaker: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    for stage, seconds in (("base", 100), ("sft", 300), ("dpo", 200)):
        shutil.copytree(speaker, f"outputs-{stage}/tiny/model")
        Path(f"outputs-{stage}/tiny/DONE").touch()
        os.utime(f"outputs-{stage}/tiny/DONE", (seconds, seconds))
    assert naming.newest("tiny", 2) == ["sft", "dpo"] and naming.newest("tiny", 1) == ["sft"]
    os.utime("outputs-dpo/tiny/DONE", (300, 300))  # of equal times the later stage wins
    assert naming.newest("tiny", 1) == ["dpo"]
    found = naming.find_all(["sft", "x=outputs-dpo/tiny/model", "http://127.0.0.1:1/v1#m/last"], "tiny", "-m")
    assert [place.name for place in found] == ["sft", "x", "last"]
    assert found[0].path == "outputs-sft/tiny/model"
    wrong = {
        "rm": "a reward model scores answers and gives none",
        "pt": "not finished for RECIPE=tiny (finished: base, sft, dpo); run: make pt RECIPE=tiny",
        "sfd": 'no such folder; did you mean the stage "sft"?',
        "nowhere/model": "no such folder",
        "outputs-sft/tiny/model+nowhere": "adapter",
    }
    for word, reason in wrong.items():
        with pytest.raises(UserError) as told:
            naming.find(word, "tiny", "--model")
        assert str(told.value).startswith(f"--model {word}") and reason in str(told.value)
    with pytest.raises(UserError) as told:
        naming.find_all(["sft", "dpo", "sft", "base", "rm"], "tiny", "--models", most=4)
    lines = str(told.value).splitlines()
    assert lines[0] == "--models: 5 models; 4 answers side by side are the most"
    assert len(lines) == 3 and lines[2] == "--models: 2 models are called sft; name them: NAME=PLACE"
    with pytest.raises(UserError, match="no finished model yet; run: make sft RECIPE=other"):
        naming.newest("other", 2)


def test_without_a_model_it_says_how_to_get_one(run_script: Any, tmp_path: Path) -> None:
    done = run_script("chat.py", input="x", cwd=tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (
        2,
        "",
        "RECIPE=tiny: no finished model yet; run: make sft RECIPE=tiny, or name a model: MODEL=FOLDER\n",
    )


def test_wrong_flags_are_told_together_and_before_torch(run_script: Any, tmp_path: Path) -> None:
    began = time.monotonic()
    done = run_script(
        "chat.py", "--model", "nowhere", "--max_new_tokens", 0, "--temperature", -1, input="x", cwd=tmp_path
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert [line.split()[0] for line in done.stderr.splitlines()] == [
        "--max_new_tokens",
        "--temperature",
        "--model",
    ]
    assert time.monotonic() - began < 20
    done = run_script("chat.py", "--model", "http://127.0.0.1:9/v1", input="x")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("--model http://127.0.0.1:9/v1: nobody answers there")
    assert run_script("chat.py", "--model", "x", input="").stderr.startswith("standard input is empty")


def test_a_pipe_gets_the_answer_alone(run_script: Any, speaker: Path) -> None:
    done = run_script("chat.py", "--model", speaker, input=f"{COLD}\n", env=ENVIRONMENT)
    assert (done.returncode, done.stdout) == (0, f"{REST}\n")


# ---- Rows that are appended


def row(answer: str) -> dict[str, Any]:
    return {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": answer}]}


def test_many_writers_append_whole_lines(tmp_path: Path) -> None:
    path = tmp_path / "saved.jsonl"
    path.write_text(json.dumps(row("first")))  # an editor left the last line open
    code = (
        "import sys; from pathlib import Path; from stagecraft.talk.appending import append_rows\n"
        "for i in range(8):\n"
        "    talk = [{'from': 'human', 'value': 'q'}, {'from': 'gpt', 'value': sys.argv[2] * 5000 + str(i)}]\n"
        "    append_rows(Path(sys.argv[1]), [{'conversations': talk}], 'sft', '--f')"
    )
    environment = ENVIRONMENT | {"PYTHONPATH": str(ROOT / "python")}
    writers = [
        subprocess.Popen([sys.executable, "-c", code, str(path), letter], env=environment) for letter in "abc"
    ]
    assert [writer.wait(120) for writer in writers] == [0] * 3
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert len(rows) == 25 and rows[0] == row("first")
    assert len({found["conversations"][1]["value"] for found in rows}) == 25


def test_another_file_is_left_as_it_is(tmp_path: Path) -> None:
    for name, text in (
        ("other.jsonl", '{"text": "a document"}\n'),
        ("cut.jsonl", json.dumps(row("a")) + "\n" + json.dumps(row("b"))[:-9]),
        ("words.jsonl", "hello\n"),
    ):
        path = tmp_path / name
        path.write_text(text)
        with pytest.raises(UserError, match="nothing is appended"):
            appending.append_rows(path, [row("c")], "sft", "/save")
        assert path.read_text() == text
    for name, reason in (("saved.txt", "ends in .jsonl"), ("cut.jsonl/x.jsonl", "is a file, not a folder")):
        with pytest.raises(UserError, match=reason):
            appending.check_file(tmp_path / name, "sft", "/save")
    with pytest.raises(UserError, match="nothing written"):
        appending.append_rows(tmp_path / "new.jsonl", [row("c"), row(" ")], "sft", "/save")
    assert not (tmp_path / "new.jsonl").exists()


def test_a_full_disk_leaves_no_half_line(tmp_path: Path) -> None:
    code = (
        "import resource, signal, sys; from pathlib import Path\n"
        "from stagecraft.errors import run_main; from stagecraft.talk.appending import append_rows\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # a file may grow to 300 bytes and no further\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (300, 300))\n"
        "talk = [{'from': 'human', 'value': 'q'}, {'from': 'gpt', 'value': 'a' * int(sys.argv[2])}]\n"
        "run_main(lambda: append_rows(Path(sys.argv[1]), [{'conversations': talk}], 'sft', '/save'))"
    )
    path = tmp_path / "saved.jsonl"
    environment = ENVIRONMENT | {"PYTHONPATH": str(ROOT / "python")}
    for letters, status in ((100, 0), (150, 2)):
        done = subprocess.run(
            [sys.executable, "-c", code, str(path), str(letters)],
            env=environment,
            capture_output=True,
            text=True,
        )
        assert done.returncode == status, done.stderr
        assert len(path.read_text().splitlines()) == 1 and path.read_text().endswith("}\n")
    assert done.stderr.startswith(f"/save {path}: can't be written: File too large")


# ---- A terminal


class Terminal:
    """chat.py on a pseudo-terminal of its own."""

    def __init__(self, *flags: str, cwd: Path) -> None:
        self.pid, self._fd = pty.fork()
        if self.pid == 0:  # the child: its terminal is standard input, output and error
            os.chdir(cwd)
            signal.signal(signal.SIGINT, signal.default_int_handler)
            command = [sys.executable, str(ROOT / "python/chat.py"), *flags]
            os.execve(sys.executable, command, ENVIRONMENT)
        self.shown = ""

    def until(self, pattern: str, seconds: float = 90) -> str:
        """Wait for something to be shown after what was waited for before; returns all up to it."""
        last = time.monotonic() + seconds
        while not (found := re.search(pattern, self.shown, re.DOTALL)):
            assert time.monotonic() < last, f"no {pattern!r} in {self.shown!r}"
            if select.select([self._fd], [], [], 0.1)[0]:
                self.shown += self._read()
        text, self.shown = self.shown[: found.end()], self.shown[found.end() :]
        return text

    def _read(self) -> str:
        data = os.read(self._fd, 1 << 16)
        while True:  # a read may end within a character
            try:
                return data.decode().replace("\r\n", "\n")
            except UnicodeDecodeError:
                data += os.read(self._fd, 1)

    def say(self, line: str) -> str:
        """A line, Enter, and what is shown until the next prompt."""
        self.type(f"{line}\n")
        return self.until(r"\n> ")

    def type(self, keys: str) -> None:
        os.write(self._fd, keys.encode())

    def ended(self) -> int:
        """Wait for its end; the exit status."""
        with contextlib.suppress(OSError):
            while select.select([self._fd], [], [], 60)[0]:
                if not os.read(self._fd, 1 << 16):
                    break
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])


def test_a_conversation_on_a_terminal(speaker: Path, tiny_base: Path, tmp_path: Path) -> None:
    chat = Terminal("--model", str(speaker), "--max_new_tokens", "200", cwd=tmp_path)
    assert f"{speaker} on cpu. /help lists the commands" in chat.until("> ")

    assert f"\n{REST}\n" in chat.say(COLD)
    assert f"\n{THEN}\n" in chat.say(MORE)  # known only where it remembers the first exchange
    assert "(saved: row 1 of talk.jsonl)" in chat.say("/save talk.jsonl")
    assert "(history cleared)" in chat.say("/reset")
    assert f"\n{THEN}\n" not in chat.say(MORE)
    assert "(history cleared)" in chat.say("/reset")

    assert "(no command /sav; /help lists them)" in chat.say("/sav")
    assert "/system TEXT" in chat.say("/help") and "(nothing to save" in chat.say("/save talk.jsonl")
    assert "/reset takes no words" in chat.say("/reset now")
    assert "(system message set, history cleared)" in chat.say("/system 请用中文回答。")
    assert REST not in chat.say(COLD)  # it never saw that system message
    assert "ends in .jsonl" in chat.say("/save talk.txt")
    assert "(saved: row 2 of talk.jsonl)" in chat.say("/save talk.jsonl")
    assert "(no system message, history cleared)" in chat.say("/system")

    assert "/model nowhere: no such folder" in chat.say("/model nowhere")
    assert "/model http://127.0.0.1:9/v1: nobody answers there" in chat.say("/model http://127.0.0.1:9/v1")
    assert REST in chat.say(COLD)  # the old model is still there
    assert f"{tiny_base} on cpu; the history goes on" in chat.say(f"/model {tiny_base}")
    assert f"{tiny_base} on cpu; finished stages: none" in chat.say("/model")
    assert THEN not in chat.say(MORE)
    chat.type("/exit\n")
    assert chat.ended() == 0

    rows = [json.loads(line)["conversations"] for line in (tmp_path / "talk.jsonl").read_text().splitlines()]
    assert [turn["value"] for turn in rows[0]] == [COLD, REST, MORE, THEN]
    assert rows[1][0] == {"from": "system", "value": "请用中文回答。"}
    done = subprocess.run(
        [sys.executable, str(ROOT / "python/prepare_data.py"), "check", f"sft={tmp_path / 'talk.jsonl'}"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0 and "2" in done.stdout, done.stdout + done.stderr


def test_ctrl_c_cuts_an_answer_short_and_ctrl_d_ends(tiny_base: Path, tmp_path: Path) -> None:
    endless = teach(tiny_base, tmp_path / "endless", [["hi", "休息，喝水。" * 70]])
    chat = Terminal("--model", str(endless), "--max_new_tokens", "480", cwd=tmp_path)
    chat.until("> ")
    chat.say("/help")
    time.sleep(1)  # a Ctrl-C between the prompt and Python's wait for a key is seen with the next key only
    chat.type("\x03")
    assert "(Ctrl-D or /exit ends)" in chat.until("\n> ")
    chat.type("hi\n")
    chat.until("hi\n休息")  # the first words are there
    began = time.monotonic()
    chat.type("\x03")
    said = chat.until("\n> ")
    assert "(cut short: question and answer are left out of the history)" in said
    assert "(cut off at" not in said and time.monotonic() - began < 10
    assert "(nothing to save: no answer yet)" in chat.say("/save talk.jsonl")
    chat.type("\x1b[A\x1b[A\x01/help \x0b\n")  # line editing: up, up, to the start, words, kill the rest
    assert "/model PLACE" in chat.until("\n> ")
    chat.type("\x04")
    assert chat.ended() == 0
    assert not (tmp_path / "talk.jsonl").exists()


def test_no_control_character_of_an_answer_reaches_the_terminal() -> None:
    from stagecraft.talk.terminal import CONTROLS

    assert "a\x1b[2Jb\x9b1mc\td\n👩‍👧".translate(CONTROLS) == "a\ufffd[2Jb\ufffd1mc\td\n👩‍👧"


# ---- A server


@pytest.fixture(scope="module")
def server(speaker: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """`transformers serve` on the speaker's folder."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    log = tmp_path_factory.mktemp("server") / "log"
    command = [str(Path(sys.executable).with_name("transformers")), "serve", str(speaker)]
    process = subprocess.Popen(
        [*command, "--host", "127.0.0.1", "--port", str(port)],
        env=ENVIRONMENT,
        stdout=log.open("wb"),
        stderr=subprocess.STDOUT,
    )
    try:
        last = time.monotonic() + 180
        while True:
            assert process.poll() is None and time.monotonic() < last, log.read_text()
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
                break
            time.sleep(0.2)
        yield f"http://127.0.0.1:{port}/v1#{speaker}"
    finally:
        process.terminate()
        process.wait(60)


def test_a_server_answers_in_the_same_words_and_pieces(server: str, run_script: Any) -> None:
    place = naming.find(server, "tiny", "--model")
    opened = sources.open_source(place, "auto")
    pieces = list(opened.stream(asked(COLD), 200))
    assert "".join(pieces) == REST and len(pieces) > 5 and not any("\ufffd" in piece for piece in pieces)
    assert ending(opened, asked(COLD), 200) == (REST, sources.WHOLE)
    assert ending(opened, asked(COLD), 5)[1] == sources.LIMIT
    done = run_script("chat.py", "--model", server, input=COLD, env=ENVIRONMENT)
    assert (done.returncode, done.stdout) == (0, f"{REST}\n"), done.stderr


def test_what_a_server_refuses_is_one_line(server: str) -> None:
    url = server.partition("#")[0]
    for place, reason in (
        (f"{url}#other", 'serves no model "other"'),
        (url, "say which: "),
        (url.removesuffix("/v1"), "does the URL end in /v1?"),
    ):
        with pytest.raises(UserError) as told:
            sources.open_source(naming.find(place, "tiny", "--model"), "auto")
        assert reason in str(told.value) and "\n" not in str(told.value)
