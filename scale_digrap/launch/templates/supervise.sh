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
