"""Tokens a second that a model's matrix products alone allow, timed on this machine.

    python ceiling.py MODEL_FOLDER TOKENS bfloat16|float32

Times the products of every linear layer and of the output head for TOKENS rows: forward, and backward to the inputs
(under LoRA the base's weights get no gradients). A step of LoRA has to do these whatever else it does; attention, the
adapter, norms and the optimizer come on top, and with gradient checkpointing the forward half comes twice. Ends with a
JSON object: tokens/s without and with that second forward, and the floating-point operations a second reached.
"""

import json
import statistics
import sys
import time
from pathlib import Path

import torch

ROUNDS, REPEATS = 5, 3


def main() -> None:
    folder, tokens, dtype = sys.argv[1], int(sys.argv[2]), getattr(torch, sys.argv[3])
    config = json.loads((Path(folder) / "config.json").read_text())
    device = "cuda" if torch.cuda.is_available() else "cpu"
    forward = backward = operations = 0.0
    for (wide, narrow), count in products(config).items():
        weight = torch.randn(wide, narrow, dtype=dtype, device=device)
        inputs = torch.randn(tokens, narrow, dtype=dtype, device=device)
        outputs = torch.randn(tokens, wide, dtype=dtype, device=device)
        forward += count * seconds(lambda x=inputs, w=weight: x @ w.T)
        backward += count * seconds(lambda x=outputs, w=weight: x @ w)
        operations += 4 * count * tokens * wide * narrow
    figures = {
        "tokens_a_second": tokens / (forward + backward),
        "with_checkpointing": tokens / (2 * forward + backward),
        "tera_operations": operations / (forward + backward) / 1e12,
    }
    print(json.dumps(figures))


def products(config: dict) -> dict[tuple[int, int], int]:
    """(outputs, inputs) of a weight -> how often the model has one of that shape."""
    hidden, layers, heads = (config[k] for k in ("hidden_size", "num_hidden_layers", "num_attention_heads"))
    head = config.get("head_dim") or hidden // heads
    query, key = heads * head, config["num_key_value_heads"] * head
    inner = config["intermediate_size"]
    shapes = [(query, hidden), (key, hidden), (key, hidden), (hidden, query)]
    shapes += [(inner, hidden), (inner, hidden), (hidden, inner)]
    found: dict[tuple[int, int], int] = {(config["vocab_size"], hidden): 1}
    for shape in shapes:
        found[shape] = found.get(shape, 0) + layers
    return found


def seconds(product) -> float:
    """Median time of one product, after a round that warms up."""
    wait = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
    taken = []
    for turn in range(ROUNDS + 1):
        wait()
        began = time.perf_counter()
        for _ in range(REPEATS):
            product()
        wait()
        if turn:
            taken.append((time.perf_counter() - began) / REPEATS)
    return statistics.median(taken)


if __name__ == "__main__":
    main()
