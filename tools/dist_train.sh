#!/usr/bin/env bash
# Trains in several processes, one for each GPU:
#   tools/dist_train.sh CONFIG GPUS [OPTION OF train.py]
# On several machines, run it on each, with NNODES (how many they are),
# NODE_RANK (which this is, from 0), MASTER_ADDR (of machine 0) and PORT.
set -euo pipefail
if [ $# -lt 2 ]; then
    sed -n 's/^#  *\(tools.*\)/usage: \1/p' "$0" >&2
    exit 2
fi
config=$1 gpus=$2
shift 2
exec "${PYTHON:-python}" -m torch.distributed.run \
    --nnodes "${NNODES:-1}" --node_rank "${NODE_RANK:-0}" \
    --master_addr "${MASTER_ADDR:-127.0.0.1}" --master_port "${PORT:-29500}" \
    --nproc_per_node "$gpus" \
    "$(dirname "$0")/train.py" "$config" --launcher pytorch "$@"
