#!/usr/bin/env bash
# Train every stage of a recipe and compare the models: make all, with the choices as flags.
#
#   scripts/train_all.sh [--recipe R] [--gpus 0,1] [--align dpo|rm|none] [--price N]
#
#   --recipe R      a folder in recipes/ (default tiny)
#   --gpus 0,1      which CUDA devices (default: all there are)
#   --align WHAT    after SFT: dpo, rm (a reward model) or none (default: all the recipe has)
#   --price N       what the machine costs an hour, to say at the end what the training cost
#   --help          this text
#
# What is up to date doesn't run again, so the same command goes on after a crash.
set -euo pipefail
cd "$(dirname "$0")/.."

faults=()
fault() { faults+=("$1"); }

recipe=${RECIPE:-tiny} gpus=${GPUS:-} align='' price=''
while (($#)); do
  case $1 in
    -h | --help)
      sed -n '2,/^[^#]/s/^# \{0,1\}//p' "scripts/${0##*/}"
      exit 0
      ;;
    --recipe | --gpus | --align | --price)
      if (($# < 2)) || [[ $2 == --* ]]; then
        fault "$1 needs a value; --help shows which"
        shift
        continue
      fi
      printf -v "${1#--}" '%s' "$2"
      shift 2
      ;;
    *)
      fault "unknown flag \"$1\"; there are --recipe --gpus --align --price --help"
      shift
      ;;
  esac
done
case $align in
  '' | dpo | rm | none) ;;
  ppo) fault "--align ppo: PPO is not in this version; choose dpo, rm or none" ;;
  *) fault "--align $align: must be dpo, rm or none" ;;
esac
if [[ -n $price && ! $price =~ ^[0-9]+(\.[0-9]+)?$ ]]; then fault "--price $price: must be a number, e.g. 18"; fi
if ((${#faults[@]})); then
  printf '%s\n' "${faults[@]}" >&2
  exit 2
fi

choice=("RECIPE=$recipe" "GPUS=$gpus")
if [[ -n $align ]]; then
  # What the recipe has, asked of Make itself, less the ways not chosen.
  # shellcheck disable=SC2016 # Make expands it
  stages=$(make --silent --eval='print-stages: ; @echo $(STAGES)' print-stages "RECIPE=$recipe")
  chosen=
  for stage in $stages $align; do
    case $stage in
      rm | dpo) if [[ $stage != "$align" || " $chosen " == *" $stage "* ]]; then continue; fi ;;
      none) continue ;;
    esac
    chosen+="${chosen:+ }$stage"
  done
  choice+=("STAGES=$chosen")
fi

status=0
make all "${choice[@]}" || status=$?
printf '%s after %d:%02d:%02d' "$( ((status)) && echo stopped || echo finished)" \
  $((SECONDS / 3600)) $((SECONDS % 3600 / 60)) $((SECONDS % 60))
if [[ -n $price ]]; then
  awk -v s="$SECONDS" -v p="$price" 'BEGIN { printf ", %.2f at %s an hour", s * p / 3600, p }'
fi
echo
exit "$status"
