"""Does a server answer as the model does? Template, prompts, stop tokens, first greedy tokens and their numbers.

    python python/check_server.py --server http://127.0.0.1:8000/v1 --stage sft
    python python/check_server.py --server http://127.0.0.1:8000/v1 --model outputs-sft/tiny/model --prompts mine.jsonl

transformers loads the folder and answers the same prompts. Exit status 0: equal; 1: it differs; 2: can't be compared.
API_KEY is taken from the environment.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from tqdm import tqdm

from stagecraft import generation, models
from stagecraft.arguments import DTYPES, parse
from stagecraft.data.rows import Message
from stagecraft.errors import Stopped, UserError, run_main
from stagecraft.serving import asking, comparing
from stagecraft.serving.choice import Served, choose


@dataclass
class CheckArguments:
    """Check"""

    server: str = field(
        default="http://127.0.0.1:8000/v1", metadata={"help": "URL of the API, ending in /v1"}
    )
    recipe: str = field(default="tiny", metadata={"help": "a folder in recipes/"})
    stage: str = field(
        default="",
        metadata={"help": "whose model it should be; all: every one that is served; none: the newest"},
    )
    model: str = field(default="", metadata={"help": "a complete model's folder instead of a stage"})
    served_name: str = field(
        default="", metadata={"help": "the server's name for it (default: the stage or folder)"}
    )
    prompts: list[str] = field(
        default_factory=lambda: ["data/eval/questions.jsonl", "data/eval/answers.jsonl"],
        metadata={"help": "jsonl files with question or messages"},
    )
    max_prompts: int = field(default=20, metadata={"help": "prompts at most"})
    max_new_tokens: int = field(
        default=48, metadata={"help": "tokens of an answer at most, to see where it ends"}
    )
    torch_dtype: str = field(
        default="",
        metadata={
            "help": "what the server computes in (default: as make serve was told)",
            "choices": ("", *DTYPES),
        },
    )


def main() -> None:
    [args] = parse(__doc__, CheckArguments)
    wanted, prompts = check(args)
    state = read_state(args)
    if args.stage == "all":
        names = asking.served_names(args.server)
        wanted = [model for model in wanted if model.name in names]
        if not wanted:
            raise UserError(
                f"--server {args.server}: serves no stage of {args.recipe} (there: {', '.join(names)})"
            )
    servers = [asking.connect(args.server, args.served_name or model.name) for model in wanted]
    same = [
        compare(server, model, prompts, args, state) for server, model in zip(servers, wanted, strict=True)
    ]
    if not all(same):
        raise Stopped(
            f"{args.server}: does not answer as its model does: see the lines that differ", status=1
        )


def check(args: CheckArguments) -> tuple[list[Served], list[list[Message]]]:
    """The models and the prompts. Raises UserError with everything that is wrong before a server is asked."""
    faults: list[str] = []
    if urlsplit(args.server).scheme not in ("http", "https"):
        faults.append(f"--server {args.server}: must be a URL, e.g. http://127.0.0.1:8000/v1")
    for name in ("max_prompts", "max_new_tokens"):
        if getattr(args, name) < 1:
            faults.append(f"--{name} must be at least 1, not {getattr(args, name)}")
    if args.stage == "all" and args.served_name:
        faults.append("--served_name: is for one model, not for --stage all")
    wanted = choose(args.recipe, args.stage, args.model, faults)
    prompts = read_prompts(args, faults)
    if faults:
        raise UserError(*faults)
    return wanted, prompts


def read_prompts(args: CheckArguments, faults: list[str]) -> list[list[Message]]:
    """Conversations up to where the assistant answers, the first of them by the order of the files."""
    found: list[list[Message]] = []
    for path in args.prompts:
        try:
            lines = Path(path).read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            faults.append(f"--prompts {path}: {getattr(error, 'strerror', None) or 'not UTF-8'}")
            continue
        for number, line in enumerate(lines, 1):
            try:
                messages = prompt_of(json.loads(line)) if line.strip() else None
            except (ValueError, KeyError, TypeError):
                faults.append(
                    f'{path}:{number}: no prompt; a line is {{"question": "..."}} or {{"messages": [...]}}'
                )
                continue
            if messages and messages not in found:
                found.append(messages)
    if not found and not faults:
        faults.append(f"--prompts {', '.join(args.prompts)}: no prompt in there")
    return found[: args.max_prompts]


def prompt_of(row: dict[str, Any]) -> list[Message]:
    """One row's conversation without an answer at its end."""
    if "question" in row:
        if not isinstance(row["question"], str):
            raise TypeError
        return [{"role": "user", "content": row["question"]}]
    messages = [{"role": str(m["role"]), "content": str(m["content"])} for m in row["messages"]]
    while messages and messages[-1]["role"] == "assistant":
        messages.pop()
    if not messages:
        raise ValueError
    return messages


def read_state(args: CheckArguments) -> dict[str, Any]:
    """What make serve noted of the server on that port; nothing where it is somebody else's."""
    try:
        port = urlsplit(args.server).port
        state = json.loads(
            (Path("outputs-serve") / args.recipe / f"serve-{port}.json").read_text(encoding="utf-8")
        )
        return state if isinstance(state, dict) else {}
    except (OSError, ValueError):
        return {}


def compare(
    server: asking.Server,
    served: Served,
    prompts: list[list[Message]],
    args: CheckArguments,
    state: dict[str, Any],
) -> bool:
    """Print one model's table; whether nothing differs."""
    asked = args.torch_dtype or state.get("dtype") or ("bfloat16" if server.is_vllm else "auto")
    asked = {"half": "float16", "float": "float32"}.get(asked, asked)
    model, tokenizer = generation.load(models.load_causal, str(served.folder), asked, "--model")
    dtype = str(model.dtype).removeprefix("torch.")
    limit = comparing.LIMITS[dtype]
    print(f"{server.name} at {server.url} against {served.folder} by transformers, {dtype}", flush=True)
    pairs = []
    with tqdm(prompts, desc=server.name, unit="prompt", disable=None, leave=False) as bar:
        for messages in bar:
            ours = comparing.reference(model, tokenizer, messages, args.max_new_tokens)
            theirs = asking.answer(server, messages, args.max_new_tokens)
            pairs.append(comparing.Pair(messages, ours, theirs))
    if dtype != "float32" and pairs[0].theirs.logprobs and model.num_parameters() <= comparing.MAX_PARAMETERS:
        exact, _ = generation.load(models.load_causal, str(served.folder), "float32", "--model")
        comparing.read_exactly(pairs, exact, dtype)
    for pair in pairs:
        comparing.compare(pair, limit, tokenizer)
    checks = [
        comparing.check_template(served.folder),
        comparing.check_prompts(server, pairs, tokenizer),
        comparing.check_stops(pairs, served.folder, model, tokenizer),
        comparing.check_tokens(pairs, limit),
        comparing.check_logprobs(pairs, dtype, limit),
        comparing.check_dtype(pairs, dtype),
    ]
    words = {True: "equal", False: "DIFFERS", None: "-"}
    for one in checks:
        print(f"  {one.name:<12} {words[one.good]:<8} {one.detail}", flush=True)
    if all(one.good is None for one in checks[1:]):
        raise UserError(f"--server {args.server}: nothing of {server.name} could be compared")
    return not any(one.good is False for one in checks)


if __name__ == "__main__":
    run_main(main)
