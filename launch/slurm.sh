# What the Slurm scripts beside this file share; sourced by them and by those that `dist-vpt` writes.
#   train_in_job [STRATEGY] RECIPE... a.b=c     one training on all nodes and GPUs of the job
#   suite_in_job RECIPE... --tasks ...          a suite's sweep, by the element's number in the job array
# Both first check for frequent mistakes, and end the script. A job that was cut short is started again by Slurm, at
# most ATTEMPTS times in all (10 unless set), and continues from what is saved.
# Exit codes: 0 done, 2 a mistake to fix, 3 a training that cannot continue; after any other the job is started again.
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
attempts=${ATTEMPTS:-10} attempt=$((${SLURM_RESTART_COUNT:-0} + 1))
job=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_${SLURM_ARRAY_TASK_ID:-}}
job=${job:-${SLURM_JOB_ID:-}}
if [ -z "${python:-}" ]; then
  python=python
  if [ -x "$root/.venv/bin/python" ]; then python=$root/.venv/bin/python; fi
fi

train_in_job() {
  local strategy=ddp head
  if [ $# -gt 0 ] && [ -f "$root/launch/accelerate/$1.yaml" ]; then strategy=$1; shift; fi
  _begin "$@"
  head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
  # The address at which Slurm reaches the first node; the port by the job's number, so that two jobs on a node differ.
  export MASTER_ADDR=${MASTER_ADDR:-$(scontrol show node "$head" --oneliner | grep -o 'NodeAddr=[^ ]*' | cut -d= -f2)}
  export MASTER_PORT=${MASTER_PORT:-$((20000 + SLURM_JOB_ID % 10000))}
  set -- "$@" run.resume=auto
  if [ -n "${SLURMD_NODENAME:-}" ]; then  # a script runs on the first node: report once what is wrong on all
    _check_node "$python" "$@" || _finish $?
  fi
  if [ "$SLURM_NNODES" -gt 1 ] || [ -z "${SLURMD_NODENAME:-}" ]; then
    export -f _check_node _has_package
    _on_every_node bash -c '_check_node "$@"' bash "$python" "$@" || _finish $?
  fi
  _run _on_every_node "$python" -m dist_vpt.cli.slurm_node train "$root/launch/accelerate/$strategy.yaml" "$@"
}

suite_in_job() {
  _begin "$@"
  { _has_package "$python" && "$python" -m dist_vpt.cli.slurm_node gpus; } || exit 2
  # With --workers N an element takes whatever trials and seeds of the suite are left, N at a time.
  case " $* " in *" --workers "* | *" --workers="*) ;; *) set -- "$@" --index "${SLURM_ARRAY_TASK_ID:-0}" ;; esac
  _run _on_every_node "$python" -m dist_vpt suite "$@"
}

_begin() {
  if [ $# -eq 0 ]; then _fail "no recipe; everything after the script's name goes to train or suite"; fi
  if [ -z "$job" ]; then _fail "not in a Slurm job; start it with sbatch (launch/local.sh trains on this machine)"; fi
  if ! [[ $attempts =~ ^[1-9][0-9]*$ ]]; then _fail "ATTEMPTS=$attempts: must be a whole number from 1 on"; fi
  if [ "$attempt" -gt "$attempts" ]; then
    _fail "job $job was started $((attempt - 1)) times and ATTEMPTS=$attempts; submit it again to continue where it stopped"
  fi
  echo "slurm: job $job, attempt $attempt of $attempts, on $SLURM_JOB_NODELIST"
  trap 'stop=yes' USR1  # before the time limit, as --signal says; until training runs there is nothing to save
}

_fail() {
  echo "slurm: $1" >&2
  exit 2
}

# A node's part of the checks; exported to the other nodes.
_check_node() {
  _has_package "$1" && "$1" -m dist_vpt.cli.slurm_node check "${@:2}"
}

_has_package() {
  "$1" -c 'import dist_vpt.recipe.loading' 2>/dev/null && return
  echo "slurm: ${SLURMD_NODENAME:-$HOSTNAME}: environment not activated: $(command -v "$1" || echo "no $1 here, which")" \
    "has no dist_vpt; activate it before sbatch, or set up .venv with \`make setup\`" >&2
  return 2
}

# Once one node's part has ended, the others have a minute to end, too.
_on_every_node() {
  srun --export=ALL --nodes="$SLURM_NNODES" --ntasks="$SLURM_NNODES" --ntasks-per-node=1 --cpu-bind=none --wait=60 "$@"
}

# Run a step; SIGUSR1 is forwarded to all its processes.
_run() {
  local step code ended=
  if [ -n "${stop:-}" ]; then _finish 75; fi
  "$@" &
  step=$!
  # Again and again: a process that is still starting ignores it.
  trap 'while kill -0 "$step"; do scancel --signal=USR1 "$job"; sleep 5; done >/dev/null 2>&1 &' USR1
  trap 'ended=yes' TERM
  while wait "$step"; kill -0 "$step" 2>/dev/null; do :; done
  wait "$step"  # its own code, also where a signal ended the wait before
  code=$?
  if [ -n "$ended" ]; then exit "$code"; fi  # by Slurm or by scancel, who know whether it starts again
  _finish "$code"
}

# End the script, or have Slurm start it again.
_finish() {
  local code=$1
  if [ "$code" -ge 160 ]; then code=$((code - 160)); fi  # of dist_vpt.distributed.launcher
  case $code in 0 | 2 | 3 | 130) exit "$code" ;; 60) exit 0 ;; esac  # 130: somebody has stopped it
  if [ "$attempt" -ge "$attempts" ]; then
    echo "slurm: attempt $attempt of $attempts ended with exit code $code; submit it again to continue where it stopped" >&2
    exit "$code"
  fi
  echo "slurm: attempt $attempt of $attempts ended with exit code $code; Slurm starts the job again"
  trap - TERM
  if scontrol requeue "$job"; then sleep 120; fi  # Slurm ends this script
  echo "slurm: could not be started again; submit it again to continue where it stopped" >&2
  exit "$code"
}
