#!/usr/bin/env bash
# PT: go on pretraining on raw text -> outputs-pt/RECIPE
#
#   RECIPE=tiny GPUS=0,1 scripts/run_pt.sh [FLAG ...]      flags of python/pretraining.py; the last one wins
#
# FROM: the stage whose model it starts from (default base). DATA: folder of rows (default data/pretrain).
# GPUS NPROC NNODES DEEPSPEED ...: see scripts/launch.sh. Then: scripts/run_merge.sh pt
set -euo pipefail
cd "$(dirname "$0")/.."
recipe=${RECIPE:-tiny}
exec scripts/launch.sh python/pretraining.py \
  --config "recipes/$recipe/pt.yaml" \
  --model_name_or_path "outputs-${FROM:-base}/$recipe/model" \
  --train_file_dir "${DATA:-data/pretrain}" \
  --output_dir "outputs-pt/$recipe" \
  --overwrite_output_dir \
  "$@"
