#!/usr/bin/env bash
# Trains in a job of Slurm, one process for each GPU:
#   tools/slurm_train.sh PARTITION JOB CONFIG [WORK_DIR] [OPTION OF train.py]
# Variables: GPUS (of the whole job; 8), GPUS_PER_NODE (8), CPUS_PER_TASK (5),
# SRUN_ARGS (more options of srun) and PORT (29500).
set -euo pipefail
if [ $# -lt 3 ]; then
    sed -n 's/^#  *\(tools.*\)/usage: \1/p' "$0" >&2
    exit 2
fi
partition=$1 job=$2 config=$3
shift 3
if [[ $# -gt 0 && $1 != -* ]]; then
    set -- --work-dir "$@"
fi
gpus=${GPUS:-8} per_node=${GPUS_PER_NODE:-8}
if [ "$gpus" -lt "$per_node" ]; then per_node=$gpus; fi
if [ -n "${PORT:-}" ]; then export MASTER_PORT=$PORT; fi
read -ra srun_args <<<"${SRUN_ARGS:-}"
exec srun --partition "$partition" --job-name "$job" \
    --gres "gpu:$per_node" --ntasks "$gpus" --ntasks-per-node "$per_node" \
    --cpus-per-task "${CPUS_PER_TASK:-5}" --kill-on-bad-exit=1 \
    ${srun_args[@]+"${srun_args[@]}"} \
    "${PYTHON:-python}" -u "$(dirname "$0")/train.py" \
    "$config" --launcher slurm "$@"
