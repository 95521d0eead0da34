"""Merge a LoRA adapter into its base: one complete model, checked after it was written.

    python python/merge_lora.py --base_model BASE --lora_model ADAPTER --output_dir MERGED
    python python/merge_lora.py ADAPTER -o MERGED                 (base from adapter_config.json)
    python python/merge_lora.py --stage_dir outputs-sft/tiny      (adapter/ -> model/, then DONE)

After full-parameter training --stage_dir only checks that model/ is complete and writes DONE.
"""

import json
import time
from dataclasses import dataclass, field
from pathlib import Path

from stagecraft import files, merging, models, run
from stagecraft.arguments import parse
from stagecraft.console import settle_libraries
from stagecraft.errors import UserError, run_main
from stagecraft.merging import Paths


@dataclass
class MergeArguments:
    """Merge"""

    lora_model: str | None = field(
        default=None, metadata={"help": "adapter folder", "positional": True, "aliases": ["sft_lora"]}
    )
    base_model: str | None = field(
        default=None, metadata={"help": "full-precision base (default: the one adapter_config.json names)"}
    )
    output_dir: str | None = field(
        default=None, metadata={"help": "folder of the complete model", "aliases": ["output", "o"]}
    )
    stage_dir: str | None = field(
        default=None, metadata={"help": "a stage's folder: its adapter/ becomes its model/"}
    )
    overwrite_output_dir: bool = field(default=False, metadata={"help": "replace an existing output folder"})


def main() -> None:
    [args] = parse(__doc__, MergeArguments)
    began = time.time()
    settle_libraries()
    if args.stage_dir is None:
        paths = chosen_paths(args)
        report(paths, merging.merge(paths, merging.check_inputs(paths), print_step), began)
        return
    folder = Path(args.stage_dir)
    if not (folder / "TRAINED").exists():
        raise UserError(f"--stage_dir {folder}: no finished training there (TRAINED is missing)")
    with run.lock(folder), run.tee(folder / "logs" / "train.log"):
        (folder / "DONE").unlink(missing_ok=True)
        if (folder / "adapter").exists():
            paths = Paths(base_of(folder / "adapter"), folder / "adapter", folder / "model")
            report(paths, merging.merge(paths, merging.check_inputs(paths), print_step), began)
        models.require_model_folder(str(folder / "model"), "--stage_dir")
        files.write_text(folder / "DONE", f"{folder / 'model'}\n")


def chosen_paths(args: MergeArguments) -> Paths:
    """The three folders from the flags, with what is missing told at once."""
    faults = [f"--{name} is missing" for name in ("lora_model", "output_dir") if getattr(args, name) is None]
    if faults:
        raise UserError(*faults)
    adapter, output = Path(args.lora_model), Path(args.output_dir)
    base = Path(args.base_model) if args.base_model else base_of(adapter)
    if output.exists() and not output.is_dir():
        raise UserError(f"--output_dir {output}: is a file; name a folder")
    if output.resolve() in (base.resolve(), adapter.resolve()):
        raise UserError(f"--output_dir {output}: is an input of the merge; choose another folder")
    if output.exists() and any(output.iterdir()):
        if not args.overwrite_output_dir:
            raise UserError(f"--output_dir {output}: not empty; --overwrite_output_dir replaces it")
        if not (output / "config.json").exists():
            raise UserError(
                f"--output_dir {output}: holds no model that could be replaced; choose another folder"
            )
    return Paths(base, adapter, output)


def base_of(adapter: Path) -> Path:
    """The base an adapter was trained on, as its configuration names it."""
    try:
        config = json.loads((adapter / "adapter_config.json").read_text())
    except OSError:
        raise UserError(
            f"--lora_model {adapter}: no adapter_config.json there: this is not an adapter"
        ) from None
    except ValueError as error:
        raise UserError(f"--lora_model {adapter}: adapter_config.json is not JSON: {error}") from None
    if not config.get("base_model_name_or_path"):
        raise UserError(f"--lora_model {adapter}: names no base; give it with --base_model")
    return Path(config["base_model_name_or_path"])


def print_step(line: str) -> None:
    print(line, flush=True)


def report(paths: Paths, figures: dict, began: float) -> None:
    """What was merged from where, what was written, and the verdict."""
    lora, total = figures["lora_parameters"], figures["total_parameters"]
    print(f"base model  {paths.base}\nadapter     {paths.adapter}\noutput      {paths.output}")
    print(
        f"parameters  {lora:,} LoRA of {total + lora:,} = {lora / (total + lora):.2%}, weights in {figures['dtype']}"
    )
    written = merging.files_of(paths.output)
    for name, size in written:
        print(f"  {size / 1e6:10,.2f} MB  {name}")
    print(f"  {sum(size for _, size in written) / 1e6:10,.2f} MB  in {len(written)} files")
    if "kl_to_adapter" in figures:
        proof = f"KL to base+adapter {figures['kl_to_adapter']:.1e} a token (base alone {figures['kl_to_base']:.1e})"
    else:
        proof = f"scores within {figures['score_gap']:.1e} of base+adapter"
    print(
        f"complete model: weights there, no adapter_config.json, {proof}; {time.time() - began:.1f} s",
        flush=True,
    )


if __name__ == "__main__":
    run_main(main)
