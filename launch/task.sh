#!/usr/bin/env bash
# Runs COMMAND as one of many tasks; of those that fail, the first leaves its exit code
# in FILE.  srun tells the largest code of all tasks, which hides the 74 of one behind the
# 134 of the peers that it takes along.
#
#   srun launch/task.sh FILE COMMAND...
set -u
# shellcheck source=launch/common.sh
source "$(dirname "$0")/common.sh"

file=$1
shift
supervise "$@"
if ((code)); then
  set -o noclobber # the second to write fails
  echo "$code" 2>/dev/null >"$file"
fi
exit "$code"
