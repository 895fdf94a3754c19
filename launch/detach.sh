#!/usr/bin/env bash
# Runs a command that outlives the connection it was started over.  While one runs in
# this folder, shows that instead of starting another.  Ends with its exit code.
#
#   launch/detach.sh python train.py --config=... --workdir=...
#   pkill -F run.pid -f supervise     preempts it
#
# Leaves run.log, run.pid and run.code in the folder where it is called.
set -u
common=$(dirname "$0")/common.sh
# shellcheck source=launch/common.sh
source "$common"

# After a reboot another process may have that number.
if ! pgrep -F run.pid -f supervise >/dev/null 2>&1; then
  (($#)) || die "no command: give one, such as launch/detach.sh python train.py ..."
  rm -f run.code
  : >run.log # tail must find it
  # shellcheck disable=SC2016 # for the inner shell
  setsid bash -c 'source "$0"; supervise "$@"; echo "$code" >run.code' "$common" "$@" \
    >run.log 2>&1 </dev/null &
  echo "$!" >run.pid
fi
tail -n 100 -f -s 0.2 --pid="$(<run.pid)" run.log
exit "$(cat run.code 2>/dev/null || echo 137)" # no code: killed with its supervisor
