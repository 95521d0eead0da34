"""How near the data layer comes to the tokenizer alone: chat rows from a file to masked tokens on disk.

    python benchmarks/token_throughput.py [--rows 20000] [--rounds 3]

The ceiling is the Rust tokenizer's encode_batch on texts rendered beforehand, with as many threads as the data layer
has processes. Both are timed in turns; the last line is one JSON object with the ratio of their median tokens/s.
"""

import argparse
import json
import os
import random
import statistics
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "python"))
THREADS = min(2, len(os.sched_getaffinity(0)))
os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "true", "RAYON_NUM_THREADS": str(THREADS)}
VOCABULARY = 32_000
# What a GPT-like tokenizer splits by: contractions, words with their space, single digits, signs, line ends.
SPLIT = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rows", type=int, default=20_000)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    from stagecraft.arguments import SFTDataArguments
    from stagecraft.chat import templates
    from stagecraft.data import corpus, rows

    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        sentences = read_sentences()
        tokenizer = train_tokenizer(sentences)
        template = templates.load_template(tokenizer, "chatml")
        Path("rows.jsonl").write_text(make_rows(sentences, args.rows), encoding="utf-8")
        talks = [row.messages for row in rows.read_rows("rows.jsonl", "sft")]
        texts = [templates.render(template.text, messages, tokenizer) for messages in talks]
        data = SFTDataArguments(
            "rows.jsonl",
            validation_split_percentage=0,
            preprocessing_num_workers=THREADS,
            overwrite_cache=True,
        )
        tokens, ceilings, ours = 0, [], []
        for _ in range(args.rounds):
            started = time.perf_counter()
            tokens = sum(len(row.ids) for row in tokenizer.backend_tokenizer.encode_batch(texts))
            ceilings.append(tokens / (time.perf_counter() - started))
            started = time.perf_counter()
            loaded = corpus.load_conversations(data, tokenizer, template)
            ours.append(tokens / (time.perf_counter() - started))
            if loaded.counts["tokens an epoch"] != tokens:
                sys.exit(f"{loaded.counts} does not add up to {tokens} tokens")
            print(
                f"tokenizer alone {ceilings[-1]:,.0f} tokens/s, data layer {ours[-1]:,.0f} tokens/s",
                flush=True,
            )
        started = time.perf_counter()
        data.overwrite_cache = False
        corpus.load_conversations(data, tokenizer, template)
        warm = time.perf_counter() - started
    figures = {
        "rows": args.rows,
        "tokens_a_row": round(tokens / args.rows, 1),
        "processes": THREADS,
        "ratio_to_ceiling": round(statistics.median(ours) / statistics.median(ceilings), 3),
        "warm_seconds": round(warm, 2),
    }
    print(json.dumps(figures))


def read_sentences() -> list[str]:
    """The sentences of the sample documents."""
    lines = (ROOT / "data/pretrain/documents.jsonl").read_text(encoding="utf-8").splitlines()
    texts = [json.loads(line)["text"] for line in lines] + [
        (ROOT / "data/source/general.txt").read_text(encoding="utf-8")
    ]
    return [s for text in texts for s in text.replace("。", "。\n").replace(". ", ".\n").splitlines() if s]


def train_tokenizer(sentences: list[str]):
    """A byte-level BPE of the usual kind; what the sentences don't fill of the vocabulary stays empty."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    steps = [
        pre_tokenizers.Split(Regex(SPLIT), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ]
    bpe.pre_tokenizer = pre_tokenizers.Sequence(steps)
    bpe.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator(sentences, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        eos_token=special[0],
        pad_token=special[0],
        additional_special_tokens=special[1:],
    )


def make_rows(sentences: list[str], number: int) -> str:
    """Conversations of one to three exchanges, about 146 tokens each, no two alike."""
    rng = random.Random(0)
    lines = []
    for n in range(number):
        turns = []
        for _ in range(rng.choice([1, 1, 1, 2, 2, 3])):
            asked = " ".join(rng.choices(sentences, k=rng.choice([1, 2, 4])))
            answer = " ".join(rng.choices(sentences, k=rng.choice([3, 7, 10, 18])))
            turns += [{"role": "user", "content": f"{asked} ({n})"}, {"role": "assistant", "content": answer}]
        lines.append(json.dumps({"messages": turns}, ensure_ascii=False) + "\n")
    return "".join(lines)


if __name__ == "__main__":
    main()
