# qwen2.5-1.5b: SFT with LoRA, merged into a complete model, then DPO on top of the merged model.

# Hub id of the model to start from; a local folder does too.
BASE_MODEL ?= Qwen/Qwen2.5-1.5B-Instruct

# Training stages in order; evaluation then compares base, SFT and DPO.
STAGES ?= sft dpo
