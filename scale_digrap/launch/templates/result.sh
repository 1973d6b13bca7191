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
