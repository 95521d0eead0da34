"""A web page on which one to four models answer side by side, and votes are saved as preference rows.

    python python/web_chat.py                                            the two stages that finished last
    python python/web_chat.py --models sft dpo --port 7860
    python python/web_chat.py --models old=outputs-sft/tiny/model new=http://127.0.0.1:8000/v1#dpo

A model is a finished stage's name, a folder, BASE+ADAPTER, or a server that speaks OpenAI's API (its key: API_KEY);
NAME=PLACE gives it a name. Votes go to --votes_file in the form that the RM and DPO stages read: in data/reward, as by
default, they make both stages out of date. The page listens on this machine only; another --host, or --share, needs a
password in the environment (PASSWORD), and asks visitors for it.
"""

import contextlib
import gc
import importlib.util
import os
import signal
import socket
import sys
import threading
from dataclasses import dataclass, field
from pathlib import Path

from stagecraft import naming
from stagecraft.arguments import DTYPES, parse
from stagecraft.errors import UserError, run_main
from stagecraft.places import Place
from stagecraft.talk import sources
from stagecraft.talk.appending import check_file

USER = "stagecraft"
MOST = 4  # answers side by side; more are not read


@dataclass
class WebArguments:
    """Web page"""

    models: list[str] | None = field(
        default=None, metadata={"help": "stages, folders, BASE+ADAPTER or URLs; unset: the two newest stages"}
    )
    recipe: str = field(default_factory=naming.default_recipe, metadata={"help": "whose stages are meant"})
    host: str = field(default="127.0.0.1", metadata={"help": "address to listen on"})
    port: int = field(default=7860, metadata={"help": "port to listen on"})
    share: bool = field(default=False, metadata={"help": "a public address through Gradio's tunnel"})
    votes_file: str = field(
        default="data/reward/votes.jsonl", metadata={"help": "the .jsonl file that votes are appended to"}
    )
    blind: bool = field(default=False, metadata={"help": "begin with the models' names hidden"})
    system: str = field(default="", metadata={"help": "system prompt at the start"})
    max_new_tokens: int = field(default=256, metadata={"help": "tokens of an answer at most, at the start"})
    temperature: float = field(default=0.0, metadata={"help": "at the start; 0 is greedy"})
    torch_dtype: str = field(
        default="auto", metadata={"help": "dtype of the weights (not of a server's)", "choices": DTYPES}
    )


def main() -> None:
    [args] = parse(__doc__, WebArguments)
    found = check(args)
    with contextlib.redirect_stdout(sys.stderr):  # some libraries greet on standard output when imported
        opened = sources.open_all(found, args.torch_dtype)
    for source in opened:
        print(f"{source.name}: {source.about}")
    from stagecraft.talk.page import Page

    names = ("system", "temperature", "max_new_tokens", "blind")
    page = Page(opened, Path(args.votes_file), {name: getattr(args, name) for name in names})
    serve(page, args)


def serve(page: "Page", args: WebArguments) -> None:  # noqa: F821 -- Gradio is imported after every check
    """Listen until Ctrl-C or SIGTERM."""
    over = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: over.set())
    password = os.environ.get("PASSWORD")
    # A proxy for the outside must not come between Gradio and its own look whether it answers.
    os.environ["NO_PROXY"] = os.environ["no_proxy"] = ",".join(
        [*filter(None, [os.environ.get("NO_PROXY")]), "127.0.0.1", "localhost"]
    )
    host = f"[{args.host}]" if ":" in args.host else args.host  # IPv6
    try:
        page.launch(
            server_name=host,
            server_port=args.port,
            share=args.share,
            auth=(USER, password) if password else None,
        )
    except OSError as error:  # taken between the check and now
        raise UserError(f"--port {args.port}: can't listen on {args.host} ({error})") from None
    shown = {"0.0.0.0": "127.0.0.1", "[::]": "[::1]"}.get(host, host)
    print(f"http://{shown}:{args.port} (Ctrl-C ends it){f'; user {USER}, your PASSWORD' if password else ''}")
    if args.share:
        print(page.blocks.share_url or "--share: no tunnel to be had; the page is on this machine only")
    if len(page.sources) > 1:
        print(f"votes go to {args.votes_file}")
    sys.stdout.flush()
    over.wait()
    page.close()
    print("ended")
    gc.freeze()  # else Python looks for garbage once more in all of torch: 3.8 s from Ctrl-C to the end, not 1.9 s


def check(args: WebArguments) -> list[Place]:
    """Which models are meant. Raises UserError listing all that is wrong, before torch is imported."""
    faults = []
    if args.max_new_tokens < 1:
        faults.append(f"--max_new_tokens must be at least 1, not {args.max_new_tokens}")
    if not 0 <= args.temperature <= 2:
        faults.append(f"--temperature must be from 0 (greedy) to 2, not {args.temperature}")
    local = args.host in ("localhost", "::1") or args.host.startswith("127.")
    if not os.environ.get("PASSWORD"):
        asked = [f"--host {args.host}"] * (not local) + ["--share"] * args.share
        faults += [
            f"{flag}: anyone who reaches it could use the models and vote; set PASSWORD in the environment, "
            "or leave it out"
            for flag in asked
        ]
    if importlib.util.find_spec("gradio") is None:
        faults.append("gradio is not installed here; run: make setup (or set PYTHON)")
    found: list[Place] = []
    for step in (
        lambda: check_port(args.host, args.port),
        lambda: check_file(Path(args.votes_file), "dpo", "--votes_file"),
        lambda: found.extend(
            naming.find_all(args.models or naming.newest(args.recipe, 2), args.recipe, "--models", MOST)
        ),
    ):
        try:
            step()
        except UserError as error:
            faults.append(str(error))
    if faults:
        raise UserError(*faults)
    return found


def check_port(host: str, port: int) -> None:
    """Raise UserError where nothing can listen there."""
    if not 1 <= port <= 65535:
        raise UserError(f"--port must be from 1 to 65535, not {port}")
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, socket.SOCK_STREAM) as listener:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
    except socket.gaierror:
        raise UserError(f"--host {host}: no such address") from None
    except OSError as error:
        reason = error.strerror or str(error)
        raise UserError(
            f"--port {port}: can't listen on {host}: {reason}; stop what listens there, or choose another"
        ) from None


if __name__ == "__main__":
    run_main(main)
