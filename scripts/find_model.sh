#!/usr/bin/env bash
# Print the model to talk to: MODEL if it is set, else the recipe's most recently finished one.
#
#   RECIPE=tiny scripts/find_model.sh
#
# The reward model scores answers and can't give any, so it never counts.
set -euo pipefail
cd "$(dirname "$0")/.."
recipe=${RECIPE:-tiny}
if [[ -n ${MODEL:-} ]]; then
  if [[ ! -f $MODEL/config.json ]]; then
    echo "MODEL=$MODEL: not a complete model's folder (no config.json there)" >&2
    exit 2
  fi
  echo "$MODEL"
  exit
fi
newest=
for stage in base pt sft dpo ppo; do # of equal times the later stage wins
  marker=outputs-$stage/$recipe/DONE
  if [[ -f $marker && ! ($newest -nt $marker) ]]; then newest=$marker; fi
done
if [[ -z $newest ]]; then
  echo "RECIPE=$recipe: no finished model yet; run: make sft RECIPE=$recipe, or name a model: MODEL=FOLDER" >&2
  exit 2
fi
echo "${newest%/DONE}/model"
