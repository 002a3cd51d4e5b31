#!/usr/bin/env bash
# Train in the terminal, on nodes of the cluster:  launch/slurm_interactive.sh [OPTIONS --] [STRATEGY] RECIPE... a.b=c
#   launch/slurm_interactive.sh --gpus-per-node=2 --time=30 -- zero2 configs/quickstart.yaml
# OPTIONS go to salloc. STRATEGY: ddp (default), zero1, zero2, zero3, zero3_offload. A process per GPU; one a node without
# GPUs. `scancel --signal=USR1 JOB` saves and stops; the same command continues.
launch=$(cd "$(dirname "$0")" && pwd)
if [ -n "${SLURM_JOB_ID:-}" ]; then
  source "$launch/slurm.sh" || exit 2
  attempts=1  # Slurm starts no interactive job again
  train_in_job "$@"
fi
options=()
if [[ " $* " == *" -- "* ]]; then
  while [ "$1" != -- ]; do options+=("$1"); shift; done
  shift
fi
if [ $# -eq 0 ]; then sed -n '2,5s/^# \{0,1\}//p' "$0" >&2; exit 2; fi
exec salloc "${options[@]}" "$launch/slurm_interactive.sh" "$@"
