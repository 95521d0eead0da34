"""The command and the environment of an engine: vLLM, or transformers serve."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

from stagecraft.errors import UserError
from stagecraft.merging.folder import template_of
from stagecraft.serving.chain import Chain
from stagecraft.serving.choice import Served, dtype_of, positions
from stagecraft.serving.settings import DEFAULT_LENGTH, Settings

PYTHON_FOLDER = Path(__file__).resolve().parents[2]


@dataclass
class Engine:
    """What to start, what it serves by which name, and what a user should know of it."""

    command: list[str]
    environment: dict[str, str]
    models: list[Served]
    notes: list[str]
    dtype: str


def max_length(settings: Settings, models: list[Served]) -> int:
    """Tokens of prompt and answer: MAX_MODEL_LEN, or as many of DEFAULT_LENGTH as the model can hold."""
    held = [found for model in models if (found := positions(model.folder))]
    return settings.length or min([DEFAULT_LENGTH, *held])


def check_length(settings: Settings, models: list[Served]) -> list[str]:
    """A fault where MAX_MODEL_LEN is above what a model was built for."""
    return [
        f"MAX_MODEL_LEN={settings.length}: {model.folder} holds {held} tokens; set it to {held} or less"
        for model in models
        if settings.length and (held := positions(model.folder)) and settings.length > held
    ]


def vllm(settings: Settings, models: list[Served], chain: Chain | None) -> Engine:
    """One model, or with a chain its base and the stages as LoRA modules."""
    base = chain.base if chain else models[0]
    # vLLM's own auto makes bfloat16 of float32.
    dtype = dtype_of(base.folder) if settings.dtype == "auto" else settings.dtype
    command = [str(settings.program), "serve", str(base.folder), "--served-model-name", base.name]
    command += ["--host", settings.host, "--port", str(settings.port), "--dtype", dtype]
    command += ["--max-model-len", str(max_length(settings, [base]))]
    environment = {"VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1"}
    if settings.on_cpu:
        environment["VLLM_CPU_KVCACHE_SPACE"] = os.environ.get("VLLM_CPU_KVCACHE_SPACE", "1")  # GB
    else:
        command += ["--gpu-memory-utilization", settings.share]
    notes = []
    served = [base]
    if chain and chain.modules:
        served += [module.served for module in chain.modules]
        command += [
            "--enable-lora",
            "--max-lora-rank",
            str(chain.limit),
            "--max-loras",
            str(len(chain.modules)),
        ]
        command += ["--lora-modules"]
        command += [
            f"{module.served.name}={settings.folder / module.served.name}" for module in chain.modules
        ]
        command += _words_of(chain.modules[-1].served)
        notes += _base_note(chain)
    if chain and chain.left_out:
        notes.append(
            f"{', '.join(chain.left_out)}: other weights than {base.name}'s, which one process can't have beside them; "
            f"STAGE={chain.left_out[-1]} serves it"
        )
    if settings.api_key:  # flags would show in the list of processes
        environment["VLLM_API_KEY"] = settings.api_key
        environment["PYTHONPATH"] = os.pathsep.join(
            filter(None, [str(PYTHON_FOLDER), os.environ.get("PYTHONPATH")])
        )
        command += ["--middleware", "stagecraft.serving.guard.Guard"]
    return Engine([*command, *settings.flags], environment, served, notes, dtype)


def _words_of(last: Served) -> list[str]:
    """Template, tokenizer and stop tokens of the newest stage: vLLM takes the base's for its modules otherwise."""
    words = ["--tokenizer", str(last.folder), "--generation-config", str(last.folder)]
    template = last.folder / "chat_template.jinja"
    return [*words, "--chat-template", str(template)] if template.exists() else words


def _base_note(chain: Chain) -> list[str]:
    last = chain.modules[-1].served
    if template_of(chain.base.folder) == template_of(last.folder):
        return []
    return [
        f"{chain.base.name}: asked with {last.name}'s chat template and stop tokens, as vLLM knows one for all; "
        f"STAGE={chain.base.name} serves it with its own"
    ]


def check_words(chain: Chain) -> list[str]:
    """Faults where stages of one process would need different templates, tokenizers or stop tokens."""
    last = chain.modules[-1].served if chain.modules else None
    faults = []
    for module in chain.modules[:-1]:
        folder = module.served.folder
        differing = [
            what
            for what, found in (
                ("chat template", [template_of(f) for f in (folder, last.folder)]),
                ("tokenizer", [_bytes(f / "tokenizer.json") for f in (folder, last.folder)]),
                ("stop tokens", [stop_tokens(f) for f in (folder, last.folder)]),
            )
            if found[0] != found[1]
        ]
        if differing:
            faults.append(
                f"STAGE=all: {module.served.name} has another {' and '.join(differing)} than {last.name}, and vLLM knows one "
                f"for all; STAGE={module.served.name} serves it alone"
            )
    if last and _bytes(chain.base.folder / "tokenizer.json") != _bytes(last.folder / "tokenizer.json"):
        faults.append(
            f"STAGE=all: {chain.base.name} has another tokenizer than {last.name}, and vLLM knows one for all; "
            f"STAGE={last.name} serves it merged"
        )
    return faults


def _bytes(file: Path) -> bytes:
    return file.read_bytes() if file.exists() else b""


def stop_tokens(folder: Path) -> list[int]:
    """The ids that end an answer, as the folder says."""
    for name in ("generation_config.json", "config.json"):
        try:
            found = json.loads((folder / name).read_text(encoding="utf-8")).get("eos_token_id")
        except (OSError, ValueError, AttributeError):
            continue
        if found is not None:
            return sorted(found if isinstance(found, list) else [found])
    return []


def transformers(settings: Settings, models: list[Served]) -> Engine:
    """One model from the start, or several, each loaded when it is first asked for.

    It knows models by folder or by their name on the hub. A cache of the hub with links in it, and no way to the real
    one, gives them short names, and /v1/models lists these and nothing else.
    """
    hub = settings.folder / f"hub-{settings.port}"
    _link(hub, models)
    command = [str(settings.program), "serve", *([models[0].name] if len(models) == 1 else [])]
    command += ["--host", settings.host, "--port", str(settings.port), "--dtype", settings.dtype]
    if len(models) > 1:
        command += [
            "--model-timeout",
            "-1",
        ]  # else a model goes after 300 s, in the middle of an answer if need be
    environment = {"HF_HUB_CACHE": str(hub.absolute()), "HF_HUB_OFFLINE": "1"}
    notes = []
    if len(models) > 1:
        notes.append("transformers serve keeps every model in memory as a whole; vLLM would share the base")
    return Engine([*command, *settings.flags], environment, models, notes, settings.dtype)


def _link(hub: Path, models: list[Served]) -> None:
    """The layout of huggingface_hub's cache: refs/main names the snapshot, and that holds links to the files."""
    try:
        shutil.rmtree(hub, ignore_errors=True)
        for model in models:
            place = hub / f"models--{model.name}"
            for name in ("refs", "blobs", "snapshots/local"):
                (place / name).mkdir(parents=True)
            (place / "refs" / "main").write_text("local")
            for file in model.folder.absolute().iterdir():
                if file.is_file():
                    (place / "snapshots" / "local" / file.name).symlink_to(file.resolve())
    except OSError as error:
        raise UserError(f"{hub}: can't be written: {error.strerror or error}") from None
