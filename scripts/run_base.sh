#!/usr/bin/env bash
# The model a recipe starts from -> outputs-base/RECIPE/model
#
#   RECIPE=tiny scripts/run_base.sh [FLAG ...]     flags of python/build_base.py; the last one wins
#   RECIPE=qwen2.5-3b BASE_MODEL=/models/Qwen2.5-3B scripts/run_base.sh
#
# BASE_MODEL: hub id or folder (default: the recipe's); empty: built from nothing, its tokenizer from DATA.
set -euo pipefail
cd "$(dirname "$0")/.."
recipe=${RECIPE:-tiny}
named=$(sed -n 's/^BASE_MODEL *[:?]*= *//p' "recipes/$recipe/recipe.mk")
base=${BASE_MODEL-$named}
flags=(--output_dir "outputs-base/$recipe" --overwrite_output_dir)
if [[ -f recipes/$recipe/base.yaml ]]; then flags=(--config "recipes/$recipe/base.yaml" "${flags[@]}"); fi
if [[ -n $base ]]; then
  flags+=(--model_name_or_path "$base")
else
  flags+=(--train_file_dir "${DATA:-data/pretrain}")
fi
# Nothing here trains: one process, on no particular device.
NPROC=1 NNODES=1 DEEPSPEED='' exec scripts/launch.sh python/build_base.py "${flags[@]}" "$@"
