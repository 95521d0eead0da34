"""Merge LoRA adapters into their base: one complete model, proven after it was written.

    python python/merge_lora.py --base_model BASE --lora_model ADAPTER --output_dir MERGED
    python python/merge_lora.py ADAPTER -o MERGED                 (base from adapter_config.json)
    python python/merge_lora.py A B --weights 0.7 0.3 -o MERGED   (W + 0.7 dW_A + 0.3 dW_B)
    python python/merge_lora.py --stage_dir outputs-sft/tiny      (adapter/ -> model/, then DONE)

Memory stays under 700 MB whatever the model's size; the proof's last part loads base and model one after the other.
After full-parameter training --stage_dir only checks that model/ is complete and writes DONE. Exit status 1: the
proof failed; what was written is kept beside the output folder as OUTPUT.failed, and nothing else was touched.
"""

import os
import shutil
import time
from dataclasses import dataclass, field
from pathlib import Path

from stagecraft import files, models, run
from stagecraft.arguments import DTYPES, parse
from stagecraft.errors import UserError, run_main
from stagecraft.merging.folder import describe
from stagecraft.merging.inputs import plan_merge
from stagecraft.merging.making import Proof, check_room, make_model
from stagecraft.merging.plan import Plan


@dataclass
class MergeArguments:
    """Merge"""

    lora_model: list[str] | None = field(
        default=None, metadata={"help": "adapter folders", "positional": True, "aliases": ["sft_lora"]}
    )
    base_model: str | None = field(
        default=None, metadata={"help": "full-precision base (default: the one adapter_config.json names)"}
    )
    output_dir: str | None = field(
        default=None, metadata={"help": "folder of the complete model", "aliases": ["output", "o"]}
    )
    weights: list[float] | None = field(
        default=None, metadata={"help": "a factor for each adapter (default 1)"}
    )
    dtype: str = field(
        default="auto", metadata={"help": "of the result; auto: the base's", "choices": DTYPES}
    )
    device: str = field(
        default="auto",
        metadata={
            "help": "where the behaviour check runs; merging is the CPU's",
            "choices": ("auto", "cpu", "cuda"),
        },
    )
    validate: bool = field(default=True, metadata={"help": "prove the result before it gets its name"})
    no_validate: bool = field(default=False, metadata={"help": "leave the proof out"})
    test_prompt: str | None = field(
        default=None, metadata={"help": "a question for the merged model to answer"}
    )
    trust_remote_code: bool = field(
        default=False, metadata={"help": "run code shipped with the base (for the proof)"}
    )
    stage_dir: str | None = field(
        default=None, metadata={"help": "a stage's folder: its adapter/ becomes its model/"}
    )
    overwrite_output_dir: bool = field(default=False, metadata={"help": "replace an existing output folder"})


def main() -> None:
    [args] = parse(__doc__, MergeArguments)
    # Threads that wait sleep soon, as in console.settle_libraries, which would import transformers.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ.setdefault("GOMP_SPINCOUNT", "2000")
    check_flags(args)
    if args.stage_dir is None:
        merge(args, plan_merge(args.base_model, args.lora_model, args.weights, args.dtype), output_of(args))
        return
    folder = Path(args.stage_dir)
    if not (folder / "TRAINED").exists():
        raise UserError(f"--stage_dir {folder}: no finished training there (TRAINED is missing)")
    with run.lock(folder), run.tee(folder / "logs" / "train.log"):
        (folder / "DONE").unlink(missing_ok=True)
        if (folder / "adapter").exists():
            plan = plan_merge(args.base_model, [str(folder / "adapter")], args.weights, args.dtype)
            merge(args, plan, folder / "model")
            run.note_outputs(folder, "model")
        shutil.rmtree(
            folder / "checkpoints", ignore_errors=True
        )  # a kill may have come between TRAINED and this
        models.require_model_folder(str(folder / "model"), "--stage_dir")
        files.write_text(folder / "DONE", f"{folder / 'model'}\n")


def check_flags(args: MergeArguments) -> None:
    """Raises UserError with all that is missing or contradicts itself."""
    faults = []
    if args.stage_dir is None:
        faults += [
            f"--{name} is missing" for name in ("lora_model", "output_dir") if getattr(args, name) is None
        ]
    else:
        faults += [
            f"--{name} and --stage_dir: a stage's folder says where both are; give one of the two"
            for name in ("lora_model", "output_dir")
            if getattr(args, name) is not None
        ]
    if args.no_validate or not args.validate:
        args.validate = False
        if args.test_prompt is not None:
            faults.append("--test_prompt is answered in the proof: leave out --no_validate")
    if faults:
        raise UserError(*faults)


def output_of(args: MergeArguments) -> Path:
    """The output folder. Raises UserError where something is there that must not be replaced."""
    output = Path(args.output_dir)
    if output.exists() and not output.is_dir():
        raise UserError(f"--output_dir {output}: is a file; name a folder")
    if output.exists() and any(output.iterdir()):
        if not args.overwrite_output_dir:
            raise UserError(f"--output_dir {output}: not empty; --overwrite_output_dir replaces it")
        if not (output / "config.json").exists():
            raise UserError(
                f"--output_dir {output}: holds no model that could be replaced; choose another folder"
            )
    return output


def merge(args: MergeArguments, plan: Plan, output: Path) -> None:
    """Make the complete model and report it."""
    began = time.time()
    proof = Proof(args.device, args.trust_remote_code, args.test_prompt) if args.validate else None
    check_room(plan, output, proof)
    print(f"base model  {plan.base.folder}")
    for adapter, weight in zip(plan.adapters, plan.weights, strict=True):
        print(
            f"adapter     {adapter.folder} ({describe(adapter)}{f', weight {weight:g}' if weight != 1 else ''})"
        )
    lora = sum(adapter.parameters for adapter in plan.adapters)
    total = sum(written.numel for written in plan.outputs)
    print(f"output      {output}")
    print(
        f"parameters  {lora:,} of the adapter, {total:,} of the model: {lora / total:.2%}; weights in {plan.dtype}"
    )
    for note in plan.notes():
        print(f"note        {note}")
    say_result(plan, output, make_model(plan, output, proof), time.time() - began)


def say_result(plan: Plan, output: Path, figures: dict, seconds: float) -> None:
    """The files, the verdict and the pace."""
    sizes = [(file.name, file.stat().st_size) for file in output.iterdir()]
    written = sorted(sizes, key=lambda item: (-item[1], item[0]))
    for name, size in written:
        print(f"  {size / 1e6:10,.2f} MB  {name}")
    print(f"  {sum(size for _, size in written) / 1e6:10,.2f} MB  in {len(written)} files")
    if "answer" in figures:
        print(f"answer      {figures['answer']}")
    rate = plan.size / 1e9 / figures["write_seconds"]
    proven = "proven to be base + adapter" if "gap_to_adapter" in figures else "not proven (--no_validate)"
    print(
        f"complete model, {proven}: weights there, no adapter_config.json; written in "
        f"{figures['write_seconds']:.1f} s ({rate:.2f} GB/s), {seconds:.1f} s in all",
        flush=True,
    )


if __name__ == "__main__":
    run_main(main)
