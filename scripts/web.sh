#!/usr/bin/env bash
# A web page on which models answer side by side and votes are saved as preference rows.
#
#   RECIPE=tiny scripts/web.sh [FLAG ...]                 flags of python/web_chat.py
#   MODELS="base sft dpo" scripts/web.sh                  stages, folders, BASE+ADAPTER, URL#MODEL; NAME=PLACE
#   PASSWORD=... HOST=0.0.0.0 PORT=7860 scripts/web.sh    others may come, user stagecraft; SHARE=1: from anywhere
#
# MODELS    default: MODEL if it is set, else the two stages that finished last
# DPO_DATA  the folder that votes go to (votes.jsonl), if it is one; default data/reward
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-.venv/bin/python}
if ! command -v "$python" >/dev/null; then
  echo "$python: no Python there; run: make setup (or set PYTHON)" >&2
  exit 2
fi
case ${SHARE:-0} in
  0 | 1) ;;
  *)
    echo "SHARE=$SHARE: must be 1 or 0" >&2
    exit 2
    ;;
esac
if [[ -n ${GPUS:-} ]]; then export CUDA_VISIBLE_DEVICES=$GPUS; fi
flags=()
read -ra models <<<"${MODELS:-${MODEL:-}}"
if ((${#models[@]})); then flags+=(--models "${models[@]}"); fi
if [[ -n ${HOST:-} ]]; then flags+=(--host "$HOST"); fi
if [[ -n ${PORT:-} ]]; then flags+=(--port "$PORT"); fi
if [[ ${SHARE:-0} == 1 ]]; then flags+=(--share true); fi
if [[ -d ${DPO_DATA:-} ]]; then flags+=(--votes_file "${DPO_DATA%/}/votes.jsonl"); fi
exec "$python" python/web_chat.py "${flags[@]}" "$@"
