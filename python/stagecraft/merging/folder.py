"""All of a complete model's folder that is not weights: configuration, tokenizer, code, lineage and card."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from stagecraft import files, lineage
from stagecraft.merging.plan import Plan
from stagecraft.merging.tensors import INDEX

# config.json gets its name when the proof is done: until then nothing loads the folder by mistake.
UNPROVEN = "config.json.unproven"
TOKENIZER_FILES = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template*",
    "vocab*",
    "merges.txt",
    "*.model",
    "*.tiktoken",
)
BASE_FILES = ("*.py", "*processor_config.json", "LICENSE*", "NOTICE*", "USE_POLICY*")


def write_rest(plan: Plan, folder: Path) -> None:
    """Index, configurations, tokenizer, code and lineage into `folder`, beside its weights."""
    if len(plan.files) > 1:
        weight_map = {output.name: file for file, outputs in plan.files.items() for output in outputs}
        files.write_json(
            folder / INDEX,
            {
                "metadata": {"total_size": plan.size, "total_parameters": sum(o.numel for o in plan.outputs)},
                "weight_map": dict(sorted(weight_map.items())),
            },
        )
    _copy(plan.base.folder, BASE_FILES, folder)
    _copy(tokenizer_folder(plan), TOKENIZER_FILES, folder)
    if not plan.reward:
        files.write_json(folder / "generation_config.json", generation_config(plan, folder))
    files.write_json(folder / lineage.FILE, {"steps": steps_of(plan)})
    files.write_json(folder / UNPROVEN, config_of(plan, folder))


def _copy(source: Path, patterns: tuple[str, ...], folder: Path) -> None:
    for pattern in patterns:
        for file in source.glob(pattern):
            if file.is_file():
                shutil.copyfile(file, folder / file.name)


def tokenizer_folder(plan: Plan) -> Path:
    """The adapter's tokenizer and template are those it was trained with; the base's are a fallback."""
    adapter = plan.adapters[0].folder
    return adapter if (adapter / "tokenizer_config.json").exists() else plan.base.folder


def config_of(plan: Plan, folder: Path) -> dict[str, Any]:
    """config.json of the complete model: the base's, with what the merge changed."""
    config = {k: v for k, v in plan.base.config.items() if k not in ("_name_or_path", "torch_dtype")}
    config["dtype"] = plan.dtype
    text = config.get("text_config")
    parts = [config, *([text] if isinstance(text, dict) else [])]
    for part in parts[1:]:
        part.pop("torch_dtype", None)
        part["dtype"] = plan.dtype
    for key, value in (
        ("vocab_size", plan.vocabulary),
        ("tie_word_embeddings", False if plan.untied else None),
    ):
        if value is not None:
            holders = [part for part in parts if key in part] or [config]
            for part in holders:
                part[key] = value
    if plan.head_rows is not None:
        config["architectures"] = [
            re.sub("(ForCausalLM|LMHeadModel)$", "ForSequenceClassification", name)
            for name in config.get("architectures") or []
        ]
        config["id2label"] = {str(k): f"LABEL_{k}" for k in range(plan.head_rows)}
        config["label2id"] = {f"LABEL_{k}": k for k in range(plan.head_rows)}
    if plan.reward and config.get("pad_token_id") is None:
        config["pad_token_id"] = _token_id(folder, _special_tokens(folder).get("pad_token"))
    return config


def generation_config(plan: Plan, folder: Path) -> dict[str, Any]:
    """How to generate: the adapter's settings or the base's, and an end-of-turn token among those that end an answer."""
    for source in (plan.adapters[0].folder, plan.base.folder):
        if (source / "generation_config.json").exists():
            config = json.loads((source / "generation_config.json").read_text(encoding="utf-8"))
            break
    else:
        config = {"_from_model_config": True}
    ends = config.get("eos_token_id", plan.base.config.get("eos_token_id"))
    ends = ends if isinstance(ends, list) else [ends]
    eos = _token_id(folder, _special_tokens(folder).get("eos_token"))
    ends = list(dict.fromkeys(end for end in (_end_of_turn(folder), *ends, eos) if end is not None))
    if ends:
        config["eos_token_id"] = ends if len(ends) > 1 else ends[0]
    return config


def _special_tokens(folder: Path) -> dict[str, str]:
    """eos_token, pad_token and the like, as text."""
    found = {}
    for file in (folder / "special_tokens_map.json", folder / "tokenizer_config.json"):
        if file.exists():
            values = json.loads(file.read_text(encoding="utf-8"))
            for name, value in values.items():
                value = value.get("content") if isinstance(value, dict) else value
                if name.endswith("_token") and isinstance(value, str):
                    found[name] = value
    return found


def _tokenizer(folder: Path) -> Any:
    from tokenizers import Tokenizer

    return (
        Tokenizer.from_file(str(folder / "tokenizer.json")) if (folder / "tokenizer.json").exists() else None
    )


def _token_id(folder: Path, text: str | None) -> int | None:
    tokenizer = _tokenizer(folder) if text else None
    return tokenizer.token_to_id(text) if tokenizer else None


def template_of(folder: Path) -> str | None:
    """The chat template of a tokenizer's folder; None where it has none (or several, of which none is the default)."""
    if (folder / "chat_template.jinja").exists():
        return (folder / "chat_template.jinja").read_text(encoding="utf-8")
    if not (folder / "tokenizer_config.json").exists():
        return None
    text = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8")).get("chat_template")
    return text if isinstance(text, str) else None


def _end_of_turn(folder: Path) -> int | None:
    """The token that the chat template puts after an assistant's words, if it is a special one."""
    from stagecraft.chat.rendering import TemplateFault, renderer

    text, tokenizer = template_of(folder), _tokenizer(folder)
    if text is None or tokenizer is None:
        return None
    words = "a1"
    messages = [{"role": "user", "content": "q1"}, {"role": "assistant", "content": words}]
    try:
        shown = SimpleNamespace(special_tokens_map=_special_tokens(folder))
        rendered = "".join(renderer(text, shown)(messages, None))
    except TemplateFault:
        return None
    before, _, after = rendered.rpartition(words)
    ids = tokenizer.encode(after, add_special_tokens=False).ids if before else []
    return ids[0] if ids and ids[0] in tokenizer.get_added_tokens_decoder() else None


def steps_of(plan: Plan) -> list[dict[str, Any]]:
    """The lineage: the base's steps, and those that the adapters add."""
    steps = lineage.read(plan.base.folder)
    for adapter, weight in zip(plan.adapters, plan.weights, strict=True):
        own = lineage.read(adapter.folder)[-1:] or [{"base": adapter.config.get("base_model_name_or_path")}]
        steps = [*steps, {**own[0], "adapter": str(adapter.folder), "weight": weight}]
    return steps


def write_card(plan: Plan, folder: Path, figures: dict[str, Any]) -> None:
    """README.md: what this model was made from, and how the merge was proven."""
    lines = ["---", "library_name: transformers", f"base_model: {plan.base.folder}", "---", ""]
    lines += [f"# {plan.adapters[0].folder} merged into its base", "", "| | |", "|---|---|"]
    lines.append(f"| base | `{plan.base.folder}` |")
    for adapter, weight in zip(plan.adapters, plan.weights, strict=True):
        share = f" x {weight:g}" if weight != 1 else ""
        lines.append(f"| adapter | `{adapter.folder}`{share}, {describe(adapter)} |")
    total = sum(output.numel for output in plan.outputs)
    lines += [f"| parameters | {total:,} |", f"| dtype | {plan.dtype} |"]
    if figures:
        gap, base = (f"{figures[key]:.1e}" for key in ("gap_to_adapter", "gap_to_base"))
        unit = "in scores" if plan.reward else "KL a token"
        lines.append(f"| proof | {gap} {unit} from base + adapter, {base} from the base |")
        lines.append(
            f"| | {figures['changed']} merged tensors at most {figures['worst_ulp']:.3f} units in the last place off |"
        )
    else:
        lines.append("| proof | none (merged with --no_validate) |")
    lines += ["", "## Lineage", ""]
    for number, step in enumerate(steps_of(plan), 1):
        lines.append(f"{number}. {step.get('stage', 'adapter')}, from `{step.get('base')}`")
        for file in step.get("data", []):
            lines.append(f"   - data `{file['path']}`, {file['bytes']:,} bytes, sha256 {file['sha256']}")
        for key in ("counts", "metrics"):
            if step.get(key):
                lines.append(f"   - {key}: " + ", ".join(f"{k} {v}" for k, v in step[key].items()))
        if step.get("seed") is not None:
            lines.append(f"   - seed {step['seed']}")
    files.write_text(folder / "README.md", "\n".join(lines) + "\n")


def describe(adapter: Any) -> str:
    """'LoRA, rank 16, alpha 32, 196 modules'"""
    config = adapter.config
    kind = "DoRA" if config.get("use_dora") else "rsLoRA" if config.get("use_rslora") else "LoRA"
    whole = f", {len(adapter.whole)} whole tensors" if adapter.whole else ""
    return f"{kind}, rank {config.get('r')}, alpha {config.get('lora_alpha')}, {len(adapter.loras)} modules{whole}"
