#!/usr/bin/env bash
# Makes .venv with everything pinned in requirements/. At once again it does nothing.
#
#   scripts/setup.sh             the GPU packages if nvidia-smi works here, else the CPU packages
#   ENV=cpu scripts/setup.sh     or ENV=gpu: choose. An existing .venv keeps its kind until ENV says otherwise
#   scripts/setup.sh test        (or TEST=1) also what tests and linters need; a headless Chromium, too, where there is none
#
# pip's whole output goes to .venv/setup.log. pip is used as it is configured here: index, find-links, proxy.
# Two stamps, each the sha256 of the locks it was installed from, are written last: .venv/.stagecraft-env and
# .venv/.stagecraft-test. Make depends on them.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

readonly VENV=.venv LOG=.venv/setup.log KIND_FILE=.venv/.stagecraft-kind
readonly ENV_STAMP=.venv/.stagecraft-env TEST_STAMP=.venv/.stagecraft-test

fail() { # user errors: one line, status 2
  echo "setup: $1" >&2
  exit 2
}

say() { echo "setup: $*"; }

# First interpreter that can make the environment. trl 1.16 wants 3.11; 3.11 is what the locks were made with.
find_python() {
  local name reason="no Python 3.11 or newer on PATH: install one (Debian 12, Ubuntu 22.04: apt-get install \
python3.11-venv; newer: python3-venv)"
  for name in python3.11 python3.12 python3.13 python3; do
    "$name" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || continue
    if "$name" -c 'import ensurepip, venv' 2>/dev/null; then
      echo "$name"
      return
    fi
    reason="$name has no venv module: install it (Debian, Ubuntu: apt-get install $name-venv)"
  done
  fail "$reason"
}

sha256() { cat "$@" | sha256sum | cut -d' ' -f1; }

is_stamped() { [[ -f $1 && $(<"$1") == "$2" ]]; }

tell_progress() {
  local line
  while IFS= read -r line; do
    if [[ $line =~ ^' '*Downloading' '(.*/)?([A-Za-z0-9_.]+)-.*' ('([0-9.]+' GB'|[0-9]{3,}(\.[0-9]+)?' MB')')'$ ]]; then
      say "    ${BASH_REMATCH[2]}, ${BASH_REMATCH[3]}"
    elif [[ $line == 'Installing collected packages: '* ]]; then
      say "    unpacking $(wc -w <<<"${line#*: }") packages"
    fi
  done
}

# pip with a line for every download that a person would wait for, and everything in the log.
pip_install() {
  local status=0
  printf '\n== pip install %s\n' "$*" >>"$LOG"
  "$VENV/bin/python" -m pip install --progress-bar off "$@" 2>&1 | tee -a "$LOG" | tell_progress || status=$?
  ((status == 0)) && return
  {
    echo "setup: pip failed; its last words (all of them are in $LOG):"
    grep -aE '^ *(ERROR|error):|No space left' "$LOG" | tail -n 3 | sed 's/^ */  /'
    [[ -z ${PIP_CONSTRAINT:-} ]] || echo "setup: PIP_CONSTRAINT=$PIP_CONSTRAINT is set; if it pins torch: unset PIP_CONSTRAINT"
    echo "setup: mend that and run it again: what was downloaded is kept in pip's cache"
  } >&2
  exit 1
}

# The installed set imports, torch is the locked one (its build tag aside), and CUDA answers where it should.
check_installed() {
  "$VENV/bin/python" - "$kind" "$torch" 2>>"$LOG" <<'PYTHON' || { echo "setup: the packages do not import; see the end of $LOG" >&2; exit 1; }
import sys

import accelerate, datasets, peft, torch, transformers, trl  # noqa: E401, F401

kind, locked = sys.argv[1:]
version = torch.__version__.split("+")[0]
if version != locked:
    sys.exit(f"torch is {version}, the lock says {locked}")
if kind == "gpu" and not torch.cuda.is_available():
    print(
        f"setup: warning: torch {torch.__version__} finds no CUDA device; training would run on the CPU"
        " (compare the driver's CUDA version in nvidia-smi with torch.version.cuda"
        f" = {torch.version.cuda})"
    )
PYTHON
}

case ${1:-} in
  "") with_test=${TEST:-} ;;
  test) with_test=1 ;;
  -h | --help)
    sed -n '2,/^set /{/^#/s/^# \{0,1\}//p}' "${BASH_SOURCE[0]}"
    exit
    ;;
  *) fail "unknown argument \"$1\"; there is only: test" ;;
esac
case ${TEST:-0} in 0 | 1) ;; *) fail "TEST=$TEST: must be 1 or 0" ;; esac
[[ $with_test != 0 ]] || with_test=""

case ${ENV:-} in
  cpu | gpu) kind=$ENV ;;
  "")
    if [[ -f $KIND_FILE ]]; then
      kind=$(<"$KIND_FILE")
      if [[ $kind == cpu ]] && command -v nvidia-smi >/dev/null; then
        say "this .venv has the CPU packages; ENV=gpu scripts/setup.sh changes to the GPU packages"
      fi
    elif nvidia-smi -L >/dev/null 2>&1; then
      kind=gpu
    else
      kind=cpu
    fi
    ;;
  *) fail "ENV=$ENV: must be cpu or gpu (unset: gpu if nvidia-smi works, else cpu)" ;;
esac

# Two of these in one .venv would spoil it; the second waits for the first and then finds nothing to do.
if command -v flock >/dev/null; then
  exec 9<requirements
  flock -n 9 || { say "another setup.sh is at work here: waiting for it" && flock 9; }
fi

lock=requirements/$kind.txt
env_hash=$(sha256 "$lock")
test_hash=$(sha256 requirements/test.txt)
torch=$(sed -n 's/^torch==//p' "$lock")

if [[ -d $VENV && ! -f $KIND_FILE ]]; then
  fail ".venv is there, but setup.sh did not make it: move it away, or run make PYTHON=.venv/bin/python"
fi
if [[ -d $VENV && $(<"$KIND_FILE") != "$kind" ]]; then
  say "removing .venv: it has the $(<"$KIND_FILE") packages"
  rm -rf "$VENV"
elif [[ -d $VENV ]] && ! "$VENV/bin/python" -c 'import pip' 2>/dev/null; then
  say "removing .venv: its Python does not run"
  rm -rf "$VENV"
fi

if [[ -d $VENV ]] && is_stamped "$ENV_STAMP" "$env_hash"; then
  touch "$ENV_STAMP"
  if [[ -z $with_test ]] || { is_stamped "$TEST_STAMP" "$test_hash" && [[ -x $(cat .venv/chromium-path 2>/dev/null) ]]; }; then
    [[ -z $with_test ]] || touch "$TEST_STAMP"
    say ".venv is up to date ($kind packages${with_test:+ and test packages})"
    exit
  fi
else
  # Unpacked: 2.4 GB on the CPU (5 GB where pip finds only torch's CUDA build), the rest is pip's downloads.
  python=$(find_python)
  need=$([[ $kind == gpu ]] && echo 20 || echo 4)
  free=$(($(df -Pk . | awk 'NR == 2 { print $4 }') / 1024 / 1024))
  ((free >= need)) || fail "$free GB are free here, the $kind packages need $need GB: make room"

  say "the $kind packages of $lock into .venv, with $("$python" --version)"
  mkdir -p "$VENV"
  rm -f "$ENV_STAMP"
  echo "$kind" >"$KIND_FILE"
  : >"$LOG"
  [[ -x $VENV/bin/python ]] || "$python" -m venv "$VENV" >>"$LOG" 2>&1 ||
    { echo "setup: $python -m venv .venv failed; see $LOG" >&2 && exit 1; }
  # torch first: deepspeed's build imports it. gpu.txt has every version of cpu.txt, and CUDA's where pip takes the
  # CUDA build.
  say "1/3 torch $torch ($SECONDS s)"
  pip_install -c requirements/gpu.txt "torch==$torch" setuptools wheel packaging ninja
  say "2/3 the other packages ($SECONDS s)"
  pip_install --no-build-isolation -r "$lock"
  say "3/3 do they import? ($SECONDS s)"
  check_installed
  echo "$env_hash" >"$ENV_STAMP"
fi
if [[ -n $with_test ]]; then
  say "test packages"
  rm -f "$TEST_STAMP"
  pip_install -c "$lock" -r requirements/test.txt
  scripts/fetch_chromium.sh
  echo "$test_hash" >"$TEST_STAMP"
fi
say "done in $SECONDS s"
