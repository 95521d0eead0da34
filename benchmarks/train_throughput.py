"""Training speed and memory beside other kits: same model, same rows, same machine, in turns.

    python benchmarks/train_throughput.py [--stage sft|pt|dpo] [--peer NAME ...] [--peer_python PATH] [--rounds 3]
    python benchmarks/train_throughput.py --memory             peak memory on a vocabulary of 152,064, 2,048 tokens
    python benchmarks/train_throughput.py --shape qwen2.5-7b --peer none                        on one CUDA card

Peers: trl-default, trl-grouped, trl-packing, transformers (in the kit's own environment), llamafactory and
llamafactory-neat (with --peer_python, an environment of their own; docs/performance.md says how to make it), none.
Model and rows are made here from a fixed seed; every run is a process in a folder of its own.

Tokens/s: tokens of the rows (supervised: as the kit marks them; real: all of them; PT: those trained on) times epochs
over the seconds of the training loop; the first step, which is slower, is one of 120 (SFT of chat rows). DPO: pairs/s
from the first forward pass to the end of training, so the reference pass counts wherever it happens. Padding: share of
the tokens that went through the model. The last line is one JSON object; with several peers it names the best of them.
`ours`, `peer` are supervised tokens/s (sft), real tokens/s (pt, and sft with another --shape), pairs/s (dpo) or MB
(--memory), medians; `ratio` is ours over the peer's. To reach:

    sft          1.1 x the best peer, 2.5 x trl-default (chat rows, two threads)
    dpo          1.8 x trl-default
    --memory     0.5 x trl-default
    qwen2.5-7b   14,110 tokens/s on one H200; aim for 18,000
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

from peers import contenders, material

HERE = Path(__file__).resolve().parent
DPO_PAIRS = 60
TOLERANCE = 0.02  # of real tokens: a peer that trained on more or less than this is not compared


def main() -> None:
    args = parse()
    case = material.CASES["wide-vocabulary" if args.memory else args.shape]
    if args.stage == "dpo":
        case = replace(case, rows=DPO_PAIRS, epochs=1)
    case = replace(case, rows=args.rows or case.rows)
    work = Path(tempfile.mkdtemp(prefix="stagecraft-train-", dir=args.workdir)).resolve()
    try:
        figures = bench(work, case, args)
    finally:
        shutil.rmtree(work)
    print(json.dumps(figures))


def parse() -> argparse.Namespace:
    """The flags; contradictions end the program."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--stage", choices=list(contenders.SCRIPTS), default="sft")
    parser.add_argument("--peer", nargs="+", choices=[*contenders.STAGES, "none"], default=["trl-default"])
    parser.add_argument("--peer_python", help="the interpreter of LLaMA-Factory's environment")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2, help="CPU threads of each run")
    parser.add_argument("--shape", choices=["chat", "qwen2.5-7b", "small"], default="chat")
    parser.add_argument("--memory", action="store_true", help="peak memory on a wide vocabulary")
    parser.add_argument("--rows", type=int, help="fewer or more rows (pairs) than the usual number")
    parser.add_argument("--workdir", help="an existing folder for all files (default: the system's for such)")
    args = parser.parse_args()
    args.peer = [name for name in args.peer if name != "none"]
    if args.rounds < 1 or args.threads < 1 or (args.rows or 1) < 1:
        parser.error("--rounds, --threads, --rows: at least 1")
    if args.stage != "sft" and (args.memory or args.shape != "chat"):
        parser.error(f"--stage {args.stage}: on the chat model alone")
    for name in args.peer:
        if args.stage not in contenders.STAGES[name]:
            parser.error(f"--peer {name}: has no {args.stage} here")
        if name.startswith("llamafactory") and not args.peer_python:
            parser.error(f"--peer {name}: needs --peer_python; see docs/performance.md")
    return args


def bench(work: Path, case: material.Case, args: argparse.Namespace) -> dict[str, Any]:
    """Make the material, run all contenders in turns, say what was found."""
    import torch

    cuda = torch.cuda.is_available()
    facts = material.make(work, case, args.stage)
    print(facts.describe(case, args.stage), flush=True)
    print(f"on {torch.cuda.get_device_name() if cuda else f'CPU, {args.threads} threads'}", flush=True)
    settings = contenders.Settings(
        stage=args.stage,
        model=str(facts.model),
        rows=str(facts.rows_file),
        limit=case.limit,
        rank=case.rank,
        batch=case.batch,
        epochs=case.epochs,
        learning_rate=case.learning_rate,
        bf16=case.bf16,
        checkpointing=case.checkpointing,
        use_cpu=not cuda,
        logging_steps=1 if args.memory else 5,
    )
    found = take_turns(work, ["ours", *args.peer], settings, facts, case, args)
    if case.checkpointing:
        run_without_checkpointing(work, settings, facts, case, args)
    if (cuda or case.shape is not None) and not args.memory:
        print_ceiling(facts.model, case, found["ours"], cuda, args.threads)
    return compare(found, args)


def take_turns(
    work: Path,
    names: list[str],
    settings: contenders.Settings,
    facts: material.Facts,
    case: material.Case,
    args: argparse.Namespace,
) -> dict[str, list[dict[str, Any]]]:
    """Every contender once a round, who begins changes; name -> its reports."""
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    for turn in range(args.rounds):
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            report = run(work, name, settings, args)
            if isinstance(report, str):
                sys.exit(f"{name} failed:\n{report}")
            measure(report, facts, case, args.stage)
            print(f"round {turn + 1}: {name}: {describe(report, args.stage)}", flush=True)
            if args.stage == "sft":  # in PT blocks are cut, in DPO a prompt may be run once for both answers
                refuse_other_work(name, report, facts.tokens * case.epochs)
            found[name].append(report)
    return found


def run(
    work: Path, name: str, settings: contenders.Settings, args: argparse.Namespace
) -> dict[str, Any] | str:
    """One run's report, or the end of its log where it failed."""
    folder = work / "run"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    words = contenders.command(name, settings, folder, args.peer_python)
    threads = str(args.threads)
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": str(folder / "cache"), "WANDB_DISABLED": "true"}
    environment = os.environ | offline | {"OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads}
    log = folder / "log.txt"
    with log.open("w") as stream:
        done = subprocess.run(words, cwd=folder, stdout=stream, stderr=stream, env=environment, check=False)
    report = folder / "report.json"
    if done.returncode or not report.exists():
        return log.read_text(errors="replace")[-3000:]
    found = json.loads(report.read_text())
    manifest = folder / "out" / "run.json"
    if name == "ours" and manifest.exists():
        found |= {"padding": json.loads(manifest.read_text())["metrics"]["padding_share"]}
    return found


def measure(report: dict[str, Any], facts: material.Facts, case: material.Case, stage: str) -> None:
    """Add rates and padding to a report. Tokens are those of the rows, the same for all: no one gains by other marks.

    In PT they are those each trained on: LLaMA-Factory leaves out the last block, which is not full.
    """
    report["seconds"] = report["whole" if stage == "dpo" else "loop"]
    seconds, rows = report["seconds"], facts.rows * case.epochs
    report["real_rate"] = (report["real"] if stage == "pt" else facts.tokens * case.epochs) / seconds
    report["supervised_rate"] = facts.supervised * case.epochs / seconds
    report["pairs_rate"] = rows / seconds
    if "padding" not in report:  # as the kit itself tells it
        report["padding"] = 1 - report["real"] / max(1, report["through"])


def describe(report: dict[str, Any], stage: str) -> str:
    """One run in a line."""
    rates = {
        "sft": f"{report['supervised_rate']:,.0f} supervised tokens/s, {report['real_rate']:,.0f} real tokens/s",
        "pt": f"{report['real_rate']:,.0f} real tokens/s",
        "dpo": f"{report['pairs_rate']:.2f} pairs/s, {report['real_rate']:,.0f} real tokens/s",
    }[stage]
    marked = f" ({report['supervised']:,} marked)" if stage == "sft" else ""
    first, last = report["first_loss"], report["last_loss"]
    loss = f"loss {first:.3f} -> {last:.3f}" if first is not None else "too few steps for a loss"
    card = f", GPU {report['gpu_mb']:,.0f} MB" if report["gpu_mb"] else ""
    return (
        f"{rates}, padding {report['padding']:.1%}, {report['peak_mb']:,.0f} MB{card}; {report['steps']} steps, "
        f"{report['real']:,} tokens{marked}, {report['seconds']:.1f} s, {loss}"
    )


def refuse_other_work(name: str, report: dict[str, Any], wanted: int) -> None:
    """Stop where a contender trained on other tokens than the rows have."""
    if abs(report["real"] / wanted - 1) > TOLERANCE:
        sys.exit(f"{name} trained on {report['real']:,} tokens; the rows have {wanted:,}")


def run_without_checkpointing(
    work: Path,
    settings: contenders.Settings,
    facts: material.Facts,
    case: material.Case,
    args: argparse.Namespace,
) -> None:
    """Ours once more with every activation kept, where memory suffices."""
    report = run(work, "ours", replace(settings, checkpointing=False), args)
    if isinstance(report, str):
        if "out of memory" not in report:
            sys.exit(f"ours without checkpointing failed:\n{report}")
        print("without gradient checkpointing: out of memory", flush=True)
        return
    measure(report, facts, case, args.stage)
    print(f"without gradient checkpointing: {describe(report, args.stage)}", flush=True)


def print_ceiling(
    model: Path, case: material.Case, found: list[dict[str, Any]], cuda: bool, threads: int
) -> None:
    """What the model's matrix products alone allow on this machine, and how near training comes."""
    dtype = "bfloat16" if case.bf16 and cuda else "float32"
    script = [sys.executable, str(HERE / "peers" / "ceiling.py"), str(model)]
    done = subprocess.run(
        [*script, str(case.batch * case.limit), dtype],
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | {"OMP_NUM_THREADS": str(threads)},
    )
    ceiling = json.loads(done.stdout.splitlines()[-1])
    ours = statistics.median(report["real_rate"] for report in found)
    plain, again = ceiling["tokens_a_second"], ceiling["with_checkpointing"]
    print(
        f"matrix products alone ({dtype}, {ceiling['tera_operations']:.2f} TFLOP/s): {plain:,.0f} tokens/s, ours "
        f"{ours / plain:.1%} of that; with the second forward pass of checkpointing {again:,.0f}, ours "
        f"{ours / again:.1%}",
        flush=True,
    )


def compare(found: dict[str, list[dict[str, Any]]], args: argparse.Namespace) -> dict[str, Any]:
    """A line for each contender, and the last line's figures against the best peer."""
    keys = {"sft": "supervised_rate", "pt": "real_rate", "dpo": "pairs_rate"}
    on_card = any(report["gpu_mb"] for reports in found.values() for report in reports)
    key = keys[args.stage] if args.shape == "chat" else "real_rate"
    if args.memory:
        key = "gpu_mb" if on_card else "peak_mb"
    middle = {name: statistics.median(each[key] for each in reports) for name, reports in found.items()}
    unit = {"supervised_rate": "supervised tokens/s", "real_rate": "real tokens/s", "pairs_rate": "pairs/s"}
    for name, value in middle.items():
        memory = statistics.median(report["peak_mb"] for report in found[name])
        share = f", ours is {middle['ours'] / value:.2f} times that" if name != "ours" else ""
        print(f"{name}: median {value:,.2f} {unit.get(key, 'MB')}, {memory:,.0f} MB of memory{share}")
    ours, peers = middle.pop("ours"), middle
    best = (min if args.memory else max)(peers, key=peers.__getitem__) if peers else None
    return {
        "stage": "sft-memory" if args.memory else args.stage,
        "ours": round(ours, 2),
        "peer": round(peers[best], 2) if best else None,
        "peer_name": best,
        "ratio": round(ours / peers[best], 3) if best else None,
    }


if __name__ == "__main__":
    main()
