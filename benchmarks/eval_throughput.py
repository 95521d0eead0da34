"""Answers a second of an evaluation, beside the usual loop that asks the model one question after the other.

    python benchmarks/eval_throughput.py [--model outputs-sft/tiny/model] [--rows 100] [--rounds 3] [--engine vllm]

Both get the same questions (data/eval/answers.jsonl), the same model in the same process, greedy decoding and the same
limit. They take turns, so that a neighbour on the machine slows both. The last line is one JSON object:

    ratio        answers a second of ours over those of the loop in the same round, median; to be at least 3
    ours, loop   answers a second, medians
    same         whether every text is the same (in float32, where sums of another order hardly ever turn a choice)
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "python"))

from stagecraft.evaluation import engines, subjects  # noqa: E402
from stagecraft.evaluation.sets import read_eval_sets  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--model", default=str(ROOT / "outputs-sft/tiny/model"), help="folder or BASE+ADAPTER"
    )
    parser.add_argument("--eval_dir", default=str(ROOT / "data/eval"))
    parser.add_argument("--rows", type=int, default=100, help="questions that both answer")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--max_new_tokens", type=int, default=48)
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--engine", default="transformers", choices=engines.ENGINES)
    args = parser.parse_args()
    if args.rounds < 1 or args.rows < 1:
        parser.error("--rounds and --rows: at least 1")
    engine = engines.choose_engine(args.engine)
    settings = engines.Settings(args.max_new_tokens, args.batch_size, args.dtype, engine)
    place = subjects.read_place("model", args.model)
    model = engines.open_model(place, settings)
    prompts = [row.prompt for row in read_eval_sets(args.eval_dir).answers][: args.rows]
    loaded = subjects.load(place, args.dtype) if engine == "vllm" else model.loaded

    def ours() -> list[str]:
        return [reply.text for reply in model.replies(prompts)]

    def loop() -> list[str]:
        return [one(*loaded, messages, args.max_new_tokens) for messages in prompts]

    model.replies(prompts[:2])  # what is only done once, is done
    one(*loaded, prompts[0], 2)
    speeds: dict[str, list[float]] = {"ours": [], "loop": []}
    texts: dict[str, list[str]] = {}
    for turn in range(args.rounds):
        for name, answer in (("ours", ours), ("loop", loop))[:: 1 if turn % 2 else -1]:
            seconds, texts[name] = timed(answer)
            speeds[name].append(len(prompts) / seconds)
            print(f"round {turn + 1}: {name}: {speeds[name][-1]:.1f} answers/s", flush=True)
    model.close()
    middle = {name: statistics.median(found) for name, found in speeds.items()}
    differing = [i for i in range(len(prompts)) if texts["ours"][i] != texts["loop"][i]]
    for i in differing[:3]:
        print(f"{prompts[i][-1]['content']}\n  ours: {texts['ours'][i]}\n  loop: {texts['loop'][i]}")
    figures = {name: round(value, 2) for name, value in middle.items()}
    ratio = round(statistics.median(a / b for a, b in zip(*speeds.values(), strict=True)), 2)
    print(json.dumps({"ratio": ratio, **figures, "same": not differing, "rows": len(prompts)}))


def one(model: Any, tokenizer: Any, messages: list[Any], max_new_tokens: int) -> str:
    """One answer, as guides have it."""
    import torch

    inputs = tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
    ).to(model.device)
    with torch.no_grad():
        out = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
    return tokenizer.decode(out[0][inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()


def timed(answer: Callable[[], list[str]]) -> tuple[float, list[str]]:
    """(seconds, what it answered)"""
    began = time.perf_counter()
    texts = answer()
    return time.perf_counter() - began, texts


if __name__ == "__main__":
    main()
