"""A server as its clients see it: the official client, many at once, killed ones; and its beginning and end."""

from __future__ import annotations

import json
import os
import signal
import socket
import struct
import subprocess
import urllib.request
from concurrent.futures import ThreadPoolExecutor

import pytest
from servers import ENGINE, QUESTIONS, Kit, Server, free_port, pids, until

STAGES = ["pt", "sft", "dpo"] if ENGINE == "vllm" else ["base", "pt", "sft", "dpo"]  # vLLM: of one base


def test_every_stage_is_listed_by_its_name(shared: Server):
    assert sorted(model.id for model in shared.client().models.list()) == sorted(STAGES)


def test_stages_answer_differently(shared: Server):
    answers = {shared.ask(QUESTIONS[0], stage) for stage in STAGES}
    assert len(answers) == len(STAGES)


def test_the_printed_curl_works(shared: Server):
    [line] = [line.strip() for line in shared.lines if line.strip().startswith("curl ")]
    done = subprocess.run(["bash", "-c", line], check=True, capture_output=True)
    assert json.loads(done.stdout)["choices"][0]["message"]["role"] == "assistant"


@pytest.mark.parametrize("stage", STAGES[-2:])
def test_streaming_gives_the_same_text(shared: Server, stage: str):
    whole = shared.ask(QUESTIONS[1], stage)
    chunks = shared.client().chat.completions.create(
        model=stage,
        messages=[{"role": "user", "content": QUESTIONS[1]}],
        temperature=0,
        max_tokens=8,
        stream=True,
    )
    parts = [choice.delta.content or "" for chunk in chunks for choice in chunk.choices]
    assert len(parts) > 2
    assert "".join(parts).strip() == whole.strip() != ""


def test_64_clients_get_their_own_answers(shared: Server):
    """Each answer is the one that the same prompt gets alone; prompts and models are told apart by their answers."""
    asked = [(question, stage) for question in QUESTIONS for stage in ("sft", "dpo")]
    alone = {one: shared.ask(*one) for one in asked}
    assert len(set(alone.values())) == len(
        QUESTIONS
    )  # the stages' answers are the same ones in another order
    assert all(alone[question, "sft"] != alone[question, "dpo"] for question in QUESTIONS)

    def client(number: int) -> list[tuple[tuple[str, str], str]]:
        mine = [asked[(number + k) % len(asked)] for k in range(10)]
        return [(one, shared.ask(*one)) for one in mine]

    with ThreadPoolExecutor(64) as clients:
        answers = [answer for found in clients.map(client, range(64)) for answer in found]
    assert len(answers) == 640
    assert [one for one, text in answers if text != alone[one]] == []


def test_a_killed_client_harms_nobody(shared: Server):
    """Connections torn down in the middle of a stream, while others ask."""
    alone = shared.ask(QUESTIONS[2], "sft")

    def kill(_: int) -> bool:
        body = {"model": "sft", "stream": True, "max_tokens": 400, "temperature": 0}
        text = json.dumps(body | {"messages": [{"role": "user", "content": QUESTIONS[3]}]}).encode()
        head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(text)}\r\n"
        with socket.create_connection(("127.0.0.1", shared.port)) as client:
            client.sendall(f"{head}Content-Type: application/json\r\n\r\n".encode() + text)
            begun = b"data:" in client.recv(4096) + client.recv(4096)
            client.setsockopt(
                socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0)
            )  # a reset, no goodbye
        return begun

    with ThreadPoolExecutor(12) as clients:
        killed = clients.map(kill, range(6))
        others = [clients.submit(shared.ask, QUESTIONS[2], "sft") for _ in range(12)]
        assert [other.result() for other in others] == [alone] * 12
        assert all(killed)
    assert shared.ask(QUESTIONS[2], "sft") == alone
    with urllib.request.urlopen(f"http://127.0.0.1:{shared.port}/health") as health:
        assert health.status == 200


def test_serve_check_passes_for_what_is_served(shared: Server):
    status, found, errors = shared.kit.check(PORT=str(shared.port), STAGE="dpo")
    assert status == 0, (found, errors)
    assert found["prompts"][0] == found["tokens"][0] == "equal"
    told = (
        "equal" if ENGINE == "vllm" else "-"
    )  # transformers serve tells no log-probabilities, and that is said
    assert found["log-probs"][0] == found["dtype"][0] == told


def test_serve_check_fails_for_another_model(shared: Server):
    status, found, errors = shared.kit.check("--served_name", "sft", PORT=str(shared.port), STAGE="dpo")
    assert status == 1
    assert found["tokens"][0] == "DIFFERS"
    assert "does not answer as its model does" in errors


def test_serve_check_fails_for_another_template(shared: Server, kit: Kit):
    """The same weights, and a folder whose template puts a word more into each prompt."""
    model = kit.folder / "outputs-sft/tiny/model"
    template = model / "chat_template.jinja"
    template.write_text("Hello. " + template.read_text())
    flags = ("--server", shared.url, "--max_prompts", "4")
    status, found, _ = kit.check(*flags, STAGE="sft", DTYPE="float32")
    assert status == 1
    assert found["prompts"][0] == "DIFFERS"


def test_serve_check_tells_what_it_cannot_ask(shared: Server, kit: Kit):
    port = free_port()
    status, _, errors = kit.check(PORT=str(port), STAGE="sft")
    assert status == 2
    assert errors.splitlines() == [
        f"--server http://127.0.0.1:{port}/v1: nobody answers there; start a server (make serve), or mend the address"
    ]
    status, _, errors = kit.check("--served_name", "nobody", PORT=str(shared.port), STAGE="sft")
    assert status == 2
    assert 'serves no model "nobody"' in errors


def test_ctrl_c_and_sigterm_leave_nobody(kit: Kit):
    """One after the other on one port: each start works although the last server has only just ended."""
    port = str(free_port())
    for number, wanted in ((signal.SIGINT, 0), (signal.SIGTERM, 143)):
        server = Server(kit, PORT=port, STAGE="sft")
        assert server.engines()
        assert server.ask(QUESTIONS[0], "sft")
        status, seconds = server.end(number)
        assert status == wanted
        assert seconds < 10
        assert server.engines() == []
        assert not (kit.folder / f"outputs-serve/tiny/serve-{port}.json").exists()


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 0), (signal.SIGKILL, -9)])
def test_a_start_that_is_cut_short_leaves_nobody(kit: Kit, number: int, status: int):
    server = Server(kit, wait=False)
    server.wait_for("serving dpo with")
    assert until(lambda: bool(server.engines()))
    assert server.end(number)[0] == status
    assert until(lambda: not server.engines())


@pytest.mark.long
@pytest.mark.skipif(ENGINE != "vllm", reason="vLLM alone knows a key")
def test_a_key_guards_every_path_and_shows_nowhere(kit: Kit):
    secret = "sesame-7351"
    server = Server(kit, STAGE="sft", API_KEY=secret, HOST="0.0.0.0")
    try:
        assert server.ask(QUESTIONS[0], "sft")
        body = json.dumps({"model": "sft", "messages": [{"role": "user", "content": "x"}]}).encode()
        for path, data in (
            ("/v1/models", None),
            ("/invocations", body),
            ("/tokenize", body),
            ("/metrics", None),
        ):
            request = urllib.request.Request(
                f"http://127.0.0.1:{server.port}{path}", data, {"Content-Type": "application/json"}
            )
            with pytest.raises(urllib.error.HTTPError) as refusal:
                urllib.request.urlopen(request)
            assert refusal.value.code == 401, path
        lines = b"".join(_command_of(pid) for pid in pids())
        assert str(server.port).encode() in lines
        assert secret.encode() not in lines
        written = [f for f in kit.folder.glob("outputs-serve/tiny/*") if f.is_file()]
        assert server.log in written
        assert [file for file in written if secret in file.read_text(errors="replace")] == []
        assert secret not in "\n".join(server.lines)
    finally:
        server.end()


def _command_of(pid: int) -> bytes:
    try:
        with open(f"/proc/{pid}/cmdline", "rb") as stream:
            return stream.read()
    except OSError:  # it ended meanwhile
        return b""


@pytest.mark.long
@pytest.mark.skipif(ENGINE != "vllm", reason="needs log-probabilities")
def test_serve_check_knows_the_dtype(kit: Kit):
    """bfloat16 passes as bfloat16 for every stage, and as nothing else; float32 does not pass as bfloat16."""
    server = Server(kit, STAGE="all", DTYPE="bfloat16")
    try:
        for stage in STAGES:
            status, found, errors = kit.check(PORT=str(server.port), STAGE=stage)
            assert status == 0, (stage, found, errors)
        status, found, _ = kit.check(PORT=str(server.port), STAGE="dpo", DTYPE="float32")
        assert (status, found["log-probs"][0]) == (1, "DIFFERS")
    finally:
        server.end()


@pytest.mark.long
@pytest.mark.skipif(ENGINE != "vllm", reason="needs log-probabilities")
def test_serve_check_finds_float32_where_bfloat16_is_wanted(shared: Server):
    status, found, _ = shared.kit.check(PORT=str(shared.port), STAGE="sft", DTYPE="bfloat16")
    assert (status, found["dtype"][0]) == (1, "DIFFERS")
    assert shared.kit.check(PORT=str(shared.port), STAGE="all")[0] == 0


def test_the_tests_use_the_engine_that_was_asked_for(shared: Server):
    [line] = [line for line in shared.lines if line.startswith("serving ")]
    assert f"with {ENGINE}" in line
    assert os.path.getsize(shared.log) > 0
