"""How each contender is started on the same model and rows: the kit's own script, the libraries, LLaMA-Factory."""

import dataclasses
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
SCRIPTS = {"sft": "supervised_finetuning.py", "pt": "pretraining.py", "dpo": "dpo_training.py"}
STAGES = {
    "trl-default": ("sft", "pt", "dpo"),
    "trl-grouped": ("sft", "pt"),
    "trl-packing": ("sft", "pt"),
    "transformers": ("sft", "pt"),
    "llamafactory": ("sft", "pt", "dpo"),
    "llamafactory-neat": ("sft",),
}


@dataclass
class Settings:
    """What is the same for all."""

    stage: str
    model: str
    rows: str
    limit: int  # tokens of a row at most
    rank: int
    batch: int
    epochs: int
    learning_rate: float
    bf16: bool
    checkpointing: bool
    use_cpu: bool
    logging_steps: int
    template: str = str(ROOT / "templates" / "chatml.jinja")
    seed: int = 42

    @property
    def alpha(self) -> int:
        """Twice the rank, so that the adapter's scale is 2."""
        return 2 * self.rank


def command(name: str, settings: Settings, folder: Path, peer_python: str | None) -> list[str]:
    """What to run in the (new, empty) folder; its report will be folder/report.json."""
    python = peer_python if name.startswith("llamafactory") else sys.executable
    watched = [str(python), str(HERE / "observe.py"), str(folder / "report.json")]
    if name == "ours":
        return [*watched, str(ROOT / "python" / SCRIPTS[settings.stage]), *our_flags(settings, folder)]
    file = folder / "settings.json"
    if name.startswith("llamafactory"):
        file = folder / "settings.yaml"  # JSON is YAML, too
        file.write_text(json.dumps(factory_settings(name, settings, folder)))
        return [*watched, "-m", "llamafactory.cli", "train", str(file)]
    file.write_text(json.dumps(dataclasses.asdict(settings) | {"alpha": settings.alpha}))
    return [*watched, str(HERE / "libraries.py"), name, str(file)]


def our_flags(settings: Settings, folder: Path) -> list[str]:
    """The kit's flags; what is not named here is its default."""
    flags: dict[str, Any] = {
        "model_name_or_path": settings.model,
        "train_file_dir": settings.rows,
        "output_dir": folder / "out",
        "validation_split_percentage": 0,
        "torch_dtype": "bfloat16" if settings.bf16 else "float32",
        "lora_rank": settings.rank,
        "lora_alpha": settings.alpha,
        "lora_dropout": 0.0,
        "per_device_train_batch_size": settings.batch,
        "num_train_epochs": settings.epochs,
        "learning_rate": settings.learning_rate,
        "lr_scheduler_type": "constant",
        "bf16": settings.bf16,
        "gradient_checkpointing": settings.checkpointing,
        "logging_steps": settings.logging_steps,
        "save_strategy": "no",
        "report_to": "none",
        "seed": settings.seed,
    }
    flags |= {
        "sft": {"model_max_length": settings.limit},
        "pt": {"block_size": settings.limit},
        "dpo": {"max_source_length": settings.limit, "max_target_length": settings.limit},
    }[settings.stage]
    return [word for name, value in flags.items() for word in (f"--{name}", word_of(value))]


def word_of(value: Any) -> str:
    """A flag's value as the kit writes it."""
    return str(value).lower() if isinstance(value, bool) else str(value)


def factory_settings(name: str, settings: Settings, folder: Path) -> dict[str, Any]:
    """LLaMA-Factory's configuration; writes its list of datasets, and preferences in its own form, into the folder."""
    file = settings.rows
    if settings.stage == "dpo":
        file = str(folder / "preferences.jsonl")
        write_preferences(Path(settings.rows), Path(file))
    described = {"file_name": file} | {
        "sft": {"formatting": "sharegpt", "columns": {"messages": "messages"}, "tags": OPENAI_TAGS},
        "pt": {"columns": {"prompt": "text"}},
        "dpo": {
            "formatting": "sharegpt",
            "ranking": True,
            "columns": PREFERENCE_COLUMNS,
            "tags": OPENAI_TAGS,
        },
    }[settings.stage]
    (folder / "dataset_info.json").write_text(json.dumps({"rows": described}))
    return {
        "model_name_or_path": settings.model,
        "stage": settings.stage,
        "do_train": True,
        "finetuning_type": "lora",
        "lora_rank": settings.rank,
        "lora_alpha": settings.alpha,
        "lora_dropout": 0.0,
        "lora_target": "all",
        "dataset_dir": str(folder),
        "dataset": "rows",
        "template": "chatml",
        "cutoff_len": settings.limit,
        "neat_packing": name == "llamafactory-neat",
        "output_dir": str(folder / "out"),
        "per_device_train_batch_size": settings.batch,
        "num_train_epochs": settings.epochs,
        "learning_rate": settings.learning_rate,
        "lr_scheduler_type": "constant",
        "bf16": settings.bf16,
        "use_cpu": settings.use_cpu,
        "dataloader_pin_memory": not settings.use_cpu,
        "disable_gradient_checkpointing": not settings.checkpointing,
        "logging_steps": settings.logging_steps,
        "save_strategy": "no",
        "report_to": "none",
        "seed": settings.seed,
    }


OPENAI_TAGS = {
    "role_tag": "role",
    "content_tag": "content",
    "user_tag": "user",
    "assistant_tag": "assistant",
    "system_tag": "system",
}
PREFERENCE_COLUMNS = {"messages": "prompt", "chosen": "chosen", "rejected": "rejected"}


def write_preferences(source: Path, target: Path) -> None:
    """The kit's preference rows as LLaMA-Factory reads them."""
    with target.open("w", encoding="utf-8") as stream:
        for line in source.read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            talk = {"prompt": [{"role": "user", "content": row["question"]}]}
            answers = {
                name: {"role": "assistant", "content": row[f"response_{name}"]}
                for name in ("chosen", "rejected")
            }
            stream.write(json.dumps(talk | answers) + "\n")
