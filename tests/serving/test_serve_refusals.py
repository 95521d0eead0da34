"""What make serve refuses before anything starts, each in one line; and what it starts engines with."""

from __future__ import annotations

import json
import os
import shutil
import socket
from pathlib import Path

import pytest
from servers import Kit, Server, free_port

from adapters import make_adapter
from stagecraft.serving import engines
from stagecraft.serving.choice import Served, name_of
from stagecraft.serving.settings import read_settings

pytestmark = pytest.mark.filterwarnings("ignore")
ECHO = """#!/usr/bin/env bash
echo "${0##*/}: $*"
env | grep -E '^(CUDA_V|VLLM_[A-U]|HF_HUB_O)' | sort
"""


def program(kit: Kit, name: str, text: str) -> None:
    path = kit.folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)


REFUSED = [
    ({"PORT": "0"}, 'PORT="0": must be a port, 1 to 65535'),
    ({"PORT": "65536"}, 'PORT="65536": must be a port, 1 to 65535'),
    ({"PORT": "http"}, 'PORT="http": must be a port, 1 to 65535'),
    ({"ENGINE": "tgi"}, "ENGINE=tgi: must be vllm or transformers"),
    ({"DTYPE": "int4"}, 'DTYPE="int4": must be one of auto, bfloat16, float16, half, float32, float'),
    ({"STAGE": "sfft"}, "STAGE=sfft: must be all, base, pt, sft, dpo or ppo"),
    ({"STAGE": "rm"}, "STAGE=rm: a reward model scores answers and gives none; serve another stage"),
    (
        {"STAGE": "ppo"},
        "STAGE=ppo RECIPE=tiny: not finished (no outputs-ppo/tiny/DONE)",
    ),
    ({"STAGE": "sft", "MODEL": "x"}, "STAGE=sft and MODEL=x: say one of them"),
    (
        {"RECIPE": "mine"},
        "RECIPE=mine: no finished model yet; run: make sft RECIPE=mine, or name a model: MODEL=FOLDER",
    ),
    (
        {"MODEL": "outputs-sft/tiny/adapter"},
        "MODEL=outputs-sft/tiny/adapter: a LoRA adapter, no complete model; STAGE=sft serves it merged, STAGE=all on its base",
    ),
    (
        {"HOST": "0.0.0.0", "ENGINE": "transformers"},
        "HOST=0.0.0.0: transformers serve knows no API key, so it listens on 127.0.0.1; serve on vLLM",
    ),
    (
        {"API_KEY": "x", "ENGINE": "transformers"},
        "API_KEY: transformers serve knows no API key; leave it out, or serve on vLLM",
    ),
    (
        {"MAX_MODEL_LEN": "512", "ENGINE": "transformers"},
        "MAX_MODEL_LEN: transformers serve has no such limit; leave it out, or serve on vLLM",
    ),
]


@pytest.mark.parametrize(("variables", "line"), REFUSED)
def test_one_line_and_status_2(kit: Kit, variables: dict[str, str], line: str):
    assert kit.refuse(**variables) == [line]


def test_a_missing_model_and_one_without_a_template(kit: Kit):
    [line] = kit.refuse(MODEL="nowhere")
    assert line.startswith("MODEL=nowhere: no such folder; ")
    folder = kit.folder / "outputs-sft/tiny/model"
    (folder / "chat_template.jinja").unlink()
    for variables in ({"MODEL": str(folder)}, {"STAGE": "sft"}):
        [line] = kit.refuse(**variables)
        assert "its tokenizer has no chat template" in line


def test_any_adapter_is_told_how_it_is_merged(kit: Kit):
    shutil.copytree(kit.folder / "outputs-sft/tiny/adapter", kit.folder / "mine")
    base = json.loads((kit.folder / "mine/adapter_config.json").read_text())["base_model_name_or_path"]
    assert kit.refuse(MODEL="mine") == [
        f"MODEL=mine: a LoRA adapter, no complete model; merge it into {base} first: scripts/merge_lora.sh {base} mine "
        "FOLDER, then MODEL=FOLDER"
    ]


def test_a_taken_port_and_a_foreign_address(kit: Kit):
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = str(server.getsockname()[1])
        taken = f"PORT={port}: taken on 127.0.0.1; stop what listens there, or choose another"
        assert kit.refuse(PORT=port) == [taken]
    [line] = kit.refuse(HOST="192.0.2.1", API_KEY="x", **vllm(kit))
    assert (
        line
        == "HOST=192.0.2.1: can't listen there (Cannot assign requested address); it must be this machine's"
    )


def vllm(kit: Kit) -> dict[str, str]:
    """A folder that looks like vLLM's CPU build."""
    program(kit, "cpu/bin/vllm", ECHO)
    return {"ENGINE": "vllm", "VLLM_VENV": str(kit.folder / "cpu")}


def test_faults_are_told_together(kit: Kit):
    lines = kit.refuse(
        "--api-key",
        "x",
        PORT="0",
        GPU_SHARE="1.5",
        MAX_MODEL_LEN="many",
        STAGE="x",
        HOST="0.0.0.0",
        **vllm(kit),
    )
    assert [line.split(":")[0] for line in lines] == [
        'PORT="0"',
        'MAX_MODEL_LEN="many"',
        'GPU_SHARE="1.5"',
        "--api-key",
        "HOST=0.0.0.0",
        "STAGE=x",
    ]


def test_more_tokens_than_the_model_holds(kit: Kit):
    assert kit.refuse(MAX_MODEL_LEN="4096", STAGE="sft", **vllm(kit)) == [
        "MAX_MODEL_LEN=4096: outputs-sft/tiny/model holds 512 tokens; set it to 512 or less"
    ]


def test_an_engine_that_is_not_installed(kit: Kit):
    [line] = kit.refuse(ENGINE="vllm", VLLM_VENV="nowhere")
    assert line.startswith("ENGINE=vllm: ")
    assert "nowhere/bin/vllm" in line
    assert "scripts/setup_vllm_cpu.sh" in line


def test_stage_all_refuses_an_adapter_of_another_base(kit: Kit):
    """The sft model was made again after dpo was trained on it."""
    sft = kit.folder / "outputs-sft/tiny"
    make_adapter(kit.folder / "outputs-pt/tiny/model", sft / "adapter", seed=9, r=4)
    shutil.copytree(kit.folder / "outputs-pt/tiny/model", sft / "model", dirs_exist_ok=True)
    [line] = kit.refuse(STAGE="all", **vllm(kit))
    assert line.startswith("STAGE=all: outputs-dpo/tiny/adapter: was trained on another base (")
    assert line.endswith("run: make dpo, or STAGE=dpo serves its merged model alone")


def test_stage_all_refuses_what_lora_modules_cannot_be(kit: Kit):
    pt = kit.folder / "outputs-pt/tiny/model"
    dpo = kit.folder / "outputs-dpo/tiny"
    parent = (dpo / "adapter/lineage.json").read_bytes()
    for settings, words in (
        ({"use_dora": True}, "is DoRA, which is no sum of base and change"),
        ({"modules_to_save": ["lm_head"]}, "brings lm_head.weight whole (modules_to_save or bias)"),
        ({"r": 600}, "LoRA rank 604 (all adapters since pt) is above vLLM's limit of 512"),
        ({"target_modules": ["q_proj", "embed_tokens"]}, "embeddings can't be LoRA in vLLM"),
    ):
        shutil.rmtree(dpo / "adapter")
        make_adapter(pt, dpo / "adapter", **settings)
        (dpo / "adapter/lineage.json").write_bytes(parent)
        lines = kit.refuse(STAGE="all", **vllm(kit))
        assert any(words in line and "STAGE=dpo serves its merged model alone" in line for line in lines), (
            lines
        )


# ---- What engines are started with; the programs that echo end at once, and their words are in the log


def echoed(kit: Kit, *words: str, **variables: str) -> tuple[list[str], Server]:
    server = Server(kit, *words, wait=False, **variables)
    server.lines = server.process.communicate()[0].splitlines()
    assert server.process.returncode == 1
    assert f"all of them in outputs-serve/tiny/serve-{server.port}.log" in server.lines[-1]
    return server.log.read_text().replace(str(server.port), "PORT").splitlines(), server


def test_with_cuda_it_is_vllm_with_the_guides_settings(kit: Kit, monkeypatch: pytest.MonkeyPatch):
    for name in ("bin/vllm", "bin/transformers"):
        program(kit, f"gpu/{name}", ECHO)
    program(kit, "gpu/path/nvidia-smi", "#!/usr/bin/env bash\necho 'GPU 0: NVIDIA H100 (UUID: GPU-0)'\n")
    monkeypatch.setenv("PATH", f"{kit.folder}/gpu/path:{os.environ['PATH']}")
    variables = {"PORT": str(free_port()), "API_KEY": "hush", "HOST": "0.0.0.0"}
    settings = read_settings(variables, ["--seed", "1"], str(kit.folder / "gpu/bin/python"))
    assert settings.faults == []
    engine = engines.vllm(settings, [Served("sft", kit.folder / "outputs-sft/tiny/model")], None)
    assert " ".join(engine.command).replace(str(kit.folder), "KIT").replace(variables["PORT"], "PORT") == (
        "KIT/gpu/bin/vllm serve KIT/outputs-sft/tiny/model --served-model-name sft --host 0.0.0.0 --port PORT "
        "--dtype bfloat16 --max-model-len 512 --gpu-memory-utilization 0.9 "
        "--middleware stagecraft.serving.guard.Guard --seed 1"
    )
    assert engine.environment["VLLM_API_KEY"] == "hush"
    monkeypatch.setenv("PATH", str(kit.folder))  # the same without a card
    assert read_settings({}, [], str(kit.folder / "gpu/bin/python")).engine == "transformers"


def test_stage_all_on_vllm_is_one_base_and_modules(kit: Kit):
    lines, server = echoed(kit, STAGE="all", GPUS="0", **vllm(kit))
    assert lines[0] == (
        "vllm: serve outputs-pt/tiny/model --served-model-name pt --host 127.0.0.1 --port PORT --dtype float32 "
        "--max-model-len 512 --enable-lora --max-lora-rank 16 --max-loras 2 "
        "--lora-modules sft=outputs-serve/tiny/sft dpo=outputs-serve/tiny/dpo --tokenizer outputs-dpo/tiny/model "
        "--generation-config outputs-dpo/tiny/model --chat-template outputs-dpo/tiny/model/chat_template.jinja"
    )
    assert lines[1] == "CUDA_VISIBLE_DEVICES=0"
    assert any(line.startswith("note: base: other weights than pt's") for line in server.lines)


def test_one_model_is_called_by_its_stage_or_folder(kit: Kit):
    lines, _ = echoed(kit, "--seed", "1", DTYPE="bfloat16", MAX_MODEL_LEN="128", **vllm(kit))
    assert lines[0] == (
        "vllm: serve outputs-dpo/tiny/model --served-model-name dpo --host 127.0.0.1 --port PORT --dtype bfloat16 "
        "--max-model-len 128 --seed 1"
    )
    shutil.copytree(kit.folder / "outputs-sft/tiny/model", kit.folder / "my model, 2nd")
    lines, _ = echoed(kit, MODEL="my model, 2nd", **vllm(kit))
    assert "--served-model-name my-model-2nd " in lines[0]
    names = {
        "qwen2.5-3b": "qwen2.5-3b",
        "x/outputs-sft/r/model": "sft",
        "runs/try_2/model": "try_2",
        "/": "model",
    }
    assert {path: name_of(Path(path)) for path in names} == names


def test_an_engine_that_dies_shows_its_last_lines(kit: Kit):
    program(kit, "cpu/bin/vllm", "#!/usr/bin/env bash\necho out of luck\nexit 3\n")
    server = Server(kit, wait=False, ENGINE="vllm", VLLM_VENV=str(kit.folder / "cpu"), PORT=str(free_port()))
    lines = server.process.communicate()[0].splitlines()
    assert server.process.returncode == 1
    assert "  out of luck" in lines
    assert "the engine ended with status 3" in lines[-1]
