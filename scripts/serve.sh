#!/usr/bin/env bash
# Serve a recipe's newest model, one of its stages, all of them, or MODEL, behind an OpenAI-compatible API.
#
#   RECIPE=tiny scripts/serve.sh [FLAG ...]               flags of the server: vllm serve, or transformers serve
#   RECIPE=tiny STAGE=all scripts/serve.sh                base, pt, sft, dpo and ppo side by side, as far as they are there
#   API_KEY=... HOST=0.0.0.0 PORT=8000 GPUS=0 scripts/serve.sh
#
# STAGE           base, pt, sft, dpo, ppo or all (default: the newest)
# MODEL           a complete model's folder instead
# ENGINE          vllm or transformers (default: vllm where it and CUDA are there, or its CPU build; else transformers)
# VLLM_VENV       where scripts/setup_vllm_cpu.sh put vLLM's CPU build (.venv-vllm)
# HOST PORT       127.0.0.1 and 8000; another host than loopback needs API_KEY and vLLM
# API_KEY         clients must send it as a bearer token (vLLM); an environment variable, never a flag
# DTYPE           bfloat16 on vLLM with CUDA, else auto: as the model was saved, and evaluated
# MAX_MODEL_LEN   tokens of prompt and answer (vLLM): 4096, or what the model holds
# GPU_SHARE       0.9 of the GPU's memory (vLLM)
set -euo pipefail
cd "$(dirname "$0")/.."
case ${1:-} in
  -h | --help)
    sed -n '2,/^set /{/^#/s/^# \{0,1\}//p}' "${BASH_SOURCE[0]}"
    exit
    ;;
esac
python=${PYTHON:-.venv/bin/python}
if ! command -v "$python" >/dev/null; then
  echo "$python: no Python there; run: make setup (or set PYTHON)" >&2
  exit 2
fi
if [[ -n ${GPUS:-} ]]; then export CUDA_VISIBLE_DEVICES=$GPUS; fi
exec "$python" python/serve_model.py "$@"
