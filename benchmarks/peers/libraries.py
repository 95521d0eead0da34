"""TRL's trainers and transformers' own, as they come, on the benchmark's rows.

    python libraries.py PEER SETTINGS.json

PEER: trl-default, trl-grouped (batches of rows of like length), trl-packing, transformers (its Trainer with rows
tokenised beforehand). Only what the benchmark fixes for all contenders is set; all else is the library's default.
"""

import json
import sys
from pathlib import Path
from typing import Any


def main() -> None:
    peer, settings = sys.argv[1], json.loads(Path(sys.argv[2]).read_text())
    import torch
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed

    set_seed(settings["seed"])
    tokenizer = AutoTokenizer.from_pretrained(settings["model"])
    tokenizer.chat_template = Path(settings["template"]).read_text(encoding="utf-8")
    dtype = torch.bfloat16 if settings["bf16"] else torch.float32
    model = AutoModelForCausalLM.from_pretrained(settings["model"], dtype=dtype)
    model.config.use_cache = False
    lora = LoraConfig(
        task_type="CAUSAL_LM",
        r=settings["rank"],
        lora_alpha=settings["alpha"],
        lora_dropout=0.0,
        target_modules="all-linear",
    )
    rows = [json.loads(line) for line in Path(settings["rows"]).read_text(encoding="utf-8").splitlines()]
    make = transformers_trainer if peer == "transformers" else trl_trainer
    make(peer, settings, model, tokenizer, lora, rows).train()


def shared(settings: dict[str, Any]) -> dict[str, Any]:
    """The arguments that every contender gets."""
    return {
        "output_dir": "out",
        "per_device_train_batch_size": settings["batch"],
        "num_train_epochs": settings["epochs"],
        "learning_rate": settings["learning_rate"],
        "lr_scheduler_type": "constant",
        "bf16": settings["bf16"],
        "use_cpu": settings["use_cpu"],
        "dataloader_pin_memory": not settings["use_cpu"],
        "gradient_checkpointing": settings["checkpointing"],
        "logging_steps": settings["logging_steps"],
        "save_strategy": "no",
        "report_to": "none",
        "seed": settings["seed"],
    }


def trl_trainer(
    peer: str, settings: dict[str, Any], model: Any, tokenizer: Any, lora: Any, rows: list[Any]
) -> Any:
    """TRL's trainer of the stage; it renders and tokenises the rows itself."""
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

    arguments = shared(settings) | {"max_length": settings["limit"]}
    if settings["stage"] == "dpo":
        config, trainer, rows = DPOConfig(**arguments), DPOTrainer, [as_preference(row) for row in rows]
    else:
        arguments |= {"assistant_only_loss": settings["stage"] == "sft", "packing": peer == "trl-packing"}
        if peer == "trl-grouped":
            arguments["train_sampling_strategy"] = "group_by_length"
        config, trainer = SFTConfig(**arguments), SFTTrainer
    data = Dataset.from_list(rows)
    return trainer(model=model, args=config, train_dataset=data, processing_class=tokenizer, peft_config=lora)


def as_preference(row: dict[str, Any]) -> dict[str, Any]:
    """A row of the kit in TRL's form."""
    answers = {name: row[f"response_{name}"] for name in ("chosen", "rejected")}
    talk = {name: [{"role": "assistant", "content": answer}] for name, answer in answers.items()}
    return {"prompt": [{"role": "user", "content": row["question"]}], **talk}


def transformers_trainer(
    peer: str, settings: dict[str, Any], model: Any, tokenizer: Any, lora: Any, rows: list[Any]
) -> Any:
    """transformers' Trainer with its usual collator."""
    from datasets import Dataset
    from peft import get_peft_model
    from transformers import DataCollatorForSeq2Seq, Trainer, TrainingArguments

    if settings["stage"] == "sft":
        rows = [masked(tokenizer, row["messages"]) for row in rows]
    else:
        ids = [tokenizer(row["text"])["input_ids"] + [tokenizer.eos_token_id] for row in rows]
        rows = [{"input_ids": each, "labels": each} for each in ids]
    model = get_peft_model(model, lora)
    if settings["checkpointing"]:
        model.enable_input_require_grads()
    return Trainer(
        model=model,
        args=TrainingArguments(**shared(settings)),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        data_collator=DataCollatorForSeq2Seq(tokenizer),
    )


def masked(tokenizer: Any, messages: list[dict[str, str]]) -> dict[str, list[int]]:
    """A conversation's tokens, and as labels those inside the template's generation marks."""
    found = tokenizer.apply_chat_template(
        messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
    )
    pairs = zip(found["input_ids"], found["assistant_masks"], strict=True)
    return {"input_ids": found["input_ids"], "labels": [each if on else -100 for each, on in pairs]}


if __name__ == "__main__":
    main()
