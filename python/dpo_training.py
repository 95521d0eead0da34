r"""DPO: prefer chosen answers over rejected ones, starting from the merged SFT model.

    python python/dpo_training.py --config recipes/tiny/dpo.yaml --model_name_or_path outputs-sft/tiny/model \
        --train_file_dir data/reward --output_dir outputs-dpo/tiny

With LoRA the reference is the same model with the adapter switched off; with --use_peft false it is a frozen copy;
with --reference_free there is none, and log-probabilities stand where their differences from it would.
Leaves OUTPUT_DIR/adapter (LoRA; then run merge_lora.py --stage_dir OUTPUT_DIR) or OUTPUT_DIR/model, and run.json.
"""

from stagecraft import models, run
from stagecraft.arguments import (
    LoraArguments,
    ModelArguments,
    PreferenceDataArguments,
    ReferenceArguments,
    RunArguments,
    parse,
)
from stagecraft.chat import templates
from stagecraft.data import corpus
from stagecraft.errors import run_main


def main() -> None:
    groups = (ModelArguments, LoraArguments, PreferenceDataArguments, ReferenceArguments, RunArguments)
    model_args, lora_args, data_args, reference, run_args, training = parse(__doc__, *groups, trainer="dpo")
    # A reference that stays as it is gives every row the same numbers in every epoch.
    training.setdefault("precompute_ref_log_probs", not training.get("sync_ref_model", False))
    models.require_inputs(model_args, lora_args)
    with run.stage("dpo", run_args, model_args, lora_args, data_args, reference, training=training) as stage:
        from transformers import set_seed
        from trl import DPOConfig

        from stagecraft.training.preference import TokenisedDPOTrainer

        models.check_devices(model_args)
        tokenizer = models.load_model_tokenizer(model_args)
        template = templates.load_template(tokenizer, data_args.template_name)
        preferences = corpus.load_preferences(data_args, tokenizer, template, "dpo")
        print(preferences.describe(), flush=True)
        args = stage.configure(
            DPOConfig, training, max_length=None, trust_remote_code=model_args.trust_remote_code
        )
        set_seed(args.seed)
        model, adapter = models.load_for_training(model_args, lora_args)
        trainer = TokenisedDPOTrainer(
            model=model,
            args=args,
            train_dataset=preferences.train,
            eval_dataset=preferences.valid,
            processing_class=tokenizer,
            peft_config=adapter,
            padding_free=model_args.padding_free,
            reference_free=reference.reference_free,
        )
        stage.train(trainer, preferences)
        tokenizer.chat_template = template.as_trained(preferences.thoughts)
        stage.finish(trainer, tokenizer, models.end_of_turn_ids(tokenizer, template.end_of_turn))


if __name__ == "__main__":
    run_main(main)
