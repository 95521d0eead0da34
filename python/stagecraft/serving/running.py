"""A server's life: started, waited for, asked once, stopped with everything it started."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tqdm import tqdm

from stagecraft.errors import Stopped
from stagecraft.processes import die_with_parent
from stagecraft.serving.engines import Engine

LAST_LINES = 15  # of the log, shown when the engine dies
GRACE = 6.0  # seconds to end by itself; answers that are being written then are cut off
PAUSE = 0.25
TOLD_EVERY = 15.0  # seconds between two lines where there is no terminal


@contextlib.contextmanager
def started(engine: Engine, log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """The engine in a session of its own; when the block ends, however it ends, nothing of it is left."""
    log.parent.mkdir(parents=True, exist_ok=True)
    parent = os.getpid()
    with log.open("wb") as stream:
        process = subprocess.Popen(
            engine.command,
            stdin=subprocess.DEVNULL,
            stdout=stream,
            stderr=subprocess.STDOUT,
            env={**_inherited(), **engine.environment},
            start_new_session=True,
            preexec_fn=lambda: _follow(parent),
        )
    try:
        yield process
    finally:
        stop(process)


def _follow(parent: int) -> None:
    """In the child: end with the parent, even where that was killed before it could be said."""
    die_with_parent(signal.SIGTERM)
    if os.getppid() != parent:
        os._exit(1)


def _inherited() -> dict[str, str]:
    """Our environment without API_KEY: the engine gets it by the one name that it reads."""
    return {name: value for name, value in os.environ.items() if name != "API_KEY"}


def stop(process: subprocess.Popen[bytes]) -> None:
    """End the engine and all that it started: asked first, then killed."""
    for number in (signal.SIGINT, signal.SIGTERM):  # a second Ctrl-C must not leave half of it
        signal.signal(number, signal.SIG_IGN)
    _tell_group(process, signal.SIGTERM)
    deadline = time.monotonic() + GRACE
    while time.monotonic() < deadline and _group_lives(process):
        time.sleep(0.05)
    _tell_group(process, signal.SIGKILL)
    process.wait()


def _group_lives(process: subprocess.Popen[bytes]) -> bool:
    process.poll()
    try:
        os.killpg(process.pid, 0)
    except ProcessLookupError:
        return False
    return True


def _tell_group(process: subprocess.Popen[bytes], number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, number)


def wait_until_up(process: subprocess.Popen[bytes], address: str, log: Path) -> float:
    """Seconds until /health answers, with the time shown meanwhile. Raises Stopped where the engine dies."""
    began = told = time.monotonic()
    with tqdm(desc="starting", bar_format="{desc} {elapsed}", disable=None, leave=False) as bar:
        while not _is_healthy(address):
            require_life(process, log)
            time.sleep(PAUSE)
            bar.refresh()
            if bar.disable and time.monotonic() - told > TOLD_EVERY:
                told = time.monotonic()
                print(f"still starting, {told - began:.0f} s", flush=True)
    require_life(process, log)  # not the health of somebody else's server
    return time.monotonic() - began


def _is_healthy(address: str) -> bool:
    try:
        with urllib.request.urlopen(f"{address}/health", timeout=5) as answer:
            return answer.status == 200
    except (OSError, ValueError):
        return False


def require_life(process: subprocess.Popen[bytes], log: Path) -> None:
    """Raises Stopped with the log's last lines where the engine has ended."""
    if process.poll() is None:
        return
    with contextlib.suppress(OSError):
        lines = log.read_text(encoding="utf-8", errors="replace").splitlines()[-LAST_LINES:]
        print("\n".join(f"  {line}" for line in lines), file=sys.stderr)
    raise Stopped(
        f"the engine ended with status {process.returncode}; its last lines are above, all of them in {log}"
    )


def ask_once(address: str, model: str, key: str, log: Path) -> None:
    """One token from a model, so that what is announced is known to work. Raises Stopped where it does not."""
    body: dict[str, Any] = {
        "model": model,
        "max_tokens": 1,
        "messages": [{"role": "user", "content": "Hello"}],
    }
    headers = {"Content-Type": "application/json", **({"Authorization": f"Bearer {key}"} if key else {})}
    request = urllib.request.Request(
        f"{address}/v1/chat/completions", data=json.dumps(body).encode(), headers=headers
    )
    try:
        with urllib.request.urlopen(request, timeout=600) as answer:
            json.load(answer)["choices"][0]["message"]
    except urllib.error.HTTPError as error:
        reason = error.read().decode(errors="replace").strip()[:300]
        raise Stopped(
            f"{model}: the server is up but refuses a first question ({error.code} {reason}); see {log}"
        ) from None
    except (OSError, ValueError, KeyError, IndexError) as error:
        raise Stopped(
            f"{model}: the server is up but does not answer a first question ({error}); see {log}"
        ) from None
