#!/usr/bin/env bash
# The loss curves of every stage of a recipe, in a browser on this machine.
#
#   RECIPE=tiny PORT=6006 scripts/tensorboard.sh [FLAG ...]      flags of tensorboard
set -euo pipefail
cd "$(dirname "$0")/.."
recipe=${RECIPE:-tiny} port=${PORT:-6006} python=${PYTHON:-.venv/bin/python}

fail() { # user errors: one line, status 2
  echo "$1" >&2
  exit 2
}

logs=''
for folder in outputs-*/"$recipe"/logs; do
  if [[ -d $folder ]]; then
    stage=${folder#outputs-}
    logs+=${logs:+,}${stage%%/*}:$folder
  fi
done
[[ -n $logs ]] || fail "no outputs-*/$recipe/logs yet: run a stage first"
if [[ ! $port =~ ^[1-9][0-9]{0,4}$ ]] || ((port > 65535)); then fail "PORT=\"$port\": must be a port, 1 to 65535"; fi
# shellcheck disable=SC2016 # the inner bash expands it
if timeout 2 bash -c 'exec 3<>"/dev/tcp/127.0.0.1/$0"' "$port" 2>/dev/null; then
  fail "PORT=$port: taken on 127.0.0.1; stop what listens there, or choose another, e.g. PORT=$((port < 65535 ? port + 1 : port - 1))"
fi
exec "$python" -m tensorboard.main --host 127.0.0.1 --port "$port" --logdir_spec "$logs" "$@"
