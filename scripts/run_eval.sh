#!/usr/bin/env bash
# One table of every model of a recipe -> outputs-eval/RECIPE/report.md
#
#   RECIPE=tiny STAGES="pt sft dpo" scripts/run_eval.sh [FLAG ...]      flags of python/evaluate_model.py
#
# STAGES: which stages' models stand beside the base (default: those that are finished); rm is scored as a reward
# model. DATA: folder of evaluation rows (default data/eval). PT_DATA SFT_DATA RM_DATA DPO_DATA: what the stages were
# trained on (defaults as in the Makefile); evaluation rows that are found there are left out.
set -euo pipefail
cd "$(dirname "$0")/.."
recipe=${RECIPE:-tiny}
if [[ -z ${STAGES:-} ]]; then
  STAGES=''
  for stage in pt sft rm dpo ppo; do
    if [[ -f outputs-$stage/$recipe/DONE ]]; then STAGES+="$stage "; fi
  done
fi
models=("base=outputs-base/$recipe/model") reward=() trained=()
declare -A data=([pt]=${PT_DATA:-data/pretrain} [sft]=${SFT_DATA:-data/finetune} [rm]=${RM_DATA:-data/reward}
  [dpo]=${DPO_DATA:-data/reward})
for stage in $STAGES; do
  if [[ -n ${data[$stage]:-} ]]; then trained+=("$stage=${data[$stage]}"); fi
  if [[ $stage == rm ]]; then
    reward=(--reward_model "outputs-rm/$recipe/model")
  else
    models+=("$stage=outputs-$stage/$recipe/model")
  fi
done
NPROC=1 NNODES=1 DEEPSPEED='' exec scripts/launch.sh python/evaluate_model.py \
  --config "recipes/$recipe/eval.yaml" \
  --models "${models[@]}" "${reward[@]}" \
  --eval_dir "${DATA:-data/eval}" \
  ${trained[@]:+--train_data "${trained[@]}"} \
  --output_dir "outputs-eval/$recipe" \
  --overwrite_output_dir \
  "$@"
