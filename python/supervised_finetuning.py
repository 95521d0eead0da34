r"""SFT: train on conversations; only the assistant's words and its end of turn carry loss.

    python python/supervised_finetuning.py --config recipes/tiny/sft.yaml --model_name_or_path outputs-pt/tiny/model \
        --train_file_dir data/finetune --output_dir outputs-sft/tiny

Leaves OUTPUT_DIR/adapter (LoRA; then run merge_lora.py --stage_dir OUTPUT_DIR) or OUTPUT_DIR/model, and run.json.
"""

from stagecraft import models, run
from stagecraft.arguments import LoraArguments, ModelArguments, RunArguments, SFTDataArguments, parse
from stagecraft.chat import templates
from stagecraft.data import corpus
from stagecraft.errors import run_main


def main() -> None:
    model_args, lora_args, data_args, run_args, training = parse(
        __doc__, ModelArguments, LoraArguments, SFTDataArguments, RunArguments, trainer="transformers"
    )
    models.require_inputs(model_args, lora_args)
    with run.stage("sft", run_args, model_args, lora_args, data_args, training=training) as stage:
        from transformers import TrainingArguments, set_seed

        from stagecraft.training.language import LanguageTrainer

        models.check_devices(model_args)
        tokenizer = models.load_model_tokenizer(model_args)
        template = templates.load_template(tokenizer, data_args.template_name)
        conversations = corpus.load_conversations(data_args, tokenizer, template)
        print(conversations.describe(), flush=True)
        args = stage.configure(TrainingArguments, training)
        set_seed(args.seed)
        model, adapter = models.load_for_training(model_args, lora_args)
        model = models.add_adapter(model, adapter, args)
        trainer = LanguageTrainer(model, args, conversations, tokenizer, model_args.padding_free)
        stage.train(trainer, conversations)
        tokenizer.chat_template = template.as_trained(conversations.thoughts)
        stage.finish(trainer, tokenizer, models.end_of_turn_ids(tokenizer, template.end_of_turn))


if __name__ == "__main__":
    run_main(main)
