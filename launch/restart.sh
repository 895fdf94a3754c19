#!/usr/bin/env bash
# Runs a command again, at most K times, while its exit code says so (common.sh); ends
# with its last exit code.  SIGTERM and Ctrl-C preempt it: then it is not run again.
#
#   launch/restart.sh [--restarts=3] python train.py --config=... --workdir=...
set -u
# shellcheck source=launch/common.sh
source "$(dirname "$0")/common.sh"

left=3
if [[ ${1-} == --restarts=* ]]; then
  left=${1#*=}
  shift
fi
left=$(count --restarts "$left") || exit
(($#)) || die "no command: give one, such as launch/restart.sh python train.py ..."

supervise "$@"
while [[ ! $stopped ]] && restartable "$code" && ((left > 0)); do
  left=$((left - 1))
  echo "launch: exit code $code, starting again ($left restarts left)" >&2
  supervise "$@"
done
exit "$code"
