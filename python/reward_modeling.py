r"""RM: a model that scores an answer, trained so that chosen answers score above rejected ones.

    python python/reward_modeling.py --config recipes/tiny/rm.yaml --model_name_or_path outputs-sft/tiny/model \
        --train_file_dir data/reward --output_dir outputs-rm/tiny

Leaves OUTPUT_DIR/adapter (LoRA; then run merge_lora.py --stage_dir OUTPUT_DIR) or OUTPUT_DIR/model, and run.json.
"""

from stagecraft import models, run
from stagecraft.arguments import LoraArguments, ModelArguments, PreferenceDataArguments, RunArguments, parse
from stagecraft.chat import templates
from stagecraft.data import corpus
from stagecraft.errors import run_main


def main() -> None:
    model_args, lora_args, data_args, run_args, training = parse(
        __doc__, ModelArguments, LoraArguments, PreferenceDataArguments, RunArguments, trainer="reward"
    )
    models.require_inputs(model_args, lora_args)
    with run.stage("rm", run_args, model_args, lora_args, data_args, training=training) as stage:
        from transformers import set_seed
        from trl import RewardConfig

        from stagecraft.training.preference import ScoreTrainer

        models.check_devices(model_args)
        tokenizer = models.load_model_tokenizer(model_args)
        template = templates.load_template(tokenizer, data_args.template_name)
        preferences = corpus.load_preferences(data_args, tokenizer, template, "rm")
        print(preferences.describe(), flush=True)
        args = stage.configure(RewardConfig, training, max_length=None)
        set_seed(args.seed)
        model, adapter = models.load_for_training(model_args, lora_args, task="reward")
        trainer = ScoreTrainer(
            model=model,
            args=args,
            train_dataset=preferences.train,
            eval_dataset=preferences.valid,
            processing_class=tokenizer,
            peft_config=adapter,
            padding_free=model_args.padding_free,
        )
        stage.train(trainer, preferences)
        tokenizer.chat_template = template.as_trained(preferences.thoughts)
        stage.finish(trainer, tokenizer, end_ids=None)


if __name__ == "__main__":
    run_main(main)
