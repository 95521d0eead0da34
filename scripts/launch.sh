#!/usr/bin/env bash
# Start a Python script on the devices asked for: one plain process, or one a device under torchrun.
#
#   scripts/launch.sh SCRIPT.py [FLAG ...]
#
# GPUS=0,1          these CUDA devices, one process each (without CUDA: as many CPU processes)
# NPROC=2           so many processes; alone, or with GPUS where they are not one a device
# NNODES=2 NODE_RANK=0 MASTER_ADDR=10.0.0.1 MASTER_PORT=29500    the same command on each of several machines
# DEEPSPEED=zero2   adds --deepspeed ds_configs/zero2.json
# --check_flags     among the flags: reads them and stops, in silence when all is well
# PYTHON=...        an interpreter with the packages, instead of .venv/bin/python
set -euo pipefail
cd "$(dirname "$0")/.."

faults=()
fault() { faults+=("$1"); }
is_count() { [[ $1 =~ ^[1-9][0-9]*$ ]]; }

if (($# == 0)); then
  echo "usage: scripts/launch.sh SCRIPT.py [FLAG ...]" >&2
  exit 2
fi
python=${PYTHON:-.venv/bin/python}
command -v "$python" >/dev/null || fault "$python: no Python there; run: make setup (or set PYTHON)"
[[ -f $1 ]] || fault "$1: no such script"

# ---- Devices and processes

cuda=$(nvidia-smi -L 2>/dev/null | grep -c '^GPU ') || cuda=0
visible=$cuda
# A scheduler may have chosen already; nvidia-smi doesn't look at its choice. "" and -1 hide every device.
if [[ -v CUDA_VISIBLE_DEVICES ]]; then
  IFS=, read -ra chosen <<<"$CUDA_VISIBLE_DEVICES"
  if ((${#chosen[@]} == 0)) || [[ ${chosen[0]} == -* ]]; then cuda=0; fi
  visible=$((cuda == 0 ? 0 : ${#chosen[@]}))
fi

shown=() # what the printed command needs in front to be the same command
processes=$((visible > 0 ? visible : 1))
if [[ -n ${GPUS:-} ]]; then
  if [[ ! $GPUS =~ ^[0-9]+(,[0-9]+)*$ ]]; then
    fault "GPUS=\"$GPUS\": must be device numbers with commas between, e.g. GPUS=0,1"
  else
    IFS=, read -ra devices <<<"$GPUS"
    processes=${#devices[@]}
    twice=$(printf '%s\n' "${devices[@]}" | sort | uniq -d | head -n 1)
    [[ -z $twice ]] || fault "GPUS=$GPUS: device $twice stands twice"
    if ((cuda > 0)); then
      for device in "${devices[@]}"; do
        ((10#$device < cuda)) || fault "GPUS=$GPUS: no CUDA device $device here (there: 0 to $((cuda - 1)))"
      done
      visible=$processes
      export CUDA_VISIBLE_DEVICES=$GPUS
      shown+=("CUDA_VISIBLE_DEVICES=$GPUS")
    fi
  fi
fi
if [[ -n ${NPROC:-} ]]; then
  if ! is_count "$NPROC"; then
    fault "NPROC=\"$NPROC\": must be a whole number from 1 up"
  elif ((visible > 0 && NPROC > visible)); then
    fault "NPROC=$NPROC: only $visible CUDA devices, and a process needs one of its own"
  else
    processes=$NPROC
    # A process that sees more devices than its own would use them all at once (the trainer's DataParallel). With
    # GPUS=0,1 NPROC=1 that is what was asked for: one process with both, for --device_map auto.
    if ((processes < visible)) && [[ -z ${GPUS:-} ]]; then
      if [[ ! -v CUDA_VISIBLE_DEVICES ]]; then mapfile -t chosen < <(seq 0 $((visible - 1))); fi
      CUDA_VISIBLE_DEVICES=$(IFS=,; echo "${chosen[*]:0:processes}")
      export CUDA_VISIBLE_DEVICES
      shown+=("CUDA_VISIBLE_DEVICES=$CUDA_VISIBLE_DEVICES")
    fi
  fi
fi

# ---- Machines

nodes=${NNODES:-1} rank=${NODE_RANK:-0} port=${MASTER_PORT:-29500}
if ! is_count "$nodes"; then
  fault "NNODES=\"$nodes\": must be a whole number from 1 up"
elif ((nodes > 1)); then
  [[ -n ${MASTER_ADDR:-} ]] || fault "NNODES=$nodes needs MASTER_ADDR: the address of the machine with NODE_RANK=0"
  if [[ ! $rank =~ ^[0-9]+$ ]] || ((10#$rank >= nodes)); then
    fault "NODE_RANK=\"$rank\": must be from 0 to $((nodes - 1)) (NNODES=$nodes)"
  fi
  if ! is_count "$port" || ((port > 65535)); then fault "MASTER_PORT=\"$port\": must be a port, 1 to 65535"; fi
fi

# ---- DeepSpeed

extra=()
if [[ -n ${DEEPSPEED:-} ]]; then
  extra=(--deepspeed "ds_configs/$DEEPSPEED.json")
  if [[ ! -f ${extra[1]} ]]; then
    there=$(cd ds_configs 2>/dev/null && printf '%s\n' *.json | sed 's/\.json$//' | paste -sd' ')
    fault "DEEPSPEED=$DEEPSPEED: no ${extra[1]} (there: $there)"
  elif ((visible == 0)); then
    export DS_ACCELERATOR=cpu # it guesses CUDA otherwise
    shown+=("DS_ACCELERATOR=cpu")
  fi
fi

if ((${#faults[@]})); then
  printf '%s\n' "${faults[@]}" >&2
  exit 2
fi

if [[ " $* " == *" --check_flags "* ]]; then exec "$python" "$@" "${extra[@]}"; fi

# ---- The command

if [[ -n ${GPUS:-} && -z ${NPROC:-} ]] && ((cuda == 0)); then
  echo "GPUS=$GPUS: no CUDA device here, so $processes CPU process$( ((processes == 1)) || echo es)"
fi
command=("$python")
# DeepSpeed reads its configuration against the process group, so it wants torchrun even for one process.
if ((processes > 1 || nodes > 1)) || [[ -n ${DEEPSPEED:-} ]]; then
  command+=(python/supervise.py --ranks --nproc_per_node "$processes") # torchrun, with time for a checkpoint
  if ((nodes > 1)); then
    command+=(--nnodes "$nodes" --node_rank "$rank" --master_addr "$MASTER_ADDR" --master_port "$port")
  else
    command+=(--standalone)
  fi
  if ((processes > 1)) && [[ -z ${OMP_NUM_THREADS:-} ]]; then # each would start a thread a core
    cores=$(nproc)
    export OMP_NUM_THREADS=$((cores > processes ? cores / processes : 1))
    shown+=("OMP_NUM_THREADS=$OMP_NUM_THREADS")
  fi
fi
command+=("$@" "${extra[@]}")
unset MASTER_ADDR MASTER_PORT # torchrun has them as flags; half of a rendezvous would mislead a plain process
printf 'launch:'
printf ' %q' "${shown[@]}" "${command[@]}"
echo
# Signals go through it to the stage, which it starts again with a smaller micro-batch when memory did not suffice.
exec env "${shown[@]}" "$python" python/supervise.py "${command[@]}"
