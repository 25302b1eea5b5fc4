#!/usr/bin/env bash
# torchrun on bare nodes, by hand; to be started on each node with its number:
#
#   NODES=2 MASTER=node0 ./launch/torchrun.sh 0 configs/RUN.yaml [section.key=value …]
#
# `farspan launch torchrun` makes this line, passes signals to the ranks so that they save, and starts torchrun again when
# it or the rendezvous is lost (docs/launching.md).
set -euo pipefail
if (($# < 2)); then
  echo "torchrun.sh: give which node this is, from 0 up, and the configuration" >&2
  exit 2
fi
node=$1 config=$2
shift 2
nodes=${NODES:-1} ranks=${RANKS_PER_NODE:-8} master=${MASTER:-127.0.0.1} port=${PORT:-29500}
run_id=${RUN_ID:-farspan} # the same on all nodes; another one for each run that meets at the same place
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$(($(nproc) / ranks > 0 ? $(nproc) / ranks : 1))}
# Else ranks that are started again read the addresses of those before them (pytorch issue 135712).
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
[[ $node == 0 ]] && is_host=true || is_host=false

exec torchrun --nnodes "$nodes" --nproc-per-node "$ranks" --max-restarts 3 \
  --rdzv-backend c10d --rdzv-endpoint "$master:$port" --rdzv-id "$run_id" --rdzv-conf is_host=$is_host \
  --log-dir "logs/node-$node" --redirects 3 --tee 0:3 --no-python farspan train "$config" "$@"
