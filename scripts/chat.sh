#!/usr/bin/env bash
# Talk to a recipe's newest model, or to MODEL.
#
#   RECIPE=tiny scripts/chat.sh [FLAG ...]                flags of python/chat.py
#   echo "a question" | MODEL=outputs-sft/tiny/model scripts/chat.sh
#   MODEL=http://127.0.0.1:8000/v1#dpo scripts/chat.sh    a server (API_KEY in the environment where it wants one)
#   MODEL=sft scripts/chat.sh                             a stage; or BASE+ADAPTER, two folders
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-.venv/bin/python}
if ! command -v "$python" >/dev/null; then
  echo "$python: no Python there; run: make setup (or set PYTHON)" >&2
  exit 2
fi
if [[ -n ${GPUS:-} ]]; then export CUDA_VISIBLE_DEVICES=$GPUS; fi
exec "$python" python/chat.py ${MODEL:+--model "$MODEL"} "$@"
