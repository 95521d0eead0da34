# tiny: about 1M parameters, built from nothing and trained through every stage on two CPU cores in minutes.

# Empty: the model is built from base.yaml and the tokenizer from the pretraining documents.
BASE_MODEL :=

STAGES ?= pt sft rm dpo
