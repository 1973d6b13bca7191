# Variables for every process: lines `export NAME=value` in a file that only you can read, since they may be tokens.
ENVIRONMENT_FILE=${ENVIRONMENT_FILE:-{{ environment_file | sh }}}
if [ -n "$ENVIRONMENT_FILE" ]; then
  # shellcheck disable=SC1090
  . "$ENVIRONMENT_FILE"
fi
export SCALE_DIGRAP_LAUNCH=$START_ID
export PYTHONUNBUFFERED=1
# Ranks that each start a thread per core stand in each other's way.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
# Without it, a host that comes back after a failure takes the whole job down (torch 2.13).
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=${TORCH_DISABLE_SHARE_RDZV_TCP_STORE:-1}
# Time for a checkpoint between torchrun's SIGTERM and its SIGKILL.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=$STOP_WITHIN
