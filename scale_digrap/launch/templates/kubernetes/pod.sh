set -euo pipefail
COMMAND={{ command | sh }} CONFIG={{ config | sh }}
OVERRIDES=({{ overrides | map('word') | join(' ') }})
cd {{ workdir | sh }}
# Refuses what training would refuse with status 2, which fails the job at once; answers with the run's folder.
RUN_DIR=$({{ python | sh }} -m scale_digrap.launch.node config "$COMMAND" -- "$CONFIG" "${OVERRIDES[@]}")
LOGS={{ logs | sh or '$RUN_DIR/logs' }}/$HOSTNAME
mkdir -p "$LOGS"
STARTED=$LOGS/started
: >"$STARTED"
unset MASTER_ADDR MASTER_PORT  # c10d chooses them

{% include "result.sh" %}

STATUS=0
{%- if preflight %}
{{ python | sh }} -m scale_digrap.launch.preflight --nodes {{ kubernetes.pods }} --rank "$JOB_COMPLETION_INDEX" \
  --endpoint "{{ meeting }}" --scheduler kubernetes "$CONFIG" "${OVERRIDES[@]}"
{%- endif %}
{{ python | sh }} -m torch.distributed.run \
  --nnodes={{ nodes }} --nproc-per-node={{ kubernetes.processes }} \
  --rdzv-backend=c10d --rdzv-endpoint="{{ meeting }}" --rdzv-id={{ name }} \
  --rdzv-conf={{ rendezvous_conf }} \
  --max-restarts={{ restarts }} \
  --signals-to-handle=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1,SIGUSR2 \
  --log-dir="$LOGS" --tee=3 \
  -m scale_digrap "$COMMAND" "$CONFIG" "${OVERRIDES[@]}" &
CHILD=$!
trap 'kill -s TERM "$CHILD" || true' TERM INT  # process 1 hands it on; a checkpoint is written
while :; do  # a signal ends the wait, not the run
  wait "$CHILD" && STATUS=0 || STATUS=$?
  kill -0 "$CHILD" 2>/dev/null || break
done
finish "$STATUS"
