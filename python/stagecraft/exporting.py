"""A complete model in 8 bits: quantised by llm-compressor, measured against its source in a clean process."""

from __future__ import annotations

import logging
import multiprocessing
import os
import random
import shutil
import sys
import warnings
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stagecraft import models
from stagecraft.console import settle_libraries
from stagecraft.data import readers, rows
from stagecraft.errors import UserError, first_faults
from stagecraft.merging.tensors import Tensor, open_weights
from stagecraft.processes import die_with_parent

if TYPE_CHECKING:
    import torch

# Format -> llm-compressor's scheme, and the dtype of the weights as safetensors names it. In both a row of weights has
# a scale, and so has a token of activations, which vLLM finds while it serves: neither needs data.
SCHEMES = {"fp8": ("FP8_DYNAMIC", "F8_E4M3"), "int8": ("INT8", "I8")}
# KL a token between source and export. tiny: fp8 .012 to .019, int8 .0012 to .0016. Spoiled on purpose: all scales
# 10 % off .066 to .13, one projection silenced or doubled .15 to .41, the scales of other rows .47 to .61.
WARN_KL, MAX_KL = 0.03, 0.1
# |W - export| / |W| of a matrix, because one wrong matrix of hundreds moves the KL little. tiny: fp8 .026, int8 .010.
MAX_ERROR = 0.07
LONGEST_ROW = 2048  # tokens of a calibration row; the rest is cut
NOT_COPIED = (".safetensors", ".index.json", ".bin", ".pt", ".pth", ".gguf", "/config.json", "/README.md")


@dataclass
class Calibration:
    """Rows that GPTQ calibrates with; without a folder, weights are rounded one by one."""

    folder: str | None
    rows: int

    def __str__(self) -> str:
        return f"GPTQ on up to {self.rows} rows of {self.folder}" if self.folder else "without data"


def settle() -> None:
    """No network, and of the libraries' chatter only the progress."""
    os.environ |= {"HF_HUB_OFFLINE": "1", "LLM_COMPRESSOR_LOG_LEVEL": "ERROR"}
    if not sys.stderr.isatty():
        os.environ["TQDM_DISABLE"] = "1"  # its bars would fill a log line by line
    logging.getLogger("torch.fx").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", message="Attempting to save a model with offloaded modules")
    settle_libraries()


def quantise(source: str, format: str, calibration: Calibration, folder: Path) -> None:
    """The model in 8 bits, written to `folder`: weights rounded one by one, or with data by GPTQ."""
    tokenizer = models.open_tokenizer(source)
    dataset = draw(source, calibration, tokenizer) if calibration.folder else None
    print(f"quantising {source} to {format}, {calibration}", flush=True)
    from llmcompressor import oneshot
    from llmcompressor.modifiers.gptq import GPTQModifier
    from llmcompressor.modifiers.quantization import QuantizationModifier

    try:
        model = models.load_causal(source, device_map="cpu")  # a GPU is given one layer after the other
    except (OSError, ValueError) as error:
        raise UserError(f"--model {source}: can't be loaded: {str(error).strip().splitlines()[0]}") from None
    modifier = GPTQModifier if calibration.folder else QuantizationModifier
    oneshot(
        model=model,
        processor=tokenizer,
        recipe=modifier(targets="Linear", scheme=SCHEMES[format][0], ignore=["lm_head"]),
        dataset=dataset,
        num_calibration_samples=calibration.rows,
        shuffle_calibration_samples=False,
    )
    model.save_pretrained(folder)


def draw(source: str, calibration: Calibration, tokenizer: Any) -> Any:
    """Conversations drawn evenly from all rows, rendered by the model's own template, as token ids."""
    from datasets import Dataset

    if not tokenizer.chat_template:
        raise UserError(f"--model {source}: no chat template to render rows with; --calibration_data none")
    chance, drawn, seen, faults = random.Random(42), [], 0, []
    for file in readers.list_files(calibration.folder, "--calibration_data"):
        for row in rows.read_raw(file, faults):
            seen += 1
            if len(drawn) < calibration.rows:
                drawn.append(row)
            elif (place := chance.randrange(seen)) < calibration.rows:
                drawn[place] = row
    talks = []
    for where, raw in drawn:
        try:
            talks.append(rows.canonical(raw, "sft", where))
        except rows.BadRow as reason:
            faults.append(f"{where}: {reason}")
    if not drawn:
        faults.append(f"--calibration_data {calibration.folder}: holds no rows")
    if faults:
        raise UserError(*first_faults(faults, len(faults)))
    texts = [tokenizer.apply_chat_template(talk.messages, tools=talk.tools, tokenize=False) for talk in talks]
    ids = tokenizer(texts, add_special_tokens=False, truncation=True, max_length=LONGEST_ROW)["input_ids"]
    return Dataset.from_dict({"input_ids": ids})


def copy_beside(source: Path, folder: Path) -> None:
    """Tokenizer, template, generation config, code: byte for byte the source's, but the weights and config.json."""
    for file in source.iterdir():
        if file.is_file() and not f"/{file.name}".endswith(NOT_COPIED):
            shutil.copyfile(file, folder / file.name)


def prove(source: Path, export: Path, format: str) -> tuple[dict[str, Any], list[str]]:
    """(figures, what is wrong), found in a process that llm-compressor has not touched."""
    sizes = [sum(tensor.size for tensor in open_weights(folder).values()) for folder in (source, export)]
    figures: dict[str, Any] = {"bytes": sizes, "kl": float("nan"), "tokens": 0, "errors": {}}
    try:
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), die_with_parent) as clean:
            figures |= clean.submit(measure, source, export, format).result()
    except BrokenProcessPool:
        return figures, ["the process that loads source and export died (out of memory?)"]
    except UserError as error:
        return figures, [f"the export does not load: {error}"]
    return figures, judge(figures)


def judge(figures: dict[str, Any]) -> list[str]:
    """What is wrong with an export, by its figures. Not a number is wrong, too."""
    faults = [f"{name}: lost, or changed without being quantised" for name in figures["spoiled"]]
    if not figures["errors"]:
        faults.append("no matrix was quantised")
    for name, error in figures["errors"].items():
        if not error <= MAX_ERROR:
            faults.append(f"{name}: {error:.1%} away from the source (limit {MAX_ERROR:.0%})")
    if not figures["kl"] <= MAX_KL:
        faults.append(f"KL to the source is {figures['kl']:.2g} a token (limit {MAX_KL})")
    return first_faults(faults, len(faults))


def measure(source: Path, export: Path, format: str) -> dict[str, Any]:
    """KL a token, how far each quantised matrix is away, and other tensors that are not the source's."""
    os.environ["TQDM_DISABLE"] = "1"  # its bars would say nothing new
    settle()
    import torch
    from safetensors import safe_open

    from stagecraft.merging import behaviour

    def read(tensor: Tensor) -> torch.Tensor:
        with safe_open(tensor.file, "pt") as stream:
            return stream.get_tensor(tensor.name)

    before, after = open_weights(source), open_weights(export)
    errors, spoiled = {}, []
    for name, tensor in before.items():
        if name not in after:
            if name != "lm_head.weight":  # a tied one may be left out
                spoiled.append(name)
        elif after[name].dtype == SCHEMES[format][1] and f"{name}_scale" in after:
            weight, scale = read(tensor).float(), read(after[f"{name}_scale"]).float()
            errors[name] = ((weight - read(after[name]).float() * scale).norm() / weight.norm()).item()
        elif not torch.equal(read(tensor), read(after[name])):
            spoiled.append(name)
    probe = behaviour.probe(models.open_tokenizer(str(export)))
    wanted = behaviour.logits(models.load_causal(str(source)), probe)
    found = behaviour.logits(models.load_causal(str(export)), probe)
    tokens = sum(ids.shape[1] for ids in probe)
    return {"kl": behaviour.kl(wanted, found), "tokens": tokens, "errors": errors, "spoiled": spoiled}
