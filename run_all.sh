#!/usr/bin/env bash
#SBATCH --requeue --open-mode=append --signal=B:USR1@120
# Table 1, six seeds a task: bash run_all.sh [--dry-run] [TASK ... | demo | setup]
#   OUT=runs     where results go
#   GPUS=0,1     train on these, a task on each at a time
#   OPTIONS="--episodes 100"   settings of run.py train, for every task
#   PYTHON=...   a Python that has everything, instead of .venv, which is made from requirements.txt
# On Slurm each element of an array takes one task: sbatch --array=0-14 run_all.sh
set -u
fail() { echo "run_all: $1" >&2; exit 2; }
cd "$(dirname "${BASH_SOURCE[0]}")" || exit 2
[ -e run.py ] || cd "${SLURM_SUBMIT_DIR:-.}" || exit 2 # Slurm runs a copy of this file from elsewhere
dry="" out=${OUT:-runs} out=${out/#\~\//$HOME/} python=${PYTHON:-.venv/bin/python} options=() failed=0 stopped=""
[ "${1:-}" != --dry-run ] || { dry=yes; shift; }
all=({halfcheetah,hopper,walker2d}-medium{-expert,,-replay}-v2 antmaze-umaze{,-diverse}-v2
  antmaze-{medium,large}-{play,diverse}-v2)
tasks=("${@:-${all[@]}}")
if [ "$*" = demo ]; then # small networks and few steps: three seeds in minutes on two CPU cores
  tasks=(maze2d-umaze-v1)
  options=(--seeds 0 1 2 --critic-steps 15000 --critic-lr 1e-3 --critic-width 128 --gamma 0.98
    --target-rate 0.01 --behavior-steps 2500 --behavior-batch 256 --behavior-lr 1e-3 --behavior-width 64
    --behavior-blocks 2 --policy-steps 3000 --policy-lr 1e-3 --policy-width 128 --beta 0.4
    --evaluations 4 --episodes 50 --also iql bc --device cpu)
fi
for task in "${tasks[@]}"; do
  [[ "$*" == setup || " ${all[*]} maze2d-umaze-v1 " == *" $task "* ]] ||
    fail "$task is none of: ${all[*]}; or give demo or setup alone"
done
[ -z "${SLURM_ARRAY_TASK_ID:-}" ] || tasks=("${tasks[@]:SLURM_ARRAY_TASK_ID:1}")
[ "${#tasks[@]}" != 0 ] || fail "no task has the number $SLURM_ARRAY_TASK_ID"
read -ra gpus <<<"${GPUS:+${GPUS//,/ }}"
read -ra given <<<"${OPTIONS:-}"
train() { # $1: echo or exec; $2: a GPU, or nothing for what PyTorch takes
  [ -z "$2" ] || export CUDA_VISIBLE_DEVICES=$2
  "$1" "$python" run.py train "$task" --out "$out" ${options[@]+"${options[@]}"} ${given[@]+"${given[@]}"}
}
[ -z "$dry" ] || { for task in "${tasks[@]}"; do train echo ""; done; exit; }

set_up() ( # in a subshell, with a lock: the elements of a Slurm array set it up once
  is_made() { cmp -s requirements.txt .venv/requirements.txt && .venv/bin/python --version >/dev/null; }
  is_made && exit
  python3 -c 'import sys; sys.exit(not (3, 10) <= sys.version_info < (3, 14))' ||
    fail "Python 3.10 to 3.13 is needed as python3, which is $(python3 --version 2>&1)"
  exec 9>.venv.lock && { flock 9 || echo "run_all: no locks in this folder: run setup alone first" >&2; }
  is_made && exit
  python3 -m venv --clear .venv && .venv/bin/python -m pip install -r requirements.txt &&
    sed -n 's/^#no-deps: *//p' requirements.txt | xargs .venv/bin/python -m pip install --no-deps &&
    cp requirements.txt .venv/requirements.txt # the stamp, last of all
)
[ -n "${PYTHON:-}" ] || set_up || fail ".venv can't be made, see above"
[ "$*" != setup ] || exit 0

declare -A running # the trainings: "TASK GPU" by process
finish() {         # waits for one of them to end, which frees its GPU
  local pid task gpu
  while sleep 0.2 & wait $!; do
    for pid in "${!running[@]}"; do
      kill -0 "$pid" 2>/dev/null && continue
      read -r task gpu <<<"${running[$pid]}"
      wait "$pid" || [ -n "$stopped" ] || { failed=1 && echo "run_all: $task failed; see $out/$task/output.txt" >&2; }
      gpus+=("$gpu") && unset "running[$pid]" && return
    done
  done
}
trap 'stopped=130; kill -TERM "${!running[@]}"' INT
trap 'stopped=143; kill -TERM "${!running[@]}"' TERM USR1
[ "${#gpus[@]}" != 0 ] || gpus=("")
export GOMP_SPINCOUNT=3000 # PyTorch's threads wait less busily, or would stall beside other programs
for task in "${tasks[@]}"; do
  [ "${#gpus[@]}" != 0 ] || finish
  [ -z "$stopped" ] || break
  mkdir -p "$out/$task"
  train exec "${gpus[0]}" > >(tee -a "$out/$task/output.txt") 2>&1 &
  running[$!]="$task ${gpus[0]}" gpus=("${gpus[@]:1}")
done
while [ "${#running[@]}" != 0 ]; do finish; done
[ -z "$stopped" ] || { echo "run_all: stopped; the same command goes on from there" >&2; exit "$stopped"; }
[ "$*" != demo ] || "$python" run.py evaluate "$out/${tasks[0]}" --method random >/dev/null
"$python" figures.py report --out "$out"
exit "$failed"
