#!/usr/bin/env bash
# Tests in several processes, one for each GPU:
#   tools/dist_test.sh CONFIG CHECKPOINT GPUS [OPTION OF test.py]
# For several machines, see dist_train.sh.
set -euo pipefail
if [ $# -lt 3 ]; then
    sed -n 's/^#  *\(tools.*\)/usage: \1/p' "$0" >&2
    exit 2
fi
config=$1 checkpoint=$2 gpus=$3
shift 3
exec "${PYTHON:-python}" -m torch.distributed.run \
    --nnodes "${NNODES:-1}" --node_rank "${NODE_RANK:-0}" \
    --master_addr "${MASTER_ADDR:-127.0.0.1}" --master_port "${PORT:-29500}" \
    --nproc_per_node "$gpus" \
    "$(dirname "$0")/test.py" "$config" "$checkpoint" --launcher pytorch "$@"
