#!/usr/bin/env bash
# The deepspeed launcher: on one of the hosts it starts the ranks on all of them through pdsh and ssh. Where ssh without
# a password is not to be had, LAUNCHER=no_ssh and a start on every host do the same.
#
#   bash deepspeed.sh                                                    with the settings below
#   bash deepspeed.sh CONFIG.yaml [key=value ...]                        with another configuration
#   LAUNCHER=no_ssh NODE_RANK=1 HOST0=10.0.0.1 bash deepspeed.sh ...     on every host, its line of the hostfile as NODE_RANK
#
# Every setting can be edited here or set in the environment. run_dir, the shards, Python and this folder have the same
# path on all hosts. Exit status: 0 done; 75 stopped with a checkpoint, start it again to go on; others: failed.
set -euo pipefail

COMMAND=${COMMAND:-{{ command | sh }}}  # train or evaluate
CONFIG=${CONFIG:-{{ config | sh }}}
OVERRIDES=({{ overrides | map('word') | join(' ') }})  # key=value ...
RUN_NAME=${RUN_NAME:-{{ name | sh }}}  # of the job: the port comes from it
LAUNCHER=${LAUNCHER:-{{ launcher | sh }}}  # pdsh or no_ssh; no other of deepspeed's works here (README.md)
HOSTFILE=${HOSTFILE:-{{ hostfile | sh }}}  # a line per host: NAME slots=PROCESSES
NODE_RANK=${NODE_RANK:-0}  # with no_ssh
HOST0=${HOST0:-}  # address of the first host (default: its name in the hostfile)
PORT=${PORT:-{{ port | sh }}}  # on HOST0
SSH_OPTIONS=${SSH_OPTIONS:-{{ ssh_options | join(' ') | sh }}}
# Variables of this shell that all hosts get, as patterns. deepspeed itself carries hardly any.
CARRY=(
{%- for part in carry | batch(10) %}
  {{ part | map('word') | join(' ') }}
{%- endfor %}
)
STOP_WITHIN=${STOP_WITHIN:-{{ stop_within_s }}}  # seconds for a checkpoint when asked to stop
PREFLIGHT=${PREFLIGHT:-{{ '1' if preflight else '0' }}}  # 1: compare the hosts before training
PYTHON=${PYTHON:-{{ python | sh }}}
WORKDIR=${WORKDIR:-{{ workdir | sh }}}
LOGS=${LOGS:-{{ logs | sh }}}  # default: RUN_DIR/logs; one file per rank in it
START_ID=${START_ID:-$RUN_NAME.$$.$(date +%s)}  # by which the processes of this start are found on all hosts

{% include "environment.sh" %}
# Two installations that share a folder of compiled operators would each build them anew.
export TORCH_EXTENSIONS_DIR=${TORCH_EXTENSIONS_DIR:-${HOME:-/tmp}/.cache/torch_extensions/$RUN_NAME}

HOSTFILE=$(realpath "$HOSTFILE")
{% include "arguments.sh" %}
PYTHON=$(command -v "$PYTHON")  # the same one on the other hosts: over ssh, PATH is another
case $LAUNCHER in
  pdsh) command -v pdsh >/dev/null || { echo "no pdsh here: install it, or use LAUNCHER=no_ssh" >&2; exit 2; } ;;
  no_ssh) LOGS=$LOGS/$(hostname) ;;
  *) echo "LAUNCHER=$LAUNCHER does not work: use pdsh or no_ssh, or torchrun.sh (README.md says why)" >&2; exit 2 ;;
esac
mapfile -t HOSTS < <(sed -n 's/^[[:space:]]*\([^#[:space:]]\{1,\}\)[[:space:]]\{1,\}slots=[0-9].*/\1/p' "$HOSTFILE")
if [ "${#HOSTS[@]}" -eq 0 ]; then
  echo "$HOSTFILE names no host: write a line such as 'node0 slots=8' for each" >&2
  exit 2
fi
for HOST in "${HOSTS[@]}"; do
  if ! [[ $HOST =~ ^[A-Za-z0-9_][A-Za-z0-9._:%@-]*$ ]]; then
    echo "$HOSTFILE: '$HOST' is not the name or the address of a host" >&2
    exit 2
  fi
done
HOST0=${HOST0:-${HOSTS[0]}}
read -ra SSH <<<"$SSH_OPTIONS"
umask 077  # the environment may hold tokens
mkdir -p "$LOGS/ranks"
STARTED=$LOGS/started
: >"$STARTED"

# pdsh hands arguments and variables to a shell on each host, where $, *, spaces and quotes would be read again. The
# configuration goes over as a file; variables go through a file that deepspeed reads: NAME=value, nothing else, with
# the values escaped for the double quotes that it puts around them, and % for pdsh.
"$PYTHON" -m scale_digrap.launch.node config --to "$LOGS/config.yaml" "$COMMAND" -- "$CONFIG" "${OVERRIDES[@]}" >/dev/null
export DS_ENV_FILE=$LOGS/deepspeed_env
for VARIABLE in $(compgen -e); do
  for PATTERN in "${CARRY[@]}"; do
    # shellcheck disable=SC2053 # a pattern
    [[ $VARIABLE == $PATTERN ]] || continue
    VALUE=${!VARIABLE}
    if [[ $VALUE == *$'\n'* ]]; then
      echo "$VARIABLE holds a line break, which deepspeed cannot carry: it is left out" >&2
      break
    fi
    VALUE=${VALUE//\\/\\\\} VALUE=${VALUE//\"/\\\"} VALUE=${VALUE//\$/\\\$} VALUE=${VALUE//\`/\\\`}
    printf '%s=%s\n' "$VARIABLE" "${VALUE//%/%%}"
    break
  done
done >"$DS_ENV_FILE"

preflight() {
  local hosts
  hosts=$(IFS=, && echo "${HOSTS[*]}")
  local check=("$PYTHON" -m scale_digrap.launch.preflight --hosts "$hosts" --endpoint "$HOST0:$PORT" --scheduler hosts)
  if [ "$LAUNCHER" = no_ssh ]; then
    "${check[@]}" --rank "$NODE_RANK" "$LOGS/config.yaml"
  else  # %n is the number of the host
    PDSH_SSH_ARGS_APPEND="$SSH_OPTIONS ${PDSH_SSH_ARGS_APPEND:-}" pdsh -S -R ssh -w "$hosts" \
      "cd $(printf %q "$PWD") && $(printf '%q ' "${check[@]}") --rank %n $(printf %q "$LOGS/config.yaml")"
  fi
}
deepspeed() {
  local how=(--launcher pdsh --force_multi)
  [ "$LAUNCHER" = pdsh ] || how=(--no_ssh --node_rank "$NODE_RANK")
  PDSH_SSH_ARGS_APPEND="$SSH_OPTIONS ${PDSH_SSH_ARGS_APPEND:-}" \
    supervise "$PYTHON" -m deepspeed.launcher.runner --hostfile "$HOSTFILE" "${how[@]}" \
    --master_addr "$HOST0" --master_port "$PORT" --no_local_rank --enable_each_rank_log "$LOGS/ranks" \
    --module scale_digrap "$COMMAND" "$LOGS/config.yaml"
}

# deepspeed ends before its ranks do, finds them by a pattern that other runs match as well, and leaves them behind when
# pdsh dies. Here, each host ends what carries this start's own token, by process id.
end_ranks() {  # SECONDS until they are killed
  local host asked=()
  if [ "$LAUNCHER" = no_ssh ]; then
    "$PYTHON" -m scale_digrap.launch.node stop "$START_ID" --within "$1" || true
    return 0  # not a bare one: in a trap, that is the status of what the signal broke off
  fi
  for host in "${HOSTS[@]}"; do
    # Without the token: ssh would be one of the processes that are waited for.
    env -u SCALE_DIGRAP_LAUNCH ssh -n -o BatchMode=yes -o ConnectTimeout=10 "${SSH[@]}" -- "$host" \
      "cd $(printf %q "$PWD") && $(printf '%q ' "$PYTHON" -m scale_digrap.launch.node stop "$START_ID" --within "$1")" ||
      echo "$host: could not be asked whether processes of $START_ID are left there" >&2 &
    asked+=("$!")
  done
  wait "${asked[@]}" || true
}
ask_to_stop() { end_ranks "$STOP_WITHIN"; }
kill_run() { end_ranks 0; }

{% include "supervise.sh" %}

{% include "result.sh" %}

{  # read to its end before the run begins: this file may be edited while it runs
  STATUS=0
  if [ "$PREFLIGHT" = 1 ]; then
    preflight || exit 2
  fi
  deepspeed || STATUS=$?
  [ "$RUN_DIR/DONE" -nt "$STARTED" ] || end_ranks "$STOP_WITHIN"
  finish "$STATUS"
}
