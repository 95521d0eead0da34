#!/usr/bin/env bash
# Serve a recipe's newest model, or MODEL, behind an OpenAI-compatible API.
#
#   RECIPE=tiny scripts/serve.sh [FLAG ...]               flags of the server: vllm serve, or transformers serve
#   API_KEY=... HOST=0.0.0.0 PORT=8000 GPUS=0 scripts/serve.sh
#
# ENGINE          vllm or transformers (default: vllm where it and CUDA are there)
# HOST PORT       127.0.0.1 and 8000; another host than loopback needs API_KEY and vLLM
# API_KEY         clients must send it as a bearer token (vLLM)
# DTYPE           bfloat16 (vLLM), auto (transformers)
# MAX_MODEL_LEN   4096 tokens of prompt and answer (vLLM)
# GPU_SHARE       0.9 of the GPU's memory (vLLM)
set -euo pipefail
cd "$(dirname "$0")/.."

faults=()
fault() { faults+=("$1"); }
# shellcheck disable=SC2016 # the inner bash expands it; two seconds, because a host elsewhere may never answer
is_taken() { timeout 2 bash -c 'exec 3<>"/dev/tcp/$0/$1"' "$host" "$port" 2>/dev/null; }

model=$(scripts/find_model.sh)
host=${HOST:-127.0.0.1} port=${PORT:-8000}
bin=$(dirname "$(command -v "${PYTHON:-.venv/bin/python}" || echo .venv/bin/python)")
if [[ -n ${GPUS:-} ]]; then export CUDA_VISIBLE_DEVICES=$GPUS; fi

engine=${ENGINE:-}
if [[ -z $engine ]]; then
  engine=transformers
  if [[ -x $bin/vllm ]] && nvidia-smi -L 2>/dev/null | grep -q '^GPU '; then engine=vllm; fi
fi
case $engine in
  vllm | transformers) [[ -x $bin/$engine ]] || fault "$bin/$engine: not there; run: make setup (or set PYTHON)" ;;
  *) fault "ENGINE=$engine: must be vllm or transformers" ;;
esac

if [[ ! $port =~ ^[1-9][0-9]*$ ]] || ((port > 65535)); then
  fault "PORT=\"$port\": must be a port, 1 to 65535"
elif is_taken; then
  fault "PORT=$port: taken on $host; stop what listens there, or choose another"
fi

case $host in
  127.* | localhost | ::1) ;;
  *)
    if [[ $engine == transformers ]]; then
      fault "HOST=$host: transformers serve knows no API key, so it listens on 127.0.0.1; serve on vLLM"
    elif [[ -z ${API_KEY:-} ]]; then
      fault "HOST=$host: anyone who reaches it could use the model; set API_KEY, or leave HOST out"
    fi
    ;;
esac
if [[ -n ${API_KEY:-} && $engine == transformers ]]; then
  fault "API_KEY: transformers serve knows no API key; leave it out, or serve on vLLM"
fi

if ((${#faults[@]})); then
  printf '%s\n' "${faults[@]}" >&2
  exit 2
fi

address=$host
case $host in
  0.0.0.0 | ::) address=127.0.0.1 ;;
  *:*) address="[$host]" ;;
esac
echo "serving $model with $engine on http://$address:$port/v1; when it's up:"
printf "  curl http://%s:%s/v1/chat/completions -H 'Content-Type: application/json'%s -d '%s'\n" \
  "$address" "$port" \
  "${API_KEY:+ -H \"Authorization: Bearer \$API_KEY\"}" \
  "{\"model\": \"$model\", \"messages\": [{\"role\": \"user\", \"content\": \"Hello\"}]}"

if [[ $engine == vllm ]]; then
  if [[ -n ${API_KEY:-} ]]; then export VLLM_API_KEY=$API_KEY; fi # a flag would show in the list of processes
  exec "$bin/vllm" serve "$model" --host "$host" --port "$port" --dtype "${DTYPE:-bfloat16}" \
    --max-model-len "${MAX_MODEL_LEN:-4096}" --gpu-memory-utilization "${GPU_SHARE:-0.9}" "$@"
fi
exec "$bin/transformers" serve "$model" --host "$host" --port "$port" --dtype "${DTYPE:-auto}" "$@"
