# qwen2.5-3b: continued pretraining, SFT and DPO, each with LoRA; a reward model on request.

# Hub id of the model to start from; a local folder does too.
BASE_MODEL ?= Qwen/Qwen2.5-3B

# Training stages in order; leave pt out to start from SFT, add rm for a reward model.
STAGES ?= pt sft dpo
