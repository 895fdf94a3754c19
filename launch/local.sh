#!/usr/bin/env bash
# Rehearses a pod: N processes on this machine, started again as on one.
#
#   launch/local.sh N [--restarts=3] [--grace=30] [--logs=runs/local] -- \
#       train.py --config=... --workdir=...
#
# The options but --restarts are those of processes.py, which starts them once.
set -u

folder=$(dirname "$0") restarts=3 words=()
while (($#)) && [[ $1 != -- ]]; do
  case $1 in
    --restarts=*) restarts=${1#*=} ;;
    *) words+=("$1") ;;
  esac
  shift
done
exec "$folder/restart.sh" --restarts="$restarts" \
  "${PYTHON:-python}" "$folder/processes.py" "${words[@]}" "$@"
