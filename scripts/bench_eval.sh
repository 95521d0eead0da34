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

if ! command -v "$python" >/dev/null; then
  echo "$python: no Python there; run: make setup (or set PYTHON)" >&2
  exit 2
fi
if [[ -n ${GPUS:-} ]]; then export CUDA_VISIBLE_DEVICES=$GPUS; fi
flags=(--recipe "$recipe" --output_dir "outputs-eval/$recipe/bench")
read -ra models <<<"${MODEL:-${STAGE:-}}"
if ((${#models[@]})); then flags+=(--models "${models[@]}"); fi
if [[ -n ${TASKS:-} ]]; then flags+=(--tasks "$TASKS"); fi
if [[ -n ${LIMIT:-} ]]; then flags+=(--limit "$LIMIT"); fi
exec "$python" python/bench_evaluation.py "${flags[@]}" "$@"
