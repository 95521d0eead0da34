"""A base by its folder or its name on the hub -> the folder; what was downloaded before needs no network."""

from __future__ import annotations

import os
from pathlib import Path

from stagecraft.errors import UserError

WANTED = ("*.safetensors", "*.json", "*.jinja", "*.txt", "*.model", "*.py", "LICENSE*", "NOTICE*")


def locate(name: str, flag: str) -> Path:
    """The folder of a model. Raises UserError where there is none and it can't be fetched."""
    folder = Path(name).expanduser()
    if folder.exists():
        return folder
    if name.startswith((".", "/", "~")) or name.count("/") != 1 or name.startswith("outputs-"):
        raise UserError(f"{flag} {name}: no such folder")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, allow_patterns=WANTED, local_files_only=True))
    except (LocalEntryNotFoundError, OSError, ValueError):
        if os.environ.get("HF_HUB_OFFLINE", "0") not in ("", "0"):
            raise UserError(
                f"{flag} {name}: no such folder, and not in the hub's cache (HF_HUB_OFFLINE is set)"
            ) from None
    print(f"fetching {name}", flush=True)
    try:
        return Path(snapshot_download(name, allow_patterns=WANTED))
    except (HfHubHTTPError, OSError, ValueError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"{flag} {name}: no such folder, and the hub does not give it: {reason}") from None
