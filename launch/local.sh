#!/usr/bin/env bash
# Train on the devices of this machine:  launch/local.sh [STRATEGY] [PROCESSES] RECIPE... a.b=c
#   launch/local.sh quickstart                  one process per GPU (one without GPUs), DDP
#   launch/local.sh zero3 4 quickstart          four processes, ZeRO-3
# STRATEGY: ddp (default), zero1, zero2, zero3, zero3_offload: a file in launch/accelerate. Without a GPU the
# processes compute on the CPU. Everything after STRATEGY and PROCESSES goes to dist_vpt.train.
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
strategy=ddp
if [ $# -gt 0 ] && [ -f "$root/launch/accelerate/$1.yaml" ]; then strategy=$1; shift; fi
processes=
if [ $# -gt 0 ] && [[ $1 =~ ^[0-9]+$ ]]; then processes=$1; shift; fi
if [ $# -gt 0 ] && [[ $1 != *=* && $1 != -* ]] && [ ! -f "$1" ] &&
  ! compgen -G "$root/configs/$1.yaml" >/dev/null && ! compgen -G "$root/configs/*/$1.yaml" >/dev/null; then
  echo "local.sh: $1: neither a strategy of launch/accelerate nor a recipe" >&2; exit 2
fi
if [ $# -eq 0 ]; then sed -n '2,6s/^# \{0,1\}//p' "$0" >&2; exit 2; fi
case $root in  # the environment in which the package is installed, or a clone's; else the python that is found first
  */lib/python*/site-packages/dist_vpt) python=${root%/lib/python*}/bin/python ;;
  *) python=$root/.venv/bin/python ;;
esac
[ -x "$python" ] || python=python
gpus=$("$python" -c 'import torch; print(torch.accelerator.device_count())')
processes=${processes:-$((gpus > 0 ? gpus : 1))}
if [ "$gpus" -gt 0 ] && [ "$processes" -gt "$gpus" ]; then
  echo "local.sh: $processes processes requested, but this machine has $gpus devices" >&2; exit 2
fi
# DeepSpeed would be switched off by --cpu; Accelerate's DDP needs a setting where there is no GPU.
if [ "$gpus" -eq 0 ] && [ "$strategy" = ddp ]; then export ACCELERATE_USE_CPU=true; fi
if [ "$gpus" -eq 0 ] && [ "$strategy" != ddp ]; then export DS_ACCELERATOR=${DS_ACCELERATOR:-cpu}; fi
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$(( $(nproc) / processes > 0 ? $(nproc) / processes : 1 ))}
sharding=()
if [ "$strategy" != ddp ]; then sharding=(--deepspeed_config_file "$root/launch/accelerate/$strategy.json"); fi
exec "$python" -m accelerate.commands.launch --config_file "$root/launch/accelerate/$strategy.yaml" "${sharding[@]}" \
  --num_processes "$processes" --main_process_port "${MASTER_PORT:-0}" -m dist_vpt.train "$@"
