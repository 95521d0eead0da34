#!/usr/bin/env bash
# A stage's finished model in 8 bits, for vLLM -> outputs-export/RECIPE/STAGE-FORMAT
#
#   RECIPE=tiny STAGE=dpo FORMAT=fp8 scripts/export.sh [FLAG ...]      flags of python/export_model.py; the last one wins
#
# STAGE          base, pt, sft, dpo or ppo
# FORMAT         fp8 or int8
# SFT_DATA       int8: folder of conversations to calibrate with (default data/finetune)
# EXPORT_PYTHON  an interpreter with the packages of requirements/export.txt, instead of .venv-export
#
# The first time, and when the lock changed, makes .venv-export (1.5 GB on the CPU) with pip as it is configured here.
# Its whole output goes to .venv-export/setup.log; the stamp .stagecraft-env, the lock's sha256, is written last.
set -euo pipefail
cd "$(dirname "$0")/.."
readonly VENV=.venv-export LOCK=requirements/export.txt LOG=.venv-export/setup.log STAMP=.venv-export/.stagecraft-env
recipe=${RECIPE:-tiny} stage=${STAGE:-} format=${FORMAT:-fp8}
python=${PYTHON:-.venv/bin/python}

say() { echo "export: $*"; }
fail() { # user errors: status 2
  printf '%s\n' "$@" >&2
  exit 2
}

pip_install() {
  printf '\n== pip install %s\n' "$*" >>"$LOG"
  "$VENV/bin/python" -m pip install --progress-bar off "$@" >>"$LOG" 2>&1 && return
  {
    echo "export: pip failed; its last words (all of them are in $LOG):"
    grep -aE '^ *(ERROR|error):|No space left' "$LOG" | tail -n 3 | sed 's/^ */  /'
    echo "export: mend that and run it again: what was downloaded is kept in pip's cache"
  } >&2
  exit 1
}

# torch first, by itself: that gets the build this machine's index has, and the lock then asks for no other.
make_environment() {
  local hash torch build free need=4
  if command -v flock >/dev/null; then flock 9; fi # two of these in one environment would spoil it
  hash=$(sha256sum <"$LOCK" | cut -d' ' -f1)
  if [[ -d $VENV ]] && ! "$VENV/bin/python" -c 'import pip' 2>/dev/null; then
    say "removing $VENV: its Python does not run"
    rm -rf "$VENV"
  fi
  if [[ -f $STAMP && $(<"$STAMP") == "$hash" ]]; then return; fi
  if nvidia-smi -L >/dev/null 2>&1; then need=12; fi
  free=$(($(df -Pk . | awk 'NR == 2 { print $4 }') / 1024 / 1024))
  ((free >= need)) || fail "export: $free GB are free here, $VENV needs $need GB: make room"
  torch=$(sed -n 's/^torch==//p' "$LOCK")
  say "the packages of $LOCK into $VENV, with $("$python" --version)"
  mkdir -p "$VENV"
  rm -f "$STAMP"
  : >"$LOG"
  [[ -x $VENV/bin/python ]] || "$python" -m venv "$VENV" >>"$LOG" 2>&1 ||
    { echo "export: $python -m venv $VENV failed; see $LOG" >&2 && exit 1; }
  say "1/3 torch $torch ($SECONDS s)"
  pip_install -c requirements/gpu.txt "torch==$torch" setuptools
  build=$("$VENV/bin/python" -c 'from importlib.metadata import version; print(version("torch"))')
  say "2/3 llm-compressor and what it needs ($SECONDS s)"
  pip_install -r "$LOCK"
  say "3/3 does it import? ($SECONDS s)"
  "$VENV/bin/python" -c 'import sys, llmcompressor, torch; sys.exit(torch.__version__ != sys.argv[1])' "$build" \
    >>"$LOG" 2>&1 || { echo "export: the packages do not import, or torch is not $build; see $LOG" >&2 && exit 1; }
  echo "$hash" >"$STAMP"
}

case ${1:-} in
  -h | --help)
    sed -n '2,/^set /{/^#/s/^# \{0,1\}//p}' "${BASH_SOURCE[0]}"
    exit
    ;;
esac
case $stage in
  base | pt | sft | dpo | ppo) ;;
  rm) fail "STAGE=rm: a reward model scores answers and gives none, so there is nothing to serve; export another stage" ;;
  *) fail "STAGE=\"$stage\": must be base, pt, sft, dpo or ppo" ;;
esac
case $format in
  fp8 | int8) ;;
  *) fail "FORMAT=\"$format\": must be fp8 or int8 (for other formats no well-kept library is on the package index)" ;;
esac
model=outputs-$stage/$recipe/model
flags=(--model "$model" --format "$format")
if [[ " $* " != *" --output_dir"* ]]; then flags+=(--overwrite_output_dir); fi # its own folder only
if [[ $format == int8 ]]; then flags+=(--calibration_data "${SFT_DATA:-data/finetune}"); fi
if [[ " $* " != *" --check_flags "* && ! -f outputs-$stage/$recipe/DONE ]]; then
  fail "STAGE=$stage RECIPE=$recipe: not finished (no outputs-$stage/$recipe/DONE); run: make $stage RECIPE=$recipe"
fi

if [[ -z ${EXPORT_PYTHON:-} ]]; then
  command -v "$python" >/dev/null || fail "$python: no Python there; run: make setup (or set PYTHON)"
  # A mistyped flag is told before a minute of installing, not after it.
  "$python" python/export_model.py "${flags[@]}" "$@" --check_flags
  if [[ " $* " == *" --check_flags "* ]]; then exit; fi
  make_environment 9<requirements
fi
exec "${EXPORT_PYTHON:-$VENV/bin/python}" python/export_model.py "${flags[@]}" "$@"
