"""Every flag: the dataclasses, one parser for YAML and command line, and the flags of older guides.

Nothing heavy is imported here, so that a wrong flag is told in well under a second.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import functools
import os
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from stagecraft import contradictions
from stagecraft.errors import UserError
from stagecraft.flags import Flag, Words, dataclass_flags, to_bool, trainer_flags

# Flags that newer transformers dropped but guides still use: old name -> (new name, value of the new flag).
RENAMED = {
    "warmup_ratio": ("warmup_steps", lambda value: value),
    "evaluation_strategy": ("eval_strategy", lambda value: value),
    "no_cuda": ("use_cpu", lambda value: value),
    "group_by_length": (
        "train_sampling_strategy",
        lambda value: "group_by_length" if to_bool(value) else "random",
    ),
}

# Trainer fields that this kit decides itself; a user who sets one is told what to use instead.
_OURS = "rows are rendered, cut and tokenised by the kit before the trainer sees them"
_PACKED = "no padding is computed anyway (--padding_free)"
DECIDED = {
    "model_init_kwargs": "use --torch_dtype, --device_map, --flash_attn",
    "max_length": "use --model_max_length (SFT) or --max_source_length and --max_target_length (RM, DPO)",
    "truncation_mode": _OURS,
    "dataset_text_field": _OURS,
    "dataset_kwargs": _OURS,
    "dataset_num_proc": "use --preprocessing_num_workers",
    "chat_template_path": "use --template_name",
    "eos_token": "it comes from the chat template",
    "pad_token": "it comes from the tokenizer",
    "assistant_only_loss": "the kit always trains on assistant turns only",
    "completion_only_loss": "the kit always trains on assistant turns only",
    "packing": _PACKED,
    "packing_strategy": _PACKED,
    "eval_packing": _PACKED,
    "auto_find_batch_size": "it changes the global batch",
    "remove_unused_columns": _OURS,
    "length_column_name": "the lengths are those of the rows",
    "label_names": _OURS,
    "include_for_metrics": "evaluations here measure the loss; evaluate_model.py measures the rest",
    "batch_eval_metrics": "evaluations here measure the loss; evaluate_model.py measures the rest",
    "prediction_loss_only": "evaluations here measure the loss; evaluate_model.py measures the rest",
    "eval_accumulation_steps": "evaluations here measure the loss, and keep no predictions",
    "eval_do_concat_batches": "evaluations here measure the loss, and keep no predictions",
    "bf16_full_eval": "an evaluation has the precision of the training around it: use --bf16",
    "fp16_full_eval": "an evaluation has the precision of the training around it: use --fp16",
    "local_rank": "torchrun sets it",
    "do_train": "a stage always trains",
    "do_eval": "use --eval_strategy",
    "do_predict": "use evaluate_model.py",
}

Lines = list[tuple[str, str, Any]]  # of a YAML file: (file:line, key, value)
ON_BAD_ROWS = ("error", "skip")
ON_LONG_ROWS = ("drop_turns", "truncate", "skip", "error")
DTYPES = ("auto", "float32", "bfloat16", "float16")


@dataclass
class ModelArguments:
    """Model"""

    model_name_or_path: str = field(metadata={"help": "model folder (or hub id) to start from"})
    torch_dtype: str = field(
        default="auto", metadata={"help": "dtype of the weights; auto: as saved", "choices": DTYPES}
    )
    device_map: str | None = field(
        default=None, metadata={"help": "spread one copy over several GPUs, e.g. auto (single process only)"}
    )
    load_in_4bit: bool = field(default=False, metadata={"help": "nf4 base weights (LoRA only)"})
    load_in_8bit: bool = field(default=False, metadata={"help": "int8 base weights (LoRA only)"})
    flash_attn: bool = field(
        default=False, metadata={"help": "FlashAttention-2 (CUDA, flash-attn installed)"}
    )
    padding_free: bool = field(
        default=True,
        metadata={"help": "compute real tokens only, rows end to end; false pads every row of a batch"},
    )
    trust_remote_code: bool = field(default=False, metadata={"help": "run code shipped with the model"})
    cache_dir: str | None = field(default=None, metadata={"help": "where hub downloads are kept"})


@dataclass
class LoraArguments:
    """LoRA"""

    use_peft: bool = field(default=True, metadata={"help": "train a LoRA adapter; false trains every weight"})
    target_modules: list[str] = field(
        default_factory=lambda: ["all"], metadata={"help": "modules to adapt; all = every linear layer"}
    )
    lora_rank: int = field(default=16, metadata={"help": "rank r"})
    lora_alpha: int = field(default=32, metadata={"help": "scale is alpha / r"})
    lora_dropout: float = field(default=0.05, metadata={"help": "dropout before the adapter"})
    use_dora: bool = field(default=False, metadata={"help": "weight-decomposed LoRA"})
    use_rslora: bool = field(default=False, metadata={"help": "scale alpha / sqrt(r)"})
    modules_to_save: list[str] | None = field(
        default=None, metadata={"help": "modules trained in full beside the adapter, e.g. embed_tokens"}
    )
    peft_path: str | None = field(default=None, metadata={"help": "go on training this adapter"})


@dataclass
class DataArguments:
    """Data"""

    train_file_dir: str = field(metadata={"help": "folder (or file) of training rows"})
    validation_file_dir: str | None = field(
        default=None,
        metadata={"help": "folder (or file) of validation rows; none: split off the training rows"},
    )
    validation_split_percentage: float = field(
        default=2.0, metadata={"help": "share split off for validation when there is no validation folder"}
    )
    max_train_samples: int | None = field(default=None, metadata={"help": "at most so many training rows"})
    max_eval_samples: int | None = field(default=None, metadata={"help": "at most so many validation rows"})
    on_bad_rows: str = field(
        default="error",
        metadata={
            "help": "rows that can't be used: stop, or count and leave out",
            "choices": ON_BAD_ROWS,
        },
    )
    preprocessing_num_workers: int | None = field(
        default=None, metadata={"help": "processes that read and tokenise (default: one a core)"}
    )
    overwrite_cache: bool = field(default=False, metadata={"help": "tokenise again"})


@dataclass
class PretrainingDataArguments(DataArguments):
    """Data"""

    block_size: int = field(default=1024, metadata={"help": "tokens a training block"})


@dataclass
class SFTDataArguments(DataArguments):
    """Data"""

    template_name: str | None = field(
        default=None, metadata={"help": "chat template templates/NAME.jinja; none: the tokenizer's own"}
    )
    model_max_length: int = field(default=2048, metadata={"help": "tokens a row at most"})
    on_long_rows: str = field(
        default="drop_turns",
        metadata={
            "help": "a row over the limit loses its oldest turns (and is left out if its last answer still does not "
            "fit), is cut, left out, or an error",
            "choices": ON_LONG_ROWS,
        },
    )


@dataclass
class PreferenceDataArguments(DataArguments):
    """Data"""

    template_name: str | None = field(
        default=None, metadata={"help": "chat template templates/NAME.jinja; none: the tokenizer's own"}
    )
    max_source_length: int = field(default=1024, metadata={"help": "tokens of the prompt at most"})
    max_target_length: int = field(default=512, metadata={"help": "tokens of an answer at most"})
    on_long_rows: str = field(
        default="drop_turns",
        metadata={
            "help": "a row over the limit loses its oldest turns (and is left out if its last answer still does not "
            "fit), is cut, left out, or an error",
            "choices": ON_LONG_ROWS,
        },
    )


@dataclass
class ReferenceArguments:
    """Reference"""

    reference_free: bool = field(
        default=False,
        metadata={
            "help": "no reference: its log-probabilities count as zero (sigmoid_norm is then SimPO, without a margin)"
        },
    )


@dataclass
class RunArguments:
    """Run"""

    output_dir: str = field(
        metadata={"help": "the stage's folder: adapter/ or model/, checkpoints/, logs/, run.json"}
    )
    overwrite_output_dir: bool = field(
        default=False, metadata={"help": "replace what a finished run left there"}
    )
    resume_from_checkpoint: str | None = field(
        default=None,
        metadata={
            "help": "True (there must be one), PATH or False (start afresh); unset: go on where there is one"
        },
    )
    resume_anyway: bool = field(
        default=False, metadata={"help": "go on although flags or data are not those of the checkpoint"}
    )
    logging_dir: str | None = field(
        default=None, metadata={"help": "TensorBoard events (default OUTPUT_DIR/logs)"}
    )


def parse(
    description: str,
    *groups: type,
    trainer: str | None = None,
    argv: list[str] | None = None,
    translate: Callable[[Lines, list[str]], Lines] | None = None,
) -> list[Any]:
    """Read `--config A.yaml B.yaml` left to right, then flags, into one instance of each dataclass.

    With `trainer` (a key of TRAINERS) the last element of the result is a dict of the trainer flags that were
    set. Raises UserError naming every unknown or malformed key, each with the nearest real one. `--check_flags`
    ends the program here, in silence when all is well: a chain of stages looks ahead with it. `translate` may tell
    the lines of a YAML file in other words first; what it finds wrong it adds to the list it is given.
    """
    flags = {flag.name: flag for group in groups for flag in dataclass_flags(group)}
    for name, flag in trainer_flags(trainer).items() if trainer else ():
        if name not in DECIDED:
            flags.setdefault(name, flag)
    argv = list(sys.argv[1:] if argv is None else argv)
    check_only = "--check_flags" in argv
    argv = [word for word in argv if word != "--check_flags"]
    faults: list[str] = []
    written = _from_command_line(description, flags, argv, faults)
    settings: dict[str, tuple[str, Any]] = {}  # name -> (where it was set, value)
    paths = written.pop("config", [])
    for path in paths:
        lines = _from_yaml(path, faults)
        for where, name, value in translate(lines, faults) if translate else lines:
            _set(settings, flags, faults, where, name, value, dashes="")
    for name, value in written.items():
        _set(settings, flags, faults, "", name, value, dashes="--")
    mistyped = bool(faults)
    given = contradictions.given(_stage(trainer, flags), settings, paths) if trainer else None
    if given:
        faults += contradictions.excluded(given) + (contradictions.idle(given) if not mistyped else [])
    if not mistyped:  # after a mistyped flag, saying that the right one is missing would only repeat it
        for flag in flags.values():
            if flag.required and flag.name not in settings:
                word = flag.name if flag.positional else f"--{flag.name}"
                faults.append(f"{word} is missing: {flag.help}")
    if faults:
        raise UserError(*faults)
    values = {name: value for name, (_, value) in settings.items()}
    result: list[Any] = []
    for group in groups:
        names = {f.name for f in dataclasses.fields(group)}
        result.append(group(**{name: values.pop(name) for name in names & values.keys()}))
    if trainer:
        result.append(values)
    if check_only:
        sys.exit(0)
    if given and os.environ.get("RANK", "0") == "0":
        for note in contradictions.notes(given):
            print(note, file=sys.stderr)
    return result


def _stage(trainer: str, flags: dict[str, Flag]) -> str:
    """Which stage's flags these are: pt and sft have the trainer in common, and blocks are for pt."""
    return {"reward": "rm", "dpo": "dpo"}.get(trainer) or ("pt" if "block_size" in flags else "sft")


def _set(
    settings: dict[str, tuple[str, Any]],
    flags: dict[str, Flag],
    faults: list[str],
    where: str,
    name: str,
    value: Any,
    dashes: str,
) -> None:
    prefix = f"{where}: " if where else ""
    if name in RENAMED and name not in flags and RENAMED[name][0] in flags:
        new, translate = RENAMED[name]
        value = value[0] if isinstance(value, Words) and value else value
        value = True if value == [] else value
        try:
            value = translate(value)
        except ValueError as error:
            faults.append(f"{prefix}{dashes}{name} {error}")
            return
        print(f"{prefix}{dashes}{name} is now {dashes}{new}: using {new}={value}", file=sys.stderr)
        name = new
    if name in DECIDED and name not in flags:
        faults.append(f"{prefix}{dashes}{name} is not a flag of the kit: {DECIDED[name]}")
        return
    if name not in flags:
        known = [*flags, *(alias for flag in flags.values() for alias in flag.aliases), "config"]
        near = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
        hint = f'; did you mean "{dashes}{near[0]}"?' if near else "; --help lists them"
        kind = "flag" if dashes else "key"
        faults.append(f'{prefix}unknown {kind} "{dashes}{name}"{hint}')
        return
    try:
        settings[name] = (where, flags[name].convert(value))
    except ValueError as error:
        faults.append(f"{prefix}{'' if flags[name].positional else dashes}{name} {error}")


def _from_command_line(
    description: str, flags: dict[str, Flag], argv: list[str], faults: list[str]
) -> dict[str, Any]:
    """Flags as written: {"config": [paths], name: words}. `--help` prints and exits."""
    if "-h" in argv or "--help" in argv:
        _print_help(description, flags)
        sys.exit(0)
    aliases = {alias: flag.name for flag in flags.values() for alias in flag.aliases}
    positional = [flag.name for flag in flags.values() if flag.positional]
    written: dict[str, Any] = {}
    current: str | None = None
    for word in argv:
        match = re.match(r"--?([A-Za-z][\w-]*)(?:=(.*))?$", word, re.DOTALL)
        if match:
            name = match[1].replace("-", "_")
            current = aliases.get(name, name)
            if current != "config" or current not in written:
                written[current] = Words()
            if match[2] is not None:
                written[current].append(match[2])
        elif current is not None and not _is_full(flags.get(current), written[current]):
            written[current].append(word)
        elif positional:
            current = None
            written.setdefault(positional[0], Words()).append(word)
            if not flags[positional[0]].is_list:
                positional.pop(0)
        else:
            faults.append(f'stray word "{word}": values follow a flag (--name value)')
    if "config" in written and not written["config"]:
        faults.append("--config needs the path of a YAML file")
    return written


def _is_full(flag: Flag | None, words: list[str]) -> bool:
    return flag is not None and not flag.is_list and len(words) >= 1


def _from_yaml(path: str, faults: list[str]) -> Lines:
    """A recipe file -> [(file:line, key, value)]; faults are added, not raised."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except OSError as error:
        faults.append(f"--config {path}: {error.strerror or error}")
        return []
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        faults.append(
            f"{path}:{line}: not UTF-8 (byte 0x{error.object[error.start]:02x}); convert the file to UTF-8"
        )
        return []
    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        values = yaml.safe_load(text)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if mark else ""
        faults.append(f"{path}{line}: not YAML: {getattr(error, 'problem', None) or error}")
        return []
    if values is None:
        return []
    if not isinstance(values, dict):
        faults.append(f'{path}:1: must hold "flag: value" lines')
        return []
    found: Lines = []
    seen: set[str] = set()
    for key, _ in node.value:
        where = f"{path}:{key.start_mark.line + 1}"
        if key.value in seen:
            faults.append(f'{where}: "{key.value}" stands twice')
        seen.add(key.value)
        found.append((where, key.value, values.get(key.value)))
    return found


def _print_help(description: str, flags: dict[str, Flag]) -> None:
    """Flags by group; the trainers' own flags come last, with the first sentence of their help."""
    parser = argparse.ArgumentParser(
        description=description.strip(),
        formatter_class=functools.partial(
            argparse.RawDescriptionHelpFormatter, width=110, max_help_position=34
        ),
        add_help=False,
        usage="%(prog)s [--config A.yaml B.yaml] [--flag value ...] [--check_flags | --help]",
    )
    sections: dict[str, Any] = {}
    ours = [flag for flag in flags.values() if flag.group != "Trainer"]
    theirs = [flag for flag in flags.values() if flag.group == "Trainer"]
    for flag in ours + theirs:
        section = sections.get(flag.group)
        if section is None:
            section = sections[flag.group] = parser.add_argument_group(flag.group)
        text = flag.help.strip() if flag in ours else re.split(r"(?<=[.!?])\s", flag.help.strip())[0]
        text = text.replace("%", "%%")
        if flag.default is not None and not flag.required:
            text += f" [{flag.default}]"
        spelled = [f"{'-' if len(name) == 1 else '--'}{name}" for name in (flag.name, *flag.aliases)]
        names = [flag.name] if flag.positional else spelled
        word = "|".join(flag.choices or sorted(kind.__name__ for kind in flag.kinds))
        if flag.positional:
            word = flag.name.upper()
            text += f" (or {', '.join(spelled)})"
        elif flag.is_list:
            word = "VALUE"
        section.add_argument(*names, help=text, metavar=f"{word} ..." if flag.is_list else word)
    parser.print_help()
