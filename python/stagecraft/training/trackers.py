"""wandb and swanlab behind --report_to: they follow a run where they can, and never stop, delay or ask it anything.

Without a login, or where the server does not answer, a run is kept on the disk; a line says where, and how to upload
it. Neither library is told the command line, the machine or the console: secrets may stand there. A version that does
not know the settings for that follows nothing.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stagecraft.errors import UserError
from stagecraft.files import write_json

if TYPE_CHECKING:
    from transformers import Trainer

PACKAGES = ("wandb", "swanlab")
MODES = {"wandb": ("online", "offline", "disabled"), "swanlab": ("cloud", "local", "offline", "disabled")}
PROJECT = "stagecraft"
RUNS = "trackers.json"  # in checkpoints/: the ids of the runs to go on with
PATIENCE = 3.0  # seconds for a server's answer


def asked_for(report_to: Any) -> list[str]:
    """Those of wandb and swanlab that --report_to names."""
    words = [report_to] if isinstance(report_to, str) else report_to or []
    return [name for name in PACKAGES if name in words]


def require(report_to: Any) -> None:
    """Raises UserError where --report_to names a package that is not installed, or its mode is none. Imports nothing."""
    faults = []
    for name in asked_for(report_to):
        if importlib.util.find_spec(name) is None:
            faults.append(
                f"--report_to {name}: the package is not installed; run: make setup, or pip install {name}"
            )
        variable = f"{name.upper()}_MODE"
        mode = os.environ.get(variable)
        if mode == "":
            del os.environ[variable]  # swanlab refuses an empty one
        elif mode is not None and mode not in MODES[name]:
            faults.append(f'{variable}="{mode}": must be one of {", ".join(MODES[name])}, or not set')
    if faults:
        raise UserError(*faults)


def follow(trainer: Trainer, name: str, logs: Path, checkpoints: Path, resumes: bool) -> None:
    """Open a run called `name` in every tracker that the trainer reports to; call in the first process only.

    `resumes`: from a checkpoint, so that a tracker that was following goes on with its run.
    """
    known = _read(checkpoints / RUNS) if resumes else {}
    for tracker in asked_for(trainer.args.report_to):
        ident = known.setdefault(tracker, uuid.uuid4().hex[:21])  # swanlab wants 21 letters or digits
        begin, end = {"wandb": (_begin_wandb, _end_wandb), "swanlab": (_begin_swanlab, _end_swanlab)}[tracker]
        callback = next(
            each
            for each in trainer.callback_handler.callbacks
            if type(each).__name__.lower() == f"{tracker}callback"
        )
        guard = _Guard(tracker, callback)
        with guard:
            print(f"{tracker}: {begin(name, ident, logs, resumes)}", flush=True)
            guard.ends_with(end)
    if known:
        write_json(checkpoints / RUNS, known)


class _Guard:
    """Around a tracker: its errors are told in a line, once, and it is left alone from then on."""

    def __init__(self, tracker: str, callback: Any) -> None:
        self.tracker, self.callback = tracker, callback
        for event in [event for event in dir(callback) if event.startswith("on_")]:
            setattr(callback, event, self._guarded(getattr(callback, event)))

    def ends_with(self, end: Callable[[], None]) -> None:
        """Close the run when training ends, not when the process does."""
        before = self.callback.on_train_end

        def on_train_end(*words: Any, **named: Any) -> None:
            before(*words, **named)
            with self:
                end()

        self.callback.on_train_end = on_train_end

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> bool:
        if not isinstance(error, Exception):
            return False
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        print(f"{self.tracker}: no longer follows this run ({reason}); the training goes on", flush=True)
        for event in [event for event in dir(self.callback) if event.startswith("on_")]:
            setattr(self.callback, event, lambda *words, **named: None)
        return True

    def _guarded(self, method: Callable[..., Any]) -> Callable[..., None]:
        def call(*words: Any, **named: Any) -> None:
            with self:
                method(*words, **named)

        return call


def _begin_wandb(name: str, ident: str, logs: Path, resumes: bool) -> str:
    import wandb

    server = os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")
    mode, why = _mode(
        "WANDB_MODE", "online", server, bool(os.environ.get("WANDB_API_KEY")) or _has_netrc(server)
    )
    folder = logs.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    quiet = {
        "silent": True,
        "console": "off",
        "x_disable_meta": True,
        "x_disable_stats": True,
        "x_disable_machine_info": True,
    }
    quiet |= {"disable_git": True, "x_save_requirements": False, "disable_code": True, "init_timeout": 30.0}
    run = wandb.init(
        project=os.environ.get("WANDB_PROJECT", PROJECT),
        name=name,
        id=ident,
        resume="allow" if resumes and mode == "online" else None,
        dir=str(folder),
        mode=mode,
        settings=_settings(wandb.Settings, quiet),
    )
    if mode == "online":
        return f"{name} at {run.url}"
    kept = Path(run.dir).parent
    return f"{name} is kept in {_short(kept)} ({why}); upload it with: wandb sync {_short(kept)}"


def _end_wandb() -> None:
    import wandb

    wandb.finish()


def _begin_swanlab(name: str, ident: str, logs: Path, resumes: bool) -> str:
    import swanlab

    server = os.environ.get("SWANLAB_API_HOST", "https://api.swanlab.cn/api")
    mode, why = _mode("SWANLAB_MODE", "cloud", server, _knows_swanlab())
    folder = logs.resolve() / "swanlab"
    folder.mkdir(parents=True, exist_ok=True)
    quiet = {
        "metadata_collect": False,
        "collect_hardware": False,
        "collect_runtime": False,
        "hardware_monitor": False,
    }
    quiet |= {"requirements_collect": False, "conda_collect": False, "log_proxy_type": "none"}
    online = {"id": ident, "resume": "allow"} if mode == "cloud" else {}  # it can't elsewhere
    run = swanlab.init(
        project=os.environ.get("SWANLAB_PROJECT", PROJECT),
        experiment_name=name,
        logdir=str(folder),
        mode=mode,
        settings=_settings(swanlab.Settings, quiet),
        log_level="warning",
        **online,
    )
    if mode == "cloud":
        return f"{name} at {run.public.cloud.experiment_url}"
    if mode != "offline":
        return f"{name} in mode {mode} ({why})"
    kept = _short(Path(run.public.run_dir))
    return f"{name} is kept in {kept} ({why}); upload it with: swanlab sync {kept}"


def _end_swanlab() -> None:
    import swanlab

    swanlab.finish()


def _settings(known: Any, quiet: dict[str, Any]) -> Any:
    """These settings; an older library would pass over the ones that it does not know."""
    unknown = quiet.keys() - known.model_fields
    if unknown:
        raise RuntimeError(
            f"this version has no setting {', '.join(sorted(unknown))}: make setup brings one that has"
        )
    return known(**quiet)


def _mode(variable: str, online: str, server: str, has_login: bool) -> tuple[str, str]:
    """(mode, why): as the variable says; else online where there is a login and the server answers, else offline."""
    if os.environ.get(variable):
        return os.environ[variable], f"{variable} says so"
    if not has_login:
        return "offline", "no login here"
    import requests

    try:
        requests.head(server, timeout=PATIENCE)
    except requests.RequestException:
        return "offline", "its server does not answer"
    return online, ""


def _has_netrc(server: str) -> bool:
    from requests.utils import get_netrc_auth

    return get_netrc_auth(server) is not None


def _knows_swanlab() -> bool:
    from swanlab.package import get_key

    with contextlib.suppress(Exception):  # its own error for no login, OSError, a damaged netrc
        return bool(get_key())
    return False


def _short(path: Path) -> Path:
    """As a command from here names it."""
    with contextlib.suppress(ValueError):
        return path.resolve().relative_to(Path.cwd())
    return path


def _read(path: Path) -> dict[str, str]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
