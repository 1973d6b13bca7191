#!/usr/bin/env bash
# Train with torchrun on one or several hosts. Start it on every host with the same settings:
#
#   NODES=2 HOST0=10.0.0.1 bash launch/torchrun.sh configs/paligemma_vqav2_lora.yaml run_dir=/shared/run1
#
#   NODES            hosts that take part (1)
#   PROCESSES        processes per host: one per GPU, or 2 where there is none
#   HOST0, PORT      address of the host that the others meet at (this host, 29500); needed for more than one host
#   RUN_ID           the same on all hosts; keeps two jobs apart that meet at one port (the configuration's name)
#   RDZV_TIMEOUT     seconds to wait for the other hosts (300)
#
# run_dir and the shards must be readable by all hosts under the same path.
set -euo pipefail

if [ $# -lt 1 ] || [ ! -f "$1" ]; then
  echo "usage: [NODES=n HOST0=address] bash launch/torchrun.sh CONFIG.yaml [key=value ...]${1:+  (no file $1)}" >&2
  exit 2
fi
NODES=${NODES:-1}
PORT=${PORT:-29500}
if [ "$NODES" -gt 1 ] && [ -z "${HOST0:-}" ]; then
  echo "NODES=$NODES, but HOST0 is not set: name the address of one of the hosts, the same on all" >&2
  exit 2
fi
GPUS=$(nvidia-smi --list-gpus 2>/dev/null | wc -l || true)
PROCESSES=${PROCESSES:-$([ "$GPUS" -gt 0 ] && echo "$GPUS" || echo 2)}
# Ranks that each start a thread per core stand in each other's way.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}

if [ "$NODES" -gt 1 ]; then
  MEETING=("--rdzv-endpoint=$HOST0:$PORT")
else
  # One host: any free port of the loopback, so that two jobs on it cannot meet by mistake.
  MEETING=(--rdzv-endpoint=127.0.0.1:0 --local-addr=127.0.0.1)
fi
exec "${PYTHON:-python}" -m torch.distributed.run \
  --nnodes="$NODES" --nproc-per-node="$PROCESSES" \
  --rdzv-backend=c10d "${MEETING[@]}" \
  --rdzv-id="${RUN_ID:-$(basename "$1" .yaml)}" --rdzv-conf="join_timeout=${RDZV_TIMEOUT:-300}" \
  -m scale_digrap train "$@"
