#!/usr/bin/env bash
# SFT: train on conversations -> outputs-sft/RECIPE
#
#   RECIPE=tiny GPUS=0,1 scripts/run_sft.sh [FLAG ...]   flags of python/supervised_finetuning.py; the last one wins
#
# FROM: the stage whose model it starts from (default pt). DATA: folder of rows (default data/finetune).
# GPUS NPROC NNODES DEEPSPEED ...: see scripts/launch.sh. Then: scripts/run_merge.sh sft
set -euo pipefail
cd "$(dirname "$0")/.."
recipe=${RECIPE:-tiny}
exec scripts/launch.sh python/supervised_finetuning.py \
  --config "recipes/$recipe/sft.yaml" \
  --model_name_or_path "outputs-${FROM:-pt}/$recipe/model" \
  --train_file_dir "${DATA:-data/finetune}" \
  --output_dir "outputs-sft/$recipe" \
  --overwrite_output_dir \
  "$@"
