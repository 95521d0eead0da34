"""LoRA adapter + base -> one complete model, through PEFT, with the result checked before it gets its name."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stagecraft import files
from stagecraft.errors import UserError
from stagecraft.models import without_load_report

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

# KL per token between base+adapter and the saved merge. Rounding to the dtype gives 1e-7 in fp32 and about 1e-3 in
# bf16; a wrong scale or a lost template gives 0.8 and more.
KL_LIMIT = {"float32": 1e-5, "bfloat16": 1e-2, "float16": 1e-2}
TOKENIZER_FILES = (
    "tokenizer*",
    "special_tokens_map.json",
    "chat_template*",
    "vocab*",
    "merges.txt",
    "added_tokens.json",
)


@dataclass
class Paths:
    """The three folders of a merge."""

    base: Path
    adapter: Path
    output: Path


def check_inputs(paths: Paths) -> dict[str, Any]:
    """The adapter's configuration, after everything that can be checked without loading a model was.

    Raises UserError listing all faults.
    """
    faults = []
    config: dict[str, Any] = {}
    if not (paths.adapter / "adapter_config.json").exists():
        faults.append(f"--lora_model {paths.adapter}: no adapter_config.json there: this is not an adapter")
    else:
        config = _read_config(paths.adapter / "adapter_config.json", "--lora_model", faults)
        if config and config.get("peft_type") != "LORA":
            faults.append(
                f"--lora_model {paths.adapter}: a {config.get('peft_type')} adapter; only LoRA can be merged"
            )
        if not (paths.adapter / "adapter_model.safetensors").exists():
            faults.append(f"--lora_model {paths.adapter}: adapter_model.safetensors is missing")
        else:
            _check_whole(paths.adapter / "adapter_model.safetensors", "--lora_model", faults)
    if not (paths.base / "config.json").exists():
        faults.append(f"--base_model {paths.base}: no config.json there: this is not a model folder")
    else:
        if _read_config(paths.base / "config.json", "--base_model", faults).get("quantization_config"):
            faults.append(
                f"--base_model {paths.base}: its weights are quantised; merge into the full-precision base"
            )
        if not any(paths.base.glob("*.safetensors")):
            faults.append(f"--base_model {paths.base}: no *.safetensors there")
        for file in sorted(paths.base.glob("*.safetensors")):
            _check_whole(file, "--base_model", faults)
    if faults:
        raise UserError(*faults)
    size = sum(file.stat().st_size for file in paths.base.glob("*.safetensors"))
    files.require_free_disk(paths.output, round(size * 1.1))
    return config


def merge(paths: Paths, config: dict[str, Any], say: Callable[[str], None]) -> dict[str, Any]:
    """Merge, save under a temporary name, check what was written, then give it its name. Returns the figures."""
    import torch
    from peft import PeftModel
    from transformers import AutoTokenizer

    reward = config.get("task_type") == "SEQ_CLS"
    say(f"[1/4] loading {paths.base}")
    base = _load(paths.base, reward)
    dtype = str(base.dtype).removeprefix("torch.")
    total = sum(p.numel() for p in base.parameters())  # before the adapter joins them
    say(f"[2/4] adding {paths.adapter}")
    try:
        model = PeftModel.from_pretrained(base, str(paths.adapter)).eval()
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[-1].strip()
        raise UserError(
            f"--lora_model {paths.adapter}: does not fit --base_model {paths.base}: {reason}"
        ) from None
    _check_modules(model, paths)
    lora = sum(p.numel() for n, p in model.named_parameters() if "lora_" in n or "modules_to_save" in n)
    tokenizer = AutoTokenizer.from_pretrained(_tokenizer_folder(paths))
    probe = _probe(tokenizer, base.config.vocab_size)
    with torch.inference_mode():
        with model.disable_adapter():
            untouched = model(probe).logits.float()
        wanted = model(probe).logits.float()
    say("[3/4] merging and writing")
    merged = model.merge_and_unload()
    temporary = paths.output.with_name(f".{paths.output.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    merged.save_pretrained(temporary)
    _copy_beside_weights(paths, temporary)
    del base, model, merged
    say("[4/4] checking what was written")
    check_written(temporary, paths, config, dtype)
    with torch.inference_mode():
        found = _load(temporary, reward)(probe).logits.float()
    figures = {"lora_parameters": lora, "total_parameters": total, "dtype": dtype}
    figures |= _check_behaviour(wanted, found, untouched, dtype, reward)
    files.replace_folder(temporary, paths.output)
    return figures


def _read_config(file: Path, flag: str, faults: list[str]) -> dict[str, Any]:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        faults.append(f"{flag} {file.parent}: {file.name} is not JSON: {error}")
        return {}


def _check_whole(file: Path, flag: str, faults: list[str]) -> None:
    """A safetensors file says in its header how long it is; an interrupted copy is shorter."""
    try:
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            header = json.loads(stream.read(min(length, 100_000_000)))
        end = max(
            (item["data_offsets"][1] for name, item in header.items() if name != "__metadata__"), default=0
        )
        whole = 8 + length + end == file.stat().st_size
    except (ValueError, AttributeError, KeyError, TypeError):
        whole = False
    if not whole:
        faults.append(f"{flag} {file.parent}: {file.name} is cut off or damaged; copy it again")


def _check_modules(model: Any, paths: Paths) -> None:
    """Every adapted module of the file is one of the base, and the other way round: PEFT skips what is not."""
    filed = {name.split(".lora_")[0] for name, _ in _tensors(paths.adapter) if ".lora_" in name}
    loaded = {name.split(".lora_")[0] for name, _ in model.named_parameters() if ".lora_" in name}
    odd = sorted(filed ^ loaded)
    if odd:
        side = "the base has no" if odd[0] in filed else "the adapter has nothing for"
        raise UserError(
            f"--lora_model {paths.adapter}: does not fit --base_model {paths.base}: "
            f"{side} {odd[0].removeprefix('base_model.model.')} ({len(odd)} modules differ)"
        )


def check_written(folder: Path, paths: Paths, config: dict[str, Any], dtype: str) -> None:
    """Every tensor of the base is there with its shape and dtype; what the adapter does not touch is bit-identical.

    Raises RuntimeError naming the tensor: the merge itself went wrong, not its inputs.
    """
    import torch

    if (folder / "adapter_config.json").exists():
        raise RuntimeError(f"{folder}: adapter_config.json is still there: this is no complete model")
    written, before = dict(_tensors(folder)), dict(_tensors(paths.base))
    heads = {"lm_head.weight", "score.weight"}  # a reward model swaps one for the other
    lost = before.keys() - written.keys() - heads
    strange = written.keys() - before.keys() - heads
    if lost or strange:
        raise RuntimeError(f"{folder}: tensors lost: {sorted(lost)[:3]}, unknown: {sorted(strange)[:3]}")
    touched = _touched_modules(paths.adapter)
    changed = 0
    for name in before.keys() & written.keys():
        old, new = before[name](), written[name]()
        if old.shape != new.shape or str(new.dtype) != f"torch.{dtype}":
            raise RuntimeError(
                f"{name}: {tuple(old.shape)} {old.dtype} became {tuple(new.shape)} {new.dtype}"
            )
        if not torch.isfinite(new).all():
            raise RuntimeError(f"{name}: not every number is finite after merging")
        same = torch.equal(old, new)
        if not same and name.rsplit(".", 1)[0] not in touched:
            raise RuntimeError(f"{name}: changed, though the adapter does not touch it")
        changed += not same
    if changed == 0 and not _is_untrained(paths.adapter):
        raise RuntimeError(f"{folder}: no tensor differs from the base: the adapter was not merged")


def files_of(folder: Path) -> list[tuple[str, int]]:
    """(name, bytes) of the files in a model folder, the largest first."""
    sizes = [(file.name, file.stat().st_size) for file in folder.iterdir() if file.is_file()]
    return sorted(sizes, key=lambda item: (-item[1], item[0]))


def _load(folder: Path, reward: bool) -> PreTrainedModel:
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    if reward:
        with without_load_report():  # a causal base has no score head; the adapter brings it
            return AutoModelForSequenceClassification.from_pretrained(
                folder, num_labels=1, dtype="auto"
            ).eval()
    return AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()


def _tokenizer_folder(paths: Paths) -> Path:
    """The adapter's tokenizer and template are those it was trained with; the base's are a fallback."""
    return paths.adapter if (paths.adapter / "tokenizer_config.json").exists() else paths.base


def _copy_beside_weights(paths: Paths, folder: Path) -> None:
    source = _tokenizer_folder(paths)
    for pattern in TOKENIZER_FILES:
        for file in source.glob(pattern):
            shutil.copyfile(file, folder / file.name)
    for file in (paths.adapter / "generation_config.json",):
        if file.exists():
            shutil.copyfile(file, folder / file.name)


def _probe(tokenizer: Any, vocab_size: int) -> torch.Tensor:
    """Token ids [1, 64] that visit words of the whole vocabulary; fixed, so that a merge is reproducible."""
    import torch

    usable = min(vocab_size, len(tokenizer))
    return (torch.arange(64) * 7919 % usable)[None]


def _check_behaviour(
    wanted: torch.Tensor, found: torch.Tensor, untouched: torch.Tensor, dtype: str, reward: bool
) -> dict[str, float]:
    if reward:
        gap = (wanted - found).abs().max().item()
        limit = 1e-3 if dtype == "float32" else 5e-2
        if not gap <= limit:
            raise RuntimeError(
                f"the merged reward model scores {gap:.3g} away from base + adapter (limit {limit})"
            )
        return {"score_gap": gap}
    kl, moved = _kl(wanted, found), _kl(wanted, untouched)
    if not kl <= KL_LIMIT.get(dtype, 1e-2):
        raise RuntimeError(
            f"the merged model is {kl:.3g} KL a token away from base + adapter (limit {KL_LIMIT[dtype]})"
        )
    return {"kl_to_adapter": kl, "kl_to_base": moved}


def _kl(p: torch.Tensor, q: torch.Tensor) -> float:
    import torch

    p, q = p.double().log_softmax(-1), q.double().log_softmax(-1)
    return torch.nn.functional.kl_div(q, p, log_target=True, reduction="none").sum(-1).mean().item()


def _tensors(folder: Path) -> Iterator[tuple[str, Callable[[], torch.Tensor]]]:
    from safetensors import safe_open

    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as stream:
            for name in stream.keys():  # noqa: SIM118 -- safe_open has no other iterator
                yield name, lambda file=file, name=name: _read(file, name)


def _read(file: Path, name: str) -> torch.Tensor:
    from safetensors import safe_open

    with safe_open(file, "pt") as stream:
        return stream.get_tensor(name)


def _touched_modules(adapter: Path) -> set[str]:
    """Names of the base's modules that the adapter's tensors belong to, as the base's file spells them."""
    touched = set()
    for name, _ in _tensors(adapter):
        module = name.removeprefix("base_model.model.").split(".lora_")[0]
        touched |= {module, module.removesuffix(".weight"), module.removesuffix(".bias")}
    return touched


def _is_untrained(adapter: Path) -> bool:
    """True where every B matrix is still zero: such an adapter changes nothing, and rightly so."""
    return not any(read().any() for name, read in _tensors(adapter) if "lora_A" not in name)
