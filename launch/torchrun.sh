#!/usr/bin/env bash
# torchrun on one or several hosts: start this file on every host, with the same settings.
#
#   bash torchrun.sh                                                      with the settings below
#   NODES=2 HOST0=10.0.0.1 bash torchrun.sh CONFIG.yaml [key=value ...]   with another configuration
#
# Every setting can be edited here or set in the environment. run_dir, the shards and Python have the same path on all
# hosts. Needs torch 2.9. Exit status: 0 done; 75 stopped with a checkpoint, start it again to go on; others: failed.
set -euo pipefail

COMMAND=${COMMAND:-train}  # train, evaluate or quickstart (on one host)
CONFIG=${CONFIG:-configs/paligemma_vqav2_lora.yaml}
OVERRIDES=(run_dir=/shared/runs/vqav2-lora)  # key=value ...
RUN_NAME=${RUN_NAME:-vqav2-lora}  # of the job: rendezvous id and port come from it
NODES=${NODES:-2}  # 2; or 2:4, which goes on with fewer and takes in more
PROCESSES=${PROCESSES:-auto}  # on each host; auto: one per GPU, or 2
HOST0=${HOST0:-node0}  # address of one of the hosts, where all meet
PORT=${PORT:-22948}  # on HOST0
RUN_ID=${RUN_ID:-}  # the same on all hosts, another for another job (default: RUN_NAME)
RDZV_DIR=${RDZV_DIR:-}  # a shared folder: meet in a file there; the death of HOST0 is survived then
RDZV_CONF=${RDZV_CONF:-join_timeout=600,last_call_timeout=15,keep_alive_interval=5,keep_alive_max_attempt=3,close_timeout=30,read_timeout=60}
RESTARTS=${RESTARTS:-3}  # of all ranks, when one fails or a host comes or goes
STOP_WITHIN=${STOP_WITHIN:-90}  # seconds for a checkpoint when asked to stop
PREFLIGHT=${PREFLIGHT:-0}  # 1: compare the hosts before training
PYTHON=${PYTHON:-python}
WORKDIR=${WORKDIR:-.}
LOGS=${LOGS:-}  # default: RUN_DIR/logs; one folder per host in it, one per rank in that
START_ID=${START_ID:-$RUN_NAME.$$.$(date +%s)}  # by which the processes of this start are found

# Variables for every process: lines `export NAME=value` in a file that only you can read, since they may be tokens.
ENVIRONMENT_FILE=${ENVIRONMENT_FILE:-}
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
unset MASTER_ADDR MASTER_PORT  # c10d chooses them; torchrun would hand stale ones on

cd "$WORKDIR"
if [ $# -gt 0 ]; then  # on the command line: in place of both settings
  CONFIG=$1
  OVERRIDES=("${@:2}")
  if [ "$COMMAND" = quickstart ]; then  # has options only
    CONFIG="" OVERRIDES=("$@")
  fi
fi
# Refuses what training would refuse, before anything starts; answers with the run's folder.
RUN_DIR=$("$PYTHON" -m scale_digrap.launch.node config "$COMMAND" -- "$CONFIG" "${OVERRIDES[@]}")
LOGS=${LOGS:-$RUN_DIR/logs}
LOGS=$LOGS/$(hostname)
mkdir -p "$LOGS"
STARTED=$LOGS/started
: >"$STARTED"

if [ "$PROCESSES" = auto ]; then
  GPUS=$(nvidia-smi --list-gpus 2>/dev/null | wc -l || true)
  PROCESSES=$((GPUS > 0 ? GPUS : 2))
fi
LOCAL=()
if [ "$NODES" = 1 ]; then  # a free port of the loopback: two jobs on this host cannot meet
  RDZV_DIR="" MEETING=127.0.0.1:0
  LOCAL=(--local-addr=127.0.0.1)
elif [ -n "$RDZV_DIR" ]; then
  if [ -z "$RUN_ID" ]; then
    echo "RDZV_DIR needs a RUN_ID that no earlier start has had: its file would still be there" >&2
    exit 2
  fi
  mkdir -p "$RDZV_DIR"
  RDZV_CONF=store_type=file,$RDZV_CONF
  MEETING=$RDZV_DIR/$RUN_ID
elif [ -n "$HOST0" ]; then
  MEETING=$HOST0:$PORT
else
  echo "NODES=$NODES, but HOST0 is not set: name the address of one of the hosts, the same on all" >&2
  exit 2
fi

RUN_ID=${RUN_ID:-$RUN_NAME}

torchrun() {  # SUFFIX PROCESSES MODULE ARGUMENTS...: two rendezvous need two ids, and two files
  supervise "$PYTHON" -m torch.distributed.run \
    --nnodes="$NODES" --nproc-per-node="$2" \
    --rdzv-backend=c10d --rdzv-endpoint="$MEETING${RDZV_DIR:+$1}" "${LOCAL[@]}" --rdzv-id="$RUN_ID$1" --rdzv-conf="$RDZV_CONF" \
    --max-restarts="$RESTARTS" \
    --signals-to-handle=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1,SIGUSR2 \
    --log-dir="$LOGS" --tee=3 \
    -m "${@:3}"
}
ask_to_stop() { kill -s TERM "$CHILD" 2>/dev/null || true; }
kill_run() { "$PYTHON" -m scale_digrap.launch.node stop "$START_ID" --within 0; }

# Runs "$@" in a session of its own, so that a signal reaches this script alone. The first one asks the run to stop with
# a checkpoint; the second one kills it.
supervise() {
  local status=0
  SIGNALS=0
  setsid "$@" &
  CHILD=$!
  trap on_signal TERM INT HUP USR1 USR2
  wait "$CHILD" || status=$?
  while kill -0 "$CHILD" 2>/dev/null; do  # a signal ends the wait, not the run
    wait "$CHILD" || status=$?
  done
  return "$status"
}
on_signal() {
  SIGNALS=$((SIGNALS + 1))
  if [ "$SIGNALS" -eq 1 ]; then
    echo "stopping: a checkpoint is written first; once more to kill the run" >&2
    ask_to_stop
  else
    kill_run
  fi
}

# What the run itself has written tells how it ended: a launcher's exit status does not (torchrun makes 1 of everything,
# deepspeed may return 0 when it was killed). Files that are older than this start are of another one.
finish() {  # STATUS of the launcher
  [ "$COMMAND" != quickstart ] || exit "$1"
  local waited
  for ((waited = 0; waited <= ${SETTLE:-5}; waited++)); do  # seconds that a shared file system may show them late
    [ "$waited" -eq 0 ] || sleep 1
    if [ "$RUN_DIR/DONE" -nt "$STARTED" ]; then
      echo "$RUN_DIR: done"
      exit 0
    elif [ "$RUN_DIR/STOPPED" -nt "$STARTED" ]; then
      echo "$RUN_DIR: stopped with a checkpoint; the same command goes on from there"
      exit 75
    fi
  done
  echo "$RUN_DIR: neither DONE nor STOPPED was written: it failed; the output of each rank is in $LOGS" >&2
  exit "$(($1 > 0 ? $1 : 1))"
}

{  # read to its end before the run begins: this file may be edited while it runs
  STATUS=0
  if [ "$COMMAND" = quickstart ]; then  # starts ranks itself
    supervise "$PYTHON" -m scale_digrap quickstart "${OVERRIDES[@]}" || STATUS=$?
    finish "$STATUS"
  fi
  if [ "$PREFLIGHT" = 1 ]; then
    RESTARTS=0 torchrun .check 1 scale_digrap.launch.preflight "$CONFIG" "${OVERRIDES[@]}" || exit 2
  fi
  torchrun "" "$PROCESSES" scale_digrap "$COMMAND" "$CONFIG" "${OVERRIDES[@]}" || STATUS=$?
  finish "$STATUS"
}
