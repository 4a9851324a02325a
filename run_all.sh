#!/usr/bin/env bash
#SBATCH --requeue --open-mode=append --signal=B:USR1@120
# Table 1, six seeds a task: bash run_all.sh [--dry-run] [TASK ... | demo | setup]
#   OUT=runs     where results go
#   GPUS="0 1"   train on these, a task on each at a time
#   OPTIONS="--episodes 100"   settings of srpo.py train, for every task
#   PYTHON=...   a Python that has everything, instead of .venv, which is made from requirements.txt
# On Slurm each element of an array takes one task: sbatch --array=0-14 run_all.sh
set -u
cd "$(dirname "${BASH_SOURCE[0]}")" || exit 2
[ -e srpo.py ] || cd "${SLURM_SUBMIT_DIR:-.}" || exit 2 # Slurm runs a copy of this file from elsewhere
dry="" out=${OUT:-runs} python=${PYTHON:-.venv/bin/python} options=()
[ "${1:-}" != --dry-run ] || { dry=1; shift; }
all=({halfcheetah,hopper,walker2d}-medium{-expert,,-replay}-v2 antmaze-umaze{,-diverse}-v2
  antmaze-{medium,large}-{play,diverse}-v2)
tasks=("${@:-${all[@]}}")
if [ "${1:-}" = demo ]; then # small networks and few steps: three seeds in minutes on two CPU cores
  tasks=(maze2d-umaze-v1)
  options=(--seeds 0 1 2 --critic-steps 15000 --critic-lr 1e-3 --critic-width 128 --gamma 0.98
    --target-rate 0.01 --behavior-steps 2500 --behavior-batch 256 --behavior-lr 1e-3 --behavior-width 64
    --behavior-blocks 2 --policy-steps 3000 --policy-lr 1e-3 --policy-width 128 --beta 0.4
    --evaluations 4 --episodes 50 --also bc)
fi
read -ra given <<<"${OPTIONS:-}"
for task in "${tasks[@]}"; do
  [[ " ${all[*]} maze2d-umaze-v1 setup " == *" $task "* ]] ||
    { echo "run_all: $task is none of: ${all[*]} demo setup" >&2; exit 2; }
done
[ -z "${SLURM_ARRAY_TASK_ID:-}" ] || tasks=("${tasks[@]:SLURM_ARRAY_TASK_ID:1}")
[ "${#tasks[@]}" != 0 ] || { echo "run_all: no task has the number $SLURM_ARRAY_TASK_ID" >&2; exit 2; }
train() {
  "$@" "$python" srpo.py train "$task" --out "$out" ${options[@]+"${options[@]}"} ${given[@]+"${given[@]}"}
}
if [ -n "$dry" ]; then
  for task in "${tasks[@]}"; do train echo; done
  exit
fi

set_up() ( # in a subshell, with a lock: the elements of a Slurm array set it up once
  exec 9>.venv.lock && flock 9 || exit
  cmp -s requirements.txt .venv/requirements.txt && exit
  python3 -m venv .venv && .venv/bin/python -m pip install -r requirements.txt &&
    sed -n 's/^#no-deps: *//p' requirements.txt | xargs .venv/bin/python -m pip install --no-deps &&
    cp requirements.txt .venv/requirements.txt # the stamp, last of all: `set -e` would not work in here
)
if [ -z "${PYTHON:-}" ]; then
  set_up || { echo "run_all: .venv can't be made, see above; it needs Python 3.10 to 3.13" >&2; exit 2; }
fi

[ "${1:-}" != setup ] || exit 0

state=$(mktemp -d) || exit 2
workers=() stopped=0
trap 'rm -rf "$state"' EXIT
await() { # a process's end, and its status: a signal to this shell ends `wait` before that
  wait "$1"
  status=$?
  while kill -0 "$1" 2>/dev/null; do wait "$1"; status=$?; done
}
work() { # every task that no other worker has taken, on GPU $1 if given
  local task child=""
  [ -z "$1" ] || export CUDA_VISIBLE_DEVICES=$1
  trap 'touch "$state/stop"; [ -z "$child" ] || kill -TERM "$child" 2>/dev/null' TERM
  for task in "${tasks[@]}"; do
    if [ -e "$state/stop" ] || ! mkdir "$state/$task" 2>/dev/null; then continue; fi
    mkdir -p "$out/$task"
    train exec > >(tee -a "$out/$task/output.txt") 2>&1 &
    child=$!
    await "$child"
    echo "$status" >"$state/$task/status"
  done
}
trap 'stopped=130; kill -TERM "${workers[@]}" 2>/dev/null' INT
trap 'stopped=143; kill -TERM "${workers[@]}" 2>/dev/null' TERM USR1
read -ra gpus <<<"${GPUS:-}"
for gpu in "${gpus[@]:-}"; do
  work "$gpu" &
  workers+=($!)
done
for worker in "${workers[@]}"; do await "$worker"; done
[ "$stopped" = 0 ] || { echo "run_all: stopped; the same command goes on from there" >&2; exit "$stopped"; }

[ "${1:-}" != demo ] || "$python" srpo.py evaluate "$out/${tasks[0]}" --method random >/dev/null
"$python" figures.py report --out "$out"
failed=0
for task in "${tasks[@]}"; do
  status=$(cat "$state/$task/status" 2>/dev/null || echo "its worker died")
  [ "$status" = 0 ] || { failed=1; echo "run_all: $task failed ($status); see $out/$task/output.txt" >&2; }
done
exit "$failed"
