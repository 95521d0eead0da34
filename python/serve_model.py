"""Serve a model, or every stage of a recipe, behind an OpenAI-compatible API; scripts/serve.sh has the variables.

    RECIPE=tiny STAGE=all python python/serve_model.py [FLAG ...]          flags of the engine

Everything that can be known beforehand is checked before the engine starts. Ctrl-C ends it, with status 0.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from stagecraft import files
from stagecraft.errors import UserError, run_main
from stagecraft.processes import in_the_foreground
from stagecraft.serving import engines
from stagecraft.serving.chain import Chain, find_chain
from stagecraft.serving.choice import Served, choose
from stagecraft.serving.running import ask_once, require_life, started, wait_until_up
from stagecraft.serving.settings import Settings, read_settings


def main() -> None:
    if {"-h", "--help"} & set(sys.argv[1:]):
        print(__doc__.strip())
        return
    settings = read_settings(os.environ, sys.argv[1:], sys.executable)
    models, chain = check(settings)
    if chain:
        make_adapters(chain, settings)
    if settings.engine == "vllm":
        engine = engines.vllm(settings, models, chain)
    else:
        engine = engines.transformers(settings, models)
    with in_the_foreground():
        for number in (signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, lambda number, _: sys.exit(128 + number))
        serve(settings, engine)


def check(settings: Settings) -> tuple[list[Served], Chain | None]:
    """What will be served. Raises UserError with every fault of variables and models."""
    faults = settings.faults
    before = len(faults)
    models = choose(settings.recipe, settings.stage, settings.model, faults)
    chain = None
    if len(faults) == before:
        if settings.engine == "vllm" and settings.stage == "all":
            chain = find_chain(models, faults)
            faults += engines.check_words(chain) if chain else []
        faults += engines.check_length(settings, [chain.base] if chain else models)
    if faults:
        raise UserError(*faults)
    return models, chain


def make_adapters(chain: Chain, settings: Settings) -> None:
    """One adapter of the common base for each stage, unless it is there."""
    from stagecraft.serving.composing import compose

    for module in chain.modules:
        began = time.monotonic()
        if compose(chain, module, settings.folder / module.served.name):
            parts = " + ".join(str(adapter.folder) for adapter in module.adapters)
            print(
                f"{settings.folder / module.served.name}: {parts} as one adapter of {chain.base.name}, rank {module.rank}, "
                f"equal to the merged model within its rounding; {time.monotonic() - began:.1f} s",
                flush=True,
            )


def serve(settings: Settings, engine: engines.Engine) -> None:
    """Start, wait, ask each model once, say how to ask, and stay until the engine or the user ends it."""
    log = settings.folder / f"serve-{settings.port}.log"
    names = ", ".join(model.name for model in engine.models)
    kind = " on the CPU" if settings.engine == "vllm" and settings.on_cpu else ""
    print(f"serving {names} with {settings.engine}{kind}; log: {log}", flush=True)
    for note in engine.notes:
        print(f"note: {note}", flush=True)
    with started(engine, log) as process, state(settings, engine, process.pid):
        seconds = wait_until_up(process, settings.address, log)
        for model in engine.models:
            ask_once(settings.address, model.name, settings.api_key, log)
        tell(settings, engine, seconds)
        while True:
            require_life(process, log)
            time.sleep(0.5)


def tell(settings: Settings, engine: engines.Engine, seconds: float) -> None:
    """How to ask it: a command that works as it stands, and what the openai client wants."""
    bearer = ' -H "Authorization: Bearer $API_KEY"' if settings.api_key else ""
    body = {
        "model": engine.models[-1].name,
        "temperature": 0,
        "messages": [{"role": "user", "content": "Hello"}],
    }
    print(f"up after {seconds:.0f} s, every model asked once; Ctrl-C ends it\n")
    print(
        f"  curl {settings.address}/v1/chat/completions -H 'Content-Type: application/json'{bearer} "
        f"-d '{json.dumps(body)}'\n"
    )
    key = 'os.environ["API_KEY"]' if settings.api_key else '"none"'
    print(f'  openai.OpenAI(base_url="{settings.address}/v1", api_key={key})')
    print(f"  model: {', '.join(model.name for model in engine.models)}", flush=True)


@contextlib.contextmanager
def state(settings: Settings, engine: engines.Engine, pid: int) -> Iterator[None]:
    """What is served there, for make serve-check, as long as it is."""
    path = Path(settings.folder) / f"serve-{settings.port}.json"
    models = {model.name: str(model.folder) for model in engine.models}
    said = {"pid": pid, "url": f"{settings.address}/v1", "engine": settings.engine, "dtype": engine.dtype}
    files.write_json(path, {**said, "models": models})
    try:
        yield
    finally:
        path.unlink(missing_ok=True)


if __name__ == "__main__":
    run_main(main)
