#!/usr/bin/env bash
# Talk to a recipe's newest model, or to MODEL.
#
#   RECIPE=tiny scripts/chat.sh [FLAG ...]                flags of python/chat.py
#   echo "a question" | MODEL=outputs-sft/tiny/model scripts/chat.sh
set -euo pipefail
cd "$(dirname "$0")/.."
model=$(scripts/find_model.sh)
python=${PYTHON:-.venv/bin/python}
if ! command -v "$python" >/dev/null; then
  echo "$python: no Python there; run: make setup (or set PYTHON)" >&2
  exit 2
fi
if [[ -n ${GPUS:-} ]]; then export CUDA_VISIBLE_DEVICES=$GPUS; fi
exec "$python" python/chat.py --model "$model" "$@"
