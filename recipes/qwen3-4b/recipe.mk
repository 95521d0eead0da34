# qwen3-4b: SFT with LoRA of rank 64 on rows of up to 4,096 tokens.

# Hub id of the model to start from; a local folder does too.
BASE_MODEL ?= Qwen/Qwen3-4B

# Training stages in order.
STAGES ?= sft
