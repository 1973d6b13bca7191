#!/usr/bin/env bash
# torchrun on one or several hosts: start this file on every host, with the same settings.
#
#   bash torchrun.sh                                                      with the settings below
#   NODES=2 HOST0=10.0.0.1 bash torchrun.sh CONFIG.yaml [key=value ...]   with another configuration
#
# Every setting can be edited here or set in the environment. run_dir, the shards and Python have the same path on all
# hosts. Needs torch 2.9. Exit status: 0 done; 75 stopped with a checkpoint, start it again to go on; others: failed.
set -euo pipefail

COMMAND=${COMMAND:-{{ command | sh }}}  # train, evaluate or quickstart (on one host)
CONFIG=${CONFIG:-{{ config | sh }}}
OVERRIDES=({{ overrides | map('word') | join(' ') }})  # key=value ...
RUN_NAME=${RUN_NAME:-{{ name | sh }}}  # of the job: rendezvous id and port come from it
NODES=${NODES:-{{ nodes | sh }}}  # 2; or 2:4, which goes on with fewer and takes in more
PROCESSES=${PROCESSES:-{{ processes | sh }}}  # on each host; auto: one per GPU, or 2
HOST0=${HOST0:-{{ host0 | sh }}}  # address of one of the hosts, where all meet
PORT=${PORT:-{{ port | sh }}}  # on HOST0
RUN_ID=${RUN_ID:-}  # the same on all hosts, another for another job (default: RUN_NAME)
RDZV_DIR=${RDZV_DIR:-{{ rendezvous_dir | sh }}}  # a shared folder: meet in a file there; the death of HOST0 is survived then
RDZV_CONF=${RDZV_CONF:-{{ rendezvous_conf | sh }}}
RESTARTS=${RESTARTS:-{{ restarts }}}  # of all ranks, when one fails or a host comes or goes
STOP_WITHIN=${STOP_WITHIN:-{{ stop_within_s }}}  # seconds for a checkpoint when asked to stop
PREFLIGHT=${PREFLIGHT:-{{ '1' if preflight else '0' }}}  # 1: compare the hosts before training
PYTHON=${PYTHON:-{{ python | sh }}}
WORKDIR=${WORKDIR:-{{ workdir | sh }}}
LOGS=${LOGS:-{{ logs | sh }}}  # default: RUN_DIR/logs; one folder per host in it, one per rank in that
START_ID=${START_ID:-$RUN_NAME.$$.$(date +%s)}  # by which the processes of this start are found

{% include "environment.sh" %}
unset MASTER_ADDR MASTER_PORT  # c10d chooses them; torchrun would hand stale ones on

{% include "arguments.sh" %}
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

{% include "supervise.sh" %}

{% include "result.sh" %}

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
