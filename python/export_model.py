"""Export a finished model for vLLM: weights and activations in 8 bits, measured against the model it was made from.

    make export STAGE=dpo FORMAT=fp8
    python python/export_model.py --model outputs-dpo/tiny/model --format int8 --calibration_data data/finetune

Runs in an environment of its own (.venv-export): scripts/export.sh makes it and calls this script.
"""

import json
import shutil
import time
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

from stagecraft import exporting, files, lineage, models
from stagecraft.arguments import parse
from stagecraft.data import readers
from stagecraft.errors import ProofFailed, UserError, run_main
from stagecraft.exporting import Calibration
from stagecraft.merging.tensors import Damaged, open_weights


@dataclass
class ExportArguments:
    """Export"""

    model: str = field(metadata={"help": "folder of a complete model, e.g. outputs-dpo/tiny/model"})
    format: str = field(default="fp8", metadata={"help": "8-bit format", "choices": tuple(exporting.SCHEMES)})
    output_dir: str | None = field(
        default=None, metadata={"help": "folder of the export (default: outputs-export/RECIPE/STAGE-FORMAT)"}
    )
    calibration_data: str = field(
        default="auto",
        metadata={"help": "int8: folder of conversations; none: no data; auto: data/finetune"},
    )
    calibration_rows: int = field(default=128, metadata={"help": "int8: conversations drawn from it"})
    overwrite_output_dir: bool = field(default=False, metadata={"help": "replace an existing export"})


def main() -> None:
    [args] = parse(__doc__, ExportArguments)
    output, calibration = check(args)
    began = time.time()
    exporting.settle()
    temporary = output.with_name(f".{output.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        exporting.quantise(args.model, args.format, calibration, temporary)
        exporting.copy_beside(Path(args.model), temporary)
        print("measuring source and export in a clean process", flush=True)
        figures, faults = exporting.prove(Path(args.model), temporary, args.format)
        report = describe(args, calibration, output, figures)
        print("\n".join(f"{name:12} {text}" for name, text in report.items()))
        write_card(Path(args.model), temporary, output, report)
        step = {"stage": "export", "format": report["format"], "metrics": {"kl": figures["kl"]}}
        files.write_json(temporary / lineage.FILE, lineage.after(args.model, step))
        if faults:
            failed = output.with_name(f"{output.name}.failed")
            files.replace_folder(temporary, failed)
            raise ProofFailed("\n".join([*faults, f"kept as {failed} to look at"]))
        files.replace_folder(temporary, output)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    if figures["kl"] > exporting.WARN_KL:
        print(
            f"warning: KL {figures['kl']:.2g} a token is much (over {exporting.WARN_KL}); evaluate it before you serve it"
        )
    print(f"complete model for vLLM: {output}; {time.time() - began:.1f} s", flush=True)


def check(args: ExportArguments) -> tuple[Path, Calibration]:
    """(output folder, what to calibrate with) after everything that can be checked without loading a model was."""
    source, faults = Path(args.model), []
    if not source.is_dir():
        raise UserError(f"--model {source}: no such folder")
    models.require_model_folder(args.model, "--model")
    config = config_of(source)
    if "ForSequenceClassification" in "".join(config.get("architectures") or ()):
        faults.append(
            f"--model {source}: a reward model, which scores answers and gives none: there is nothing to serve"
        )
    if config.get("quantization_config"):
        faults.append(f"--model {source}: its weights are quantised; export the full-precision model")
    try:
        size = sum(tensor.size for tensor in open_weights(source).values())
    except Damaged as fault:
        raise UserError(*faults, f"--model {source}: {fault}") from None
    output = output_of(source, args, faults)
    default = "data/finetune" if args.format == "int8" else None
    data = {"auto": default, "none": None}.get(args.calibration_data, args.calibration_data)
    if data and args.format != "int8":
        faults.append(f"--calibration_data {data}: {args.format} takes no data; leave it out")
    elif data:
        try:
            readers.list_files(data, "--calibration_data")
        except UserError as error:
            faults.append(f"{error}; --calibration_data none exports without data")
    if args.calibration_rows < 1:
        faults.append(f"--calibration_rows must be at least 1, not {args.calibration_rows}")
    if faults:
        raise UserError(*faults)
    files.require_free_disk(output, size)
    return output, Calibration(data, args.calibration_rows)


def config_of(folder: Path) -> dict[str, Any]:
    try:
        return json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"--model {folder}: config.json is not JSON: {error}") from None


def output_of(source: Path, args: ExportArguments, faults: list[str]) -> Path:
    """The folder of the export: --output_dir, or outputs-export/ beside the stage's folder."""
    if args.output_dir is None:
        stage, recipe, name = ("", "", *source.parts)[-3:]
        if not stage.startswith("outputs-") or name != "model":
            faults.append(f"--output_dir is missing: {source} is no outputs-STAGE/RECIPE/model")
            return source
        folder = f"{stage.removeprefix('outputs-')}-{args.format}"
        output = Path(*source.parts[:-3], "outputs-export", recipe, folder)
    else:
        output = Path(args.output_dir)
    if output.exists() and not output.is_dir():
        faults.append(f"--output_dir {output}: is a file; name a folder")
    elif output.resolve() in (source.resolve(), *source.resolve().parents):
        faults.append(f"--output_dir {output}: holds the model to export; choose another folder")
    elif output.exists() and any(output.iterdir()):
        if not args.overwrite_output_dir:
            faults.append(f"--output_dir {output}: not empty; --overwrite_output_dir replaces it")
        elif not (output / "config.json").exists() or "quantization_config" not in config_of(output):
            faults.append(
                f"--output_dir {output}: holds no export that could be replaced; choose another folder"
            )
    return output


def describe(
    args: ExportArguments, calibration: Calibration, output: Path, figures: dict[str, Any]
) -> dict[str, str]:
    """The report, line by line; the model card has the same."""
    errors, (before, after) = figures["errors"], figures["bytes"]
    worst = max(errors, key=errors.get) if errors else "-"
    made_with = ", ".join(f"{name} {version(name)}" for name in ("llmcompressor", "compressed-tensors"))
    return {
        "source": args.model,
        "export": str(output),
        "format": f"{args.format} ({exporting.SCHEMES[args.format][0]}), {calibration}; {made_with}",
        "weights": f"{before / 1e6:,.2f} MB -> {after / 1e6:,.2f} MB, {len(errors)} matrices in 8 bits",
        "worst matrix": f"{errors.get(worst, 1):.2%} away from the source (limit {exporting.MAX_ERROR:.0%}): {worst}",
        "KL": f"{figures['kl']:.2g} a token to the source, over {figures['tokens']} tokens (limit {exporting.MAX_KL})",
    }


def write_card(source: Path, folder: Path, output: Path, report: dict[str, str]) -> None:
    """README.md: the report and, below it, the source's own card without its YAML head."""
    lines = [f"# {output.parent.name} {output.name}", "", "| | |", "|---|---|"]
    lines += [f"| {name} | {text} |" for name, text in report.items()]
    lines += [
        "",
        "What is not in 8 bits (embeddings, norms, lm_head) is the source's. Serve it with vLLM:",
        "",
    ]
    lines += [f"    vllm serve {output}", ""]
    if (source / "README.md").exists():
        card = (source / "README.md").read_text(encoding="utf-8")
        lines += [
            "## Card of the source",
            "",
            card.split("\n---\n", 1)[-1] if card.startswith("---\n") else card,
        ]
    files.write_text(folder / "README.md", "\n".join(lines))


if __name__ == "__main__":
    run_main(main)
