"""The model a recipe starts from: built from nothing (tokenizer and random weights), or a hub or local model.

    python python/build_base.py --config recipes/tiny/base.yaml --train_file_dir data/pretrain --output_dir outputs-base/tiny
    python python/build_base.py --model_name_or_path Qwen/Qwen2.5-3B --output_dir outputs-base/qwen2.5-3b

Leaves OUTPUT_DIR/model (a link to the local copy when the model exists already) and DONE.
"""

import hashlib
import json
import shutil
from dataclasses import dataclass, field
from pathlib import Path

from stagecraft import files, manifest, models, run
from stagecraft.arguments import parse
from stagecraft.chat import templates
from stagecraft.console import settle_libraries
from stagecraft.data import rows
from stagecraft.errors import UserError, run_main

PAD, TURN_START, TURN_END = "<|pad|>", "<|im_start|>", "<|im_end|>"
# Chinese characters stand alone; words, numbers and punctuation split as in byte-level BPE tokenizers.
SPLIT = r"[\u3400-\u9fff]| ?[A-Za-z]+| ?[0-9]| ?[^\sA-Za-z0-9\u3400-\u9fff]|\s+"


@dataclass
class BaseArguments:
    """Base model"""

    output_dir: str = field(metadata={"help": "folder that gets model/ and DONE"})
    model_name_or_path: str | None = field(
        default=None, metadata={"help": "start from this hub id or folder instead of from nothing"}
    )
    revision: str | None = field(default=None, metadata={"help": "branch, tag or commit on the hub"})
    train_file_dir: str | None = field(
        default=None, metadata={"help": "documents the tokenizer is trained on"}
    )
    template_name: str = field(default="chatml", metadata={"help": "chat template of the new tokenizer"})
    vocab_size: int = field(default=1400, metadata={"help": "tokens of the new tokenizer"})
    hidden_size: int = field(default=128, metadata={"help": "width"})
    num_hidden_layers: int = field(default=4, metadata={"help": "layers"})
    num_attention_heads: int = field(default=4, metadata={"help": "query heads"})
    num_key_value_heads: int = field(default=2, metadata={"help": "key and value heads"})
    head_dim: int = field(default=32, metadata={"help": "width of a head"})
    intermediate_size: int = field(default=384, metadata={"help": "width of the feed-forward layer"})
    max_position_embeddings: int = field(default=1024, metadata={"help": "longest sequence"})
    tie_word_embeddings: bool = field(default=True, metadata={"help": "one matrix for input and output"})
    seed: int = field(default=42, metadata={"help": "seed of the random weights"})
    overwrite_output_dir: bool = field(default=False, metadata={"help": "replace a finished base"})


def main() -> None:
    [args] = parse(__doc__, BaseArguments)
    folder = Path(args.output_dir)
    if (folder / "DONE").exists() and not args.overwrite_output_dir:
        raise UserError(
            f"--output_dir {folder}: holds a finished base (DONE); --overwrite_output_dir replaces it"
        )
    if args.model_name_or_path is None and args.train_file_dir is None:
        raise UserError(
            "give --train_file_dir to build from nothing, or --model_name_or_path to start from a model"
        )
    settle_libraries()
    files.require_free_disk(folder, 50_000_000)
    with run.lock(folder), run.tee(folder / "logs" / "train.log"):
        (folder / "DONE").unlink(missing_ok=True)
        described = manifest.describe_run("base", vars(args))
        outcome = link_model(args, folder) if args.model_name_or_path else build_model(args, folder)
        files.write_json(folder / "run.json", described | {"metrics": outcome})
        files.write_text(folder / "DONE", "base\n")


def build_model(args: BaseArguments, folder: Path) -> dict:
    """Train a tokenizer on the documents, save it with a random Qwen3-shaped model."""
    documents = [row.text for row in rows.read_rows(args.train_file_dir, "pt")]
    print(
        f"base: training a tokenizer of {args.vocab_size:,} tokens on {len(documents):,} documents",
        flush=True,
    )
    from transformers import Qwen3Config, Qwen3ForCausalLM, set_seed

    tokenizer = train_tokenizer(args, documents)
    set_seed(args.seed)
    end_ids = models.end_of_turn_ids(tokenizer, TURN_END)
    shape = {k: v for k, v in vars(args).items() if k in Qwen3Config().to_dict()}
    shape |= {"vocab_size": len(tokenizer), "bos_token_id": None, "eos_token_id": tokenizer.eos_token_id}
    model = Qwen3ForCausalLM(Qwen3Config(**shape, pad_token_id=tokenizer.pad_token_id))
    model.generation_config.eos_token_id = end_ids
    temporary = folder / ".model.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    model.save_pretrained(temporary)
    tokenizer.save_pretrained(temporary)
    remove(folder / "model")
    files.replace_folder(temporary, folder / "model")
    print(
        f"base: {model.num_parameters():,} random parameters, {len(tokenizer):,} tokens, saved to {folder / 'model'}"
    )
    return {"parameters": model.num_parameters(), "vocab_size": len(tokenizer)}


def train_tokenizer(args: BaseArguments, documents: list[str]):
    """Byte-level BPE (nothing is out of vocabulary); its chat template comes from templates/."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    bpe.decoder = decoders.ByteLevel()
    special = [PAD, TURN_START, TURN_END]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    bpe.train_from_iterator(
        documents,
        trainers.BpeTrainer(
            vocab_size=args.vocab_size, special_tokens=special, initial_alphabet=alphabet, show_progress=False
        ),
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        pad_token=PAD,
        # Documents end with the token that ends a turn. A token that pretraining never has to predict keeps an embedding
        # so small that LoRA on a tied head can't make it likely: the end of a turn stood at .02 after a whole answer.
        eos_token=TURN_END,
        additional_special_tokens=[TURN_START],
        model_max_length=args.max_position_embeddings,
    )
    tokenizer.chat_template = templates.load_template(tokenizer, args.template_name).saved_text
    return tokenizer


def link_model(args: BaseArguments, folder: Path) -> dict:
    """Point model/ at a local folder, or at the hub's files after fetching them (safetensors only)."""
    source = Path(args.model_name_or_path)
    if not source.is_dir():
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError

        print(f"base: fetching {args.model_name_or_path} (HF_ENDPOINT is honoured)", flush=True)
        wanted = ["*.json", "*.safetensors", "*.jinja", "merges.txt", "vocab.txt", "*.model", "*.py"]
        try:
            source = Path(
                snapshot_download(args.model_name_or_path, revision=args.revision, allow_patterns=wanted)
            )
        except (HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError, OSError) as error:
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise UserError(
                f"--model_name_or_path {args.model_name_or_path}: no such folder, and the hub gave: {reason}; "
                "set HF_ENDPOINT to a reachable hub, or pass a local folder"
            ) from None
    models.require_model_folder(str(source))
    remove(folder / "model")
    (folder / "model").symlink_to(source.resolve())
    size = sum(file.stat().st_size for file in source.glob("*.safetensors"))
    digest = hashlib.sha256((source / "config.json").read_bytes()).hexdigest()
    print(f"base: {folder / 'model'} -> {source} ({size / 1e9:,.2f} GB)")
    return {
        "source": args.model_name_or_path,
        "bytes": size,
        "config_sha256": digest,
        "architectures": json.loads((source / "config.json").read_text()).get("architectures"),
    }


def remove(path: Path) -> None:
    """Take away an older model/, a link or a folder."""
    if path.is_symlink():
        path.unlink()
    else:
        shutil.rmtree(path, ignore_errors=True)


if __name__ == "__main__":
    run_main(main)
