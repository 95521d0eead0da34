#!/usr/bin/env bash
# A stage's adapter/ and its base -> the stage's complete model/, checked, and DONE
#
#   RECIPE=tiny scripts/run_merge.sh STAGE       STAGE: pt, sft, rm, dpo or ppo
#
# After full-parameter training there is no adapter/: model/ is only checked. To merge any adapter into any base:
#   python/merge_lora.py --base_model B --lora_model L --output_dir O
set -euo pipefail
cd "$(dirname "$0")/.."
case ${1:-} in
  pt | sft | rm | dpo | ppo) ;;
  *)
    echo "usage: scripts/run_merge.sh STAGE (pt, sft, rm, dpo or ppo), not \"${1:-}\"" >&2
    exit 2
    ;;
esac
folder=outputs-$1/${RECIPE:-tiny}
NPROC=1 NNODES=1 DEEPSPEED='' exec scripts/launch.sh python/merge_lora.py --stage_dir "$folder" "${@:2}"
