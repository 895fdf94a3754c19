# shellcheck shell=bash
# What the launchers share: which exit codes of train.py start a job again, and signals.

# 17: preempted, the state is saved.  134, 137, 143: a process was aborted or killed, or
# never came; no peer can go on without it, so all start anew.  Any other code is
# final; docs/pods.md says what each means.
RESTART_CODES=(17 134 137 143)

restartable() { # CODE
  [[ " ${RESTART_CODES[*]} " == *" $1 "* ]]
}

die() { # SENTENCE: bad input ends as in train.py
  echo "error: $1" >&2
  exit 78
}

count() { # NAME VALUE: the number, 08 too, which to bash is a wrong octal one
  [[ $2 =~ ^[0-9]+$ ]] || die "$1=$2 must be a number; 0 for none."
  echo "$((10#$2))"
}

# Runs COMMAND and sets `code` to its exit code.  SIGTERM and Ctrl-C reach it as
# SIGTERM, after which `stopped` is not empty.
# shellcheck disable=SC2034 # `code` is for the caller
supervise() { # COMMAND...
  local child='' interrupted=yes
  stopped=''
  trap 'stopped=yes interrupted=yes; [[ ! $child ]] || kill -TERM "$child"' TERM INT
  "$@" &
  child=$!
  [[ ! $stopped ]] || kill -TERM "$child"
  while [[ $interrupted ]]; do # a signal ends `wait` before the command has ended
    interrupted=''
    code=0
    wait "$child" || code=$?
  done
  trap - TERM INT
}
