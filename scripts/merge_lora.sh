#!/usr/bin/env bash
# Merge a LoRA adapter into its base by position, as the guides call it
#
#   scripts/merge_lora.sh BASE_MODEL LORA_MODEL OUTPUT_DIR [DTYPE [DEVICE]] [--flag ...]
#
# DTYPE: auto (the base's), float32, bfloat16 or float16. DEVICE, for the proof: auto, cpu or cuda. The flags are those
# of python/merge_lora.py, e.g. --test_prompt "..." or --no_validate. PYTHON: see scripts/launch.sh.
set -euo pipefail
words=()
while (($#)) && [[ $1 != -* ]]; do
  words+=("$1")
  shift
done
if ((${#words[@]} < 3 || ${#words[@]} > 5)); then
  echo "usage: scripts/merge_lora.sh BASE_MODEL LORA_MODEL OUTPUT_DIR [DTYPE [DEVICE]] [--flag ...]" >&2
  exit 2
fi
root=$(dirname "$(readlink -f "$0")")/..
python=${PYTHON:-$root/.venv/bin/python}
command -v "$python" >/dev/null || { echo "$python: no Python there; run: make setup (or set PYTHON)" >&2 && exit 2; }
exec "$python" "$root/python/merge_lora.py" --base_model "${words[0]}" --lora_model "${words[1]}" \
  --output_dir "${words[2]}" --dtype "${words[3]:-auto}" --device "${words[4]:-auto}" "$@"
