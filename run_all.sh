#!/usr/bin/env bash
#SBATCH --requeue --open-mode=append --signal=B:USR1@120
# Table 1, six seeds a task: bash run_all.sh [--dry-run] [TASK ... | demo | setup]
#   demo: one task in minutes, without download or GPU; setup: .venv, and no training
#   OUT=runs                   where results and the report go
#   GPUS=0,1                   a task on each of these at a time; default: PyTorch's first
#   OPTIONS="--episodes 100"   settings of run.py train, for every task
#   PYTHON=...                 one that has everything, instead of .venv's
# On Slurm each element of an array takes one task: sbatch --array=0-14 run_all.sh
# shellcheck disable=SC2016,SC2206
set -uf
fail() { echo "run_all: $1" >&2; exit 2; }
absolute() { [ -z "$1" ] || realpath -ms -- "${1/#\~\//$HOME/}"; } # of the caller's folder
[[ " $* " != *" --help "* ]] || { sed -n '3,9s/^# //p' "${BASH_SOURCE[0]}"; exit; }
OUT=$(absolute "${OUT:-}") D4RL_DATASET_DIR=$(absolute "${D4RL_DATASET_DIR:-}")
[[ ${PYTHON:-} != */* ]] || PYTHON=$(absolute "$PYTHON")
cd "$(dirname "${BASH_SOURCE[0]}")" || exit 2
[ -e run.py ] || cd "${SLURM_SUBMIT_DIR:-.}" || exit 2 # Slurm runs a copy of this file
out=${OUT:-runs} python=${PYTHON:-.venv/bin/python} dry="" failed=0 stopped=""
[ "${1:-}" != --dry-run ] || { dry=yes && shift; }
all=({halfcheetah,hopper,walker2d}-medium{-expert,,-replay}-v2
  antmaze-umaze{,-diverse}-v2 antmaze-{medium,large}-{play,diverse}-v2)
tasks=("${@:-${all[@]}}") OPTIONS=${OPTIONS:-} GPUS=${GPUS:-}
[ "$*" != demo ] || { tasks=(maze2d-umaze-v1) && OPTIONS="--demo $OPTIONS"; }
[ -z "${SLURM_ARRAY_TASK_ID:-}" ] || tasks=("${tasks[@]:SLURM_ARRAY_TASK_ID:1}")
for task in "${tasks[@]}"; do
  [[ "$*" = setup || $task =~ ^(halfcheetah|hopper|walker2d|antmaze|maze2d)-.*-v[12]$ ]] ||
    fail "$task is none of: ${all[*]}; or give demo or setup alone"
done

set_up() ( # with a lock: the elements of a Slurm array set it up once
  is_made() { cmp -s requirements.txt .venv/requirements.txt && .venv/bin/python -V >/dev/null; }
  is_made && exit
  python3 -c 'import sys; sys.exit(not (3, 10) <= sys.version_info < (3, 14))' ||
    fail "Python 3.10 to 3.13 is needed as python3, which is $(python3 --version 2>&1)"
  exec 9>.venv.lock && { flock 9 || echo "run_all: no locks here: run setup alone first" >&2; }
  is_made || { python3 -m venv --clear .venv && .venv/bin/python -m pip install -r requirements.txt &&
    sed -n 's/^#no-deps: *//p' requirements.txt | xargs .venv/bin/python -m pip install --no-deps &&
    cp requirements.txt .venv/requirements.txt; } # the stamp, last of all
)
train() { # what xargs runs, in place SLOT of those that GPUS has; 255 ends xargs
  local line=("$python" run.py train "$1" --out "$out" $OPTIONS) gpus=(${GPUS//,/ })
  [ -z "$dry" ] || { echo "${line[@]}" && return; }
  [ -z "$GPUS" ] || export CUDA_VISIBLE_DEVICES=${gpus[SLOT]}
  mkdir -p "$out/$1" && "${line[@]}" 2>&1 | tee -a "$out/$1/output.txt"
  case ${PIPESTATUS[0]} in 0) return 0 ;; 130 | 143) return 255 ;; esac
  echo "run_all: $1 failed; see $out/$1/output.txt" && return 1
}
[ -n "${PYTHON:-}$dry" ] || set_up || fail ".venv can't be made, see above"
[ "$*" != setup ] || exit 0
export python out dry OPTIONS GPUS D4RL_DATASET_DIR && export -f train
export GOMP_SPINCOUNT=3000 # PyTorch's threads wait less busily, or would stall beside others
trap 'stopped=130' INT && trap 'stopped=143' TERM USR1
set -m
( # a process group, in which only run.py, which asks for it, hears of a stop
  trap '' INT TERM USR1 && places=$(wc -w <<<"${GPUS//,/ }")
  printf '%s\n' "${tasks[@]}" | xargs -n 1 -P "$((places > 0 ? places : 1))" \
    --process-slot-var=SLOT bash -c 'train "$1"' run_all 2>/dev/null # its "aborting"
) &
while kill -0 $! 2>/dev/null; do
  [ -n "$stopped" ] || wait $! || failed=1
  [ -z "$stopped" ] || { kill -TERM -- -$! 2>/dev/null && sleep 1; } # again, if too early
done
[ -z "$stopped" ] || { echo "run_all: stopped; the same command goes on from there" >&2; exit "$stopped"; }
[ -z "$dry" ] || exit 0
[ "$*" != demo ] || "$python" run.py evaluate "$out/${tasks[0]}" --method random >/dev/null
"$python" figures.py report --out "$out" && exit "$failed"
