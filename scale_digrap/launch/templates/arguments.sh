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
