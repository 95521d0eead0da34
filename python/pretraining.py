r"""PT: go on pretraining a model on raw text, LoRA or every weight.

    python python/pretraining.py --config recipes/tiny/pt.yaml --model_name_or_path outputs-base/tiny/model \
        --train_file_dir data/pretrain --output_dir outputs-pt/tiny

Documents are joined by the end-of-document token and cut into blocks of --block_size tokens.
Leaves OUTPUT_DIR/adapter (LoRA; then run merge_lora.py --stage_dir OUTPUT_DIR) or OUTPUT_DIR/model, and run.json.
"""

from stagecraft import models, run
from stagecraft.arguments import LoraArguments, ModelArguments, PretrainingDataArguments, RunArguments, parse
from stagecraft.data import corpus
from stagecraft.errors import run_main


def main() -> None:
    model_args, lora_args, data_args, run_args, training = parse(
        __doc__, ModelArguments, LoraArguments, PretrainingDataArguments, RunArguments, trainer="transformers"
    )
    models.require_inputs(model_args, lora_args)
    with run.stage("pt", run_args, model_args, lora_args, data_args, training=training) as stage:
        from transformers import TrainingArguments, set_seed

        from stagecraft.training.language import LanguageTrainer

        models.check_devices(model_args)
        tokenizer = models.load_model_tokenizer(model_args)
        documents = corpus.load_documents(data_args, tokenizer)
        print(documents.describe(), flush=True)
        args = stage.configure(TrainingArguments, training)
        set_seed(args.seed)
        model, adapter = models.load_for_training(model_args, lora_args)
        model = models.add_adapter(model, adapter, args)
        trainer = LanguageTrainer(model, args, documents, tokenizer, model_args.padding_free)
        stage.train(trainer, documents)
        stage.finish(trainer, tokenizer, end_ids=None)


if __name__ == "__main__":
    run_main(main)
