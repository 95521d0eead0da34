#!/usr/bin/env bash
# DPO: prefer chosen answers over rejected ones -> outputs-dpo/RECIPE
#
#   RECIPE=tiny GPUS=0,1 scripts/run_dpo.sh [FLAG ...]      flags of python/dpo_training.py; the last one wins
#
# FROM: the stage whose model it starts from (default sft). DATA: folder of rows (default data/reward).
# GPUS NPROC NNODES DEEPSPEED ...: see scripts/launch.sh. Then: scripts/run_merge.sh dpo
set -euo pipefail
cd "$(dirname "$0")/.."
recipe=${RECIPE:-tiny}
exec scripts/launch.sh python/dpo_training.py \
  --config "recipes/$recipe/dpo.yaml" \
  --model_name_or_path "outputs-${FROM:-sft}/$recipe/model" \
  --train_file_dir "${DATA:-data/reward}" \
  --output_dir "outputs-dpo/$recipe" \
  --overwrite_output_dir \
  "$@"
