"""Merging a LoRA adapter: how long beside PEFT and beside a copy, in how much memory, how exactly.

    python benchmarks/merge.py [--rounds 3] [--no_big] [--small] [--workdir DIR] [--keep]

Random weights in the shape of Qwen2.5-1.5B (one file of 3.09 GB, bf16, tied) and an adapter of rank 16 on all seven
linear modules are merged in turns by PEFT and by this kit and copied by cp. Then the shape of Qwen2.5-7B (15.2 GB in
four files) is merged by this kit alone. The last line is one JSON object; beside it stands, each to be at most:

    time_vs_peft   0.30  median seconds of merge_lora.py --no_validate over those of a script that loads the base,
                         merges and saves; both from process start to exit
    time_vs_copy   1.30  over the median of `cp` of the base's file, which leaves its pages for the kernel to write
                         later. The merge does not: the copy with an fsync is printed, too
    anon_mb_1.5b   700   peak of RssAnon (memory that is no page cache) over the command's processes, MB of 10^6 bytes
    anon_mb_7b     700   the same for 7B; null without that part. It should be the same, not just below
    error_vs_peft  1.0   largest ratio, over all tensors, of our largest error against a merge in fp64 to PEFT's (1.0
                         where both are 0; PEFT rounds a float32 sum once, so it is near 1.0 or something is amiss)

What the page cache has not held before comes slowly in a virtual machine: the merge goes first in the first round, so
the doubt is to its cost; look at the minima where single figures differ much. The base is in the page cache in every
run (1.5B needs 10 GB of it; 7B, 31 GB, seldom fits and is bound by the disk). VmHWM counts mapped files too, and is
for information. --workdir has to be on a disk: a file in a tmpfs is memory that neither figure shows.
"""

import argparse
import contextlib
import json
import math
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import psutil

ROOT = Path(__file__).resolve().parents[1]
ENVIRONMENT = os.environ | {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
RANK, ALPHA = 16, 32
POOL = 1 << 24  # random numbers of which all weights are made
PIECE = 1 << 20  # numbers written at a time, from anywhere in the pool: no two rows alike, 2 GB/s
CHUNK = 1 << 20  # numbers compared at a time in fp64
DISK, BIG_DISK = 14e9, 40e9  # base, copy, result (and PEFT's) of 1.5B; base, copy, result of 7B
PEFT = """
import sys, torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer
base, adapter, output = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
model = PeftModel.from_pretrained(model, adapter).merge_and_unload()
model.save_pretrained(output)
AutoTokenizer.from_pretrained(base).save_pretrained(output)
"""


@dataclass
class Shape:
    """A Qwen2 model by its numbers; a head is hidden / heads wide."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    vocabulary: int
    tied: bool
    files: int


QWEN_1_5B = Shape(1536, 8960, 28, 12, 2, 151936, tied=True, files=1)
QWEN_7B = Shape(3584, 18944, 28, 28, 4, 152064, tied=False, files=4)
SMALL = Shape(256, 512, 4, 4, 2, 4096, tied=True, files=1)
SMALL_BIG = Shape(256, 768, 6, 4, 2, 4096, tied=False, files=4)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--no_big", action="store_true", help="no 7B (nor below 40 GB of free disk)")
    parser.add_argument("--small", action="store_true", help="shapes of a few MB: does the benchmark work?")
    parser.add_argument("--workdir", help="an existing folder for all files (default: the system's for such)")
    parser.add_argument("--keep", action="store_true", help="keep the files")
    args = parser.parse_args()
    if args.rounds < 1:
        parser.error("--rounds: at least 1")
    if not Path(args.workdir or tempfile.gettempdir()).is_dir():
        parser.error(f"--workdir {args.workdir}: is no folder")
    work = Path(tempfile.mkdtemp(prefix="stagecraft-merge-", dir=args.workdir)).resolve()
    shape, big_shape = (SMALL, SMALL_BIG) if args.small else (QWEN_1_5B, QWEN_7B)
    try:
        if not args.small and shutil.disk_usage(work).free < DISK:
            sys.exit(f"{work}: fewer than {DISK / 1e9:.0f} GB are free; name another folder with --workdir")
        figures = bench(work, shape, args.rounds)
        if not args.keep:
            clear(*work.iterdir())
        if args.no_big or (not args.small and shutil.disk_usage(work).free < BIG_DISK):
            say(f"7B is left out: --no_big, or under {BIG_DISK / 1e9:.0f} GB of free disk")
        else:
            figures["anon_mb_7b"] = bench_big(work, big_shape)
    finally:
        if args.keep:
            say(f"kept in {work}")
        else:
            shutil.rmtree(work)
    print(json.dumps(figures))


def bench(work: Path, shape: Shape, rounds: int) -> dict[str, float | None]:
    """PEFT, ours and the copy in turns, then the errors, then once with validation."""
    base, adapter, by_peft, by_us = (work / name for name in ("base", "adapter", "by-peft", "by-us"))
    make_model(base, adapter, shape)
    commands = {
        "ours": merge_command(base, adapter, by_us) + ["--no_validate"],
        "copy": ["cp", str(base / "model.safetensors"), str(work / "copy")],
        "peft": [sys.executable, "-c", PEFT, str(base), str(adapter), str(by_peft)],
    }
    outputs = {"ours": by_us, "copy": work / "copy", "peft": by_peft}
    seconds: dict[str, list[float]] = {name: [] for name in [*commands, "copy with fsync"]}
    anon = 0.0
    for turn in range(rounds):
        names = list(commands)
        for name in names[turn % 3 :] + names[: turn % 3]:
            spent, peak = measure(commands[name], work, outputs[name], f"round {turn + 1}: {name}")
            seconds[name].append(spent)
            if name == "ours":
                anon = max(anon, peak)
            if name == "copy":
                seconds["copy with fsync"].append(spent + sync(work / "copy"))
                clear(work / "copy")
    for name, found in seconds.items():
        each = " ".join(f"{second:.2f}" for second in found)
        say(f"{name}: median {statistics.median(found):.2f} s, minimum {min(found):.2f} s, all {each}")
    middle = {name: statistics.median(found) for name, found in seconds.items()}
    error = compare(base, adapter, by_peft, by_us)
    clear(by_peft, by_us)
    measure(merge_command(base, adapter, work / "proven"), work, work / "proven", "ours with validation")
    return {
        "time_vs_peft": round(middle["ours"] / middle["peft"], 3),
        "time_vs_copy": round(middle["ours"] / middle["copy"], 3),
        "anon_mb_1.5b": round(anon),
        "anon_mb_7b": None,  # until that has run
        "error_vs_peft": error,
    }


def bench_big(work: Path, shape: Shape) -> float:
    """The larger shape, ours alone: its peak of anonymous memory."""
    base, adapter, merged = (work / f"big-{name}" for name in ("base", "adapter", "merged"))
    make_model(base, adapter, shape)
    ours, anon = measure([*merge_command(base, adapter, merged), "--no_validate"], work, merged, "ours, 7B")
    clear(merged)
    plain, _ = measure(["cp", "-r", str(base), str(work / "copy")], work, work / "copy", "copy, 7B")
    synced = plain + sync(work / "copy")
    clear(work / "copy")
    say(f"7B: ours takes {ours / plain:.3f} of a copy, {ours / synced:.3f} of a copy with fsync")
    return round(anon)


def merge_command(base: Path, adapter: Path, output: Path) -> list[str]:
    script = [sys.executable, str(ROOT / "python" / "merge_lora.py")]
    return [*script, "--base_model", str(base), "--lora_model", str(adapter), "--output_dir", str(output)]


# --- measuring


def measure(command: list[str], work: Path, output: Path, title: str) -> tuple[float, float]:
    """(seconds, peak RssAnon in MB) of a command, begun with nothing left to be written by those before it."""
    clear(output)
    os.sync()
    peaks, log = [0.0, 0.0, 0.0], work / "log.txt"
    with log.open("w") as stream:
        began = time.perf_counter()
        process = subprocess.Popen(command, stdout=stream, stderr=stream, cwd=work, env=ENVIRONMENT)
        try:
            family, newest = [process.pid], ""
            while process.poll() is None:
                family, newest = members(family, newest)
                peaks = [max(pair) for pair in zip(peaks, memory_of(family), strict=True)]
                time.sleep(0.005)
            seconds = time.perf_counter() - began
        finally:
            process.kill()  # does nothing to one that has ended
            process.wait()
    if process.returncode or not output.exists():
        sys.exit(f"{title} ended with {process.returncode}:\n{log.read_text()[-3000:]}")
    anon, shared, resident = (peak * 1024 / 1e6 for peak in peaks)
    note = f", shared {shared:,.0f} MB" if shared >= 1 else ""  # what a bar on RssAnon would overlook
    say(f"{title}: {seconds:.2f} s, anon {anon:,.0f} MB{note}, VmHWM {resident:,.0f} MB")
    return seconds, anon


def members(family: list[int], newest: str) -> tuple[list[int], str]:
    """A process with its descendants, looked up anew where the system gave out a process number since."""
    last = Path("/proc/loadavg").read_text().split()[-1]
    if last != newest:
        with contextlib.suppress(psutil.NoSuchProcess):
            children = psutil.Process(family[0]).children(recursive=True)
            family = [family[0], *(child.pid for child in children)]
    return family, last


def memory_of(family: list[int]) -> list[float]:
    """RssAnon, RssShmem and VmHWM, each summed over the processes, in KiB."""
    totals = [0.0, 0.0, 0.0]
    for pid in family:
        with contextlib.suppress(OSError):  # it has ended
            for line in Path(f"/proc/{pid}/status").read_text().splitlines():
                for index, key in enumerate(("RssAnon:", "RssShmem:", "VmHWM:")):
                    if line.startswith(key):
                        totals[index] += int(line.split()[1])
    return totals


def sync(copied: Path) -> float:
    """Seconds until the copy just made is on the disk."""
    began = time.perf_counter()
    for file in copied.iterdir() if copied.is_dir() else [copied]:
        with file.open("rb") as stream:
            os.fsync(stream.fileno())
    seconds = time.perf_counter() - began
    say(f"  and {seconds:.2f} s until it is on the disk")
    return seconds


# --- a model and an adapter of random numbers


def make_model(base: Path, adapter: Path, shape: Shape) -> None:
    """Write both folders, tensor by tensor."""
    import torch

    began = time.perf_counter()
    pool = torch.randn(POOL, generator=torch.Generator().manual_seed(0)) * 0.02
    tensors = base_tensors(shape)
    base.mkdir()
    write_base(base, tensors, shape.files, pool.bfloat16())
    (base / "config.json").write_text(json.dumps(config_of(shape), indent=2))
    write_tokenizer(base)
    lora = {}
    for name, form in tensors.items():
        if name.endswith("_proj.weight"):
            stem = lora_stem(name)
            lora |= {f"{stem}A.weight": (RANK, form[1]), f"{stem}B.weight": (form[0], RANK)}
    adapter.mkdir()
    # 1.5 times as large as the weights: what they add is 0.36 of a weight, enough to change the model's behaviour
    write_tensors(adapter / "adapter_model.safetensors", lora, pool * 1.5, random.Random(1))
    write_adapter_config(base, adapter)
    size = sum(file.stat().st_size for file in base.glob("*.safetensors"))
    say(f"made a base of {size / 1e9:.2f} GB and its adapter in {time.perf_counter() - began:.1f} s")


def base_tensors(shape: Shape) -> dict[str, tuple[int, ...]]:
    """Name -> shape, in the order of the model."""
    hidden, narrow = shape.hidden, shape.hidden // shape.heads * shape.kv_heads
    table = (shape.vocabulary, hidden)
    linear = {f"self_attn.{key}_proj": (narrow if key in "kv" else hidden, hidden) for key in "qkvo"}
    linear |= {f"mlp.{key}_proj": (shape.intermediate, hidden) for key in ("gate", "up")}
    linear |= {"mlp.down_proj": (hidden, shape.intermediate)}
    names: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": table}
    for stem in (f"model.layers.{layer}." for layer in range(shape.layers)):
        names |= {f"{stem}{key}.weight": form for key, form in linear.items()}
        names |= {f"{stem}self_attn.{key}_proj.bias": linear[f"self_attn.{key}_proj"][:1] for key in "qkv"}
        names |= {f"{stem}{norm}_layernorm.weight": (hidden,) for norm in ("input", "post_attention")}
    names["model.norm.weight"] = (hidden,)
    return names if shape.tied else names | {"lm_head.weight": table}


def lora_stem(name: str) -> str:
    """What PEFT calls the two tensors of a module, less A.weight and B.weight."""
    return f"base_model.model.{name.removesuffix('.weight')}.lora_"


def write_base(folder: Path, tensors: dict[str, tuple[int, ...]], number: int, pool) -> None:
    """The weights in one file, or in several of about a size with their index."""
    total, done, rng = 2 * sum(math.prod(form) for form in tensors.values()), 0, random.Random(0)
    shards: list[dict[str, tuple[int, ...]]] = [{} for _ in range(number)]
    for name, form in tensors.items():
        shards[done * number // total][name] = form
        done += 2 * math.prod(form)
    if number == 1:
        write_tensors(folder / "model.safetensors", tensors, pool, rng)
        return
    places = {}
    for count, shard in enumerate(shards, start=1):
        file = f"model-{count:05}-of-{number:05}.safetensors"
        write_tensors(folder / file, shard, pool, rng)
        places |= dict.fromkeys(shard, file)
    index = {"metadata": {"total_size": total}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))


def write_tensors(path: Path, tensors: dict[str, tuple[int, ...]], pool, rng: random.Random) -> None:
    """A safetensors file by hand, so that a model is never in memory: header, then pieces of the pool."""
    import torch

    width, end = pool.element_size(), 0
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    for name, form in tensors.items():
        start, end = end, end + width * math.prod(form)
        dtype = "BF16" if width == 2 else "F32"
        header[name] = {"dtype": dtype, "shape": form, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    ones = torch.ones(PIECE, dtype=pool.dtype)  # norms
    with path.open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        for name, form in tensors.items():
            left = math.prod(form)
            while left:
                count = min(left, PIECE)
                at = rng.randrange(POOL - count)
                piece = ones[:count] if "norm" in name else pool[at : at + count]
                stream.write(piece.view(torch.uint8).numpy())
                left -= count


def config_of(shape: Shape) -> dict[str, object]:
    """config.json as the hub has it, less what is the class's default."""
    return {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "bos_token_id": 256,
        "eos_token_id": 258,
        "hidden_size": shape.hidden,
        "intermediate_size": shape.intermediate,
        "num_attention_heads": shape.heads,
        "num_hidden_layers": shape.layers,
        "num_key_value_heads": shape.kv_heads,
        "rope_theta": 1000000.0,
        "tie_word_embeddings": shape.tied,
        "torch_dtype": "bfloat16",
        "vocab_size": shape.vocabulary,
    }


def write_tokenizer(folder: Path) -> None:
    """One token a byte, 0 to 255, and the three of ChatML; the rest of the vocabulary is never used."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    bytewise = Tokenizer(models.BPE({sign: number for number, sign in enumerate(alphabet)}, []))
    bytewise.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bytewise.decoder = decoders.ByteLevel()
    bytewise.add_special_tokens(["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bytewise, eos_token="<|im_end|>", pad_token="<|endoftext|>"
    )
    tokenizer.chat_template = (ROOT / "templates" / "chatml.jinja").read_text(encoding="utf-8")
    tokenizer.save_pretrained(folder)
    endings = {"bos_token_id": 256, "eos_token_id": [258, 256], "pad_token_id": 256}
    (folder / "generation_config.json").write_text(json.dumps(endings, indent=2))


def write_adapter_config(base: Path, adapter: Path) -> None:
    """By PEFT itself, so that it holds every key of the version installed."""
    from peft import LoraConfig

    modules = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    config = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=modules, task_type="CAUSAL_LM")
    config.base_model_name_or_path, config.inference_mode = str(base), True
    config.save_pretrained(adapter)


# --- errors


def compare(base: Path, adapter: Path, by_peft: Path, by_us: Path) -> float:
    """Both results against fp64, tensor by tensor: the largest of our largest errors over PEFT's."""
    began = time.perf_counter()
    before, lora, theirs, ours = (open_tensors(folder) for folder in (base, adapter, by_peft, by_us))
    for title, found in (("PEFT", theirs), ("ours", ours)):
        if found.keys() != before.keys():
            sys.exit(f"{title}: other tensors than the base: {sorted(found.keys() ^ before.keys())[:3]}")
    ratios, largest, counts = {}, [0.0, 0.0], {"better": 0, "equal": 0, "worse": 0}
    for name, file in before.items():
        sides = [f"{lora_stem(name)}{side}.weight" for side in "AB"]
        pair = [lora[side].get_tensor(side).double() for side in sides if side in lora]
        peft, our = errors(name, pair, [file, theirs[name], ours[name]])
        ratios[name] = 1.0 if our == peft else our / peft if peft else 1e9
        counts["better" if our < peft else "worse" if our > peft else "equal"] += 1
        largest = [max(largest[0], peft), max(largest[1], our)]
    worst = max(ratios, key=ratios.__getitem__)
    say(
        f"largest error against fp64: PEFT {largest[0]:.9g}, ours {largest[1]:.9g}; of {len(ratios)} tensors ours is "
        f"{', '.join(f'{kind} in {count}' for kind, count in counts.items())}; the largest ratio is "
        f"{ratios[worst]:.9g} ({worst}); {time.perf_counter() - began:.0f} s"
    )
    return round(ratios[worst], 6)


def open_tensors(folder: Path) -> dict[str, object]:
    """Tensor name -> the open file that holds it."""
    from safetensors import safe_open

    handles = [safe_open(file, "pt") for file in sorted(folder.glob("*.safetensors"))]
    return {name: handle for handle in handles for name in handle.keys()}  # noqa: SIM118 - no mapping


def errors(name: str, pair: list, files: list) -> list[float]:
    """The largest absolute error of PEFT's and of our tensor, some rows at a time; pair is A, B in fp64 or nothing."""
    import torch

    views = [file.get_slice(name) for file in files]
    forms = [(view.get_shape(), view.get_dtype()) for view in views]
    if forms[1:] != forms[:1] * 2:
        sys.exit(f"{name}: {forms[0]} became {forms[1]} with PEFT, {forms[2]} with ours")
    rows, *columns = forms[0][0]
    step, found = max(1, CHUNK // math.prod(columns)), [0.0, 0.0]
    for start in range(0, rows, step):
        exact, *results = (view[start : start + step] for view in views)
        if not pair and all(torch.equal(exact, result) for result in results):
            continue
        exact = exact.double()
        if pair:
            exact.addmm_(pair[1][start : start + step], pair[0], alpha=ALPHA / RANK)
        for index, result in enumerate(results):
            found[index] = max(found[index], result.double().sub_(exact).abs_().max().item())
    return found


def clear(*paths: Path) -> None:
    for path in paths:
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def say(line: str) -> None:
    print(line, flush=True)


if __name__ == "__main__":
    main()
