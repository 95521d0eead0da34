#!/usr/bin/env bash
# RM: a model that scores answers, from preferences -> outputs-rm/RECIPE
#
#   RECIPE=tiny GPUS=0,1 scripts/run_rm.sh [FLAG ...]      flags of python/reward_modeling.py; the last one wins
#
# FROM: the stage whose model it starts from (default sft). DATA: folder of rows (default data/reward).
# GPUS NPROC NNODES DEEPSPEED ...: see scripts/launch.sh. Then: scripts/run_merge.sh rm
set -euo pipefail
cd "$(dirname "$0")/.."
recipe=${RECIPE:-tiny}
exec scripts/launch.sh python/reward_modeling.py \
  --config "recipes/$recipe/rm.yaml" \
  --model_name_or_path "outputs-${FROM:-sft}/$recipe/model" \
  --train_file_dir "${DATA:-data/reward}" \
  --output_dir "outputs-rm/$recipe" \
  --overwrite_output_dir \
  "$@"
