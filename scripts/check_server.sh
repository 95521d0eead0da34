#!/usr/bin/env bash
# Does the server on PORT answer as the model does? See python/check_server.py.
#
#   RECIPE=tiny PORT=8000 scripts/check_server.sh [FLAG ...]     flags of python/check_server.py; the last one wins
#
# STAGE    base, pt, sft, dpo, ppo, or all that are served (default: the newest)
# MODEL    a complete model's folder instead
# HOST     where make serve listens (127.0.0.1); another machine's: --server URL
# DTYPE    what the server computes in, when make serve was not told here
# API_KEY  the server's, if it has one
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-.venv/bin/python}
if ! command -v "$python" >/dev/null; then
  echo "$python: no Python there; run: make setup (or set PYTHON)" >&2
  exit 2
fi
host=${HOST:-127.0.0.1}
case $host in
  0.0.0.0 | ::) host=127.0.0.1 ;;
  *:*) host="[$host]" ;;
esac
flags=(--server "http://$host:${PORT:-8000}/v1" --recipe "${RECIPE:-tiny}")
if [[ -n ${STAGE:-} ]]; then flags+=(--stage "$STAGE"); fi
if [[ -n ${MODEL:-} ]]; then flags+=(--model "$MODEL"); fi
if [[ -n ${DTYPE:-} ]]; then flags+=(--torch_dtype "$DTYPE"); fi
if [[ -n ${GPUS:-} ]]; then export CUDA_VISIBLE_DEVICES=$GPUS; fi
exec "$python" python/check_server.py "${flags[@]}" "$@"
