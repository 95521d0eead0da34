#!/usr/bin/env bash
# Public benchmarks of a recipe's models, by lm-evaluation-harness -> outputs-eval/RECIPE/bench/STAGE/TASK.json
#
#   RECIPE=tiny TASKS=ceval-valid,cmmlu,mmlu scripts/bench_eval.sh [FLAG ...]     flags of python/bench_evaluation.py
#
# STAGE   one or several, e.g. "base sft dpo": columns of one table (default: the newest finished stage)
# MODEL   a model's folder instead; its results lie under the folder's name
# LIMIT   at most so many rows of each task
# GPUS    CUDA devices
set -euo pipefail
cd "$(dirname "$0")/.."
recipe=${RECIPE:-tiny} python=${PYTHON:-.venv/bin/python}

faults=() models=()
if [[ -z ${TASKS:-} && " $* " != *" --tasks"* ]]; then
  faults+=("TASKS is empty: name benchmarks, e.g. TASKS=ceval-valid,cmmlu,mmlu (lm_eval ls tasks lists them)")
fi
if [[ -n ${MODEL:-} ]]; then
  name=$(basename "$(realpath -ms "$MODEL")")
  if [[ $name == model ]]; then name=$(basename "$(dirname "$(realpath -ms "$MODEL")")"); fi
  models=("$name=$MODEL")
elif [[ -z ${STAGE:-} ]]; then
  model=$(scripts/find_model.sh)
  stage=${model#outputs-}
  models=("${stage%%/*}=$model")
else
  for stage in $STAGE; do
    case $stage in
      rm) faults+=("STAGE=rm: a reward model scores answers and gives none; name base, pt, sft, dpo or ppo") ;;
      base | pt | sft | dpo | ppo)
        if [[ -f outputs-$stage/$recipe/DONE ]]; then
          models+=("$stage=outputs-$stage/$recipe/model")
        else
          faults+=("STAGE=$stage: not finished (no outputs-$stage/$recipe/DONE); run: make $stage RECIPE=$recipe")
        fi
        ;;
      *) faults+=("STAGE=$stage: no such stage; name base, pt, sft, dpo or ppo, or MODEL=FOLDER") ;;
    esac
  done
fi
command -v "$python" >/dev/null || faults+=("$python: no Python there; run: make setup (or set PYTHON)")
if ((${#faults[@]})); then
  printf '%s\n' "${faults[@]}" >&2
  exit 2
fi
if [[ -n ${GPUS:-} ]]; then export CUDA_VISIBLE_DEVICES=$GPUS; fi
flags=(--models "${models[@]}" --output_dir "outputs-eval/$recipe/bench")
if [[ -n ${TASKS:-} ]]; then flags+=(--tasks "$TASKS"); fi
if [[ -n ${LIMIT:-} ]]; then flags+=(--limit "$LIMIT"); fi
exec "$python" python/bench_evaluation.py "${flags[@]}" "$@"
