#!/usr/bin/env bash
# Trains on a TPU VM or a pod slice, which is asked for again whenever it is taken away.
#
#   export NAME=sparx ZONE=us-west4-a TYPE=v5litepod-16 VERSION=v2-alpha-tpuv5-lite
#   export SPOT=yes BUCKET=my-bucket                                # both as you like
#   launch/tpu_vm.sh train python train.py --config=... --workdir=bucket/runs/t
#   launch/tpu_vm.sh ssh 'tail -n 3 run.log'     a command on all hosts
#   launch/tpu_vm.sh stop                        preempts: saves and ends
#   launch/tpu_vm.sh delete                      ends what costs money
#
# train copies the code of HEAD, mounts BUCKET as bucket/, and starts all hosts again
# while the exit code says so (common.sh), at most RESTARTS=100 times.  Ctrl-C leaves the
# hosts training; the same command attaches to them again.  To stop, leave train first.
set -u
# shellcheck source=launch/common.sh
source "$(dirname "$0")/common.sh"
for variable in NAME ZONE TYPE VERSION; do
  [[ ${!variable-} ]] || die "$variable is not set: see the head of launch/tpu_vm.sh."
done

failures=0 # one after the other
failed() { # ten minutes of it may be the network, a login that has ended, VMs that boot
  ((++failures < 20)) || die "launching $NAME failed $failures times: see above."
  echo "launch: that failed, trying again ($failures of 20)" >&2
  sleep "${POLL_SECONDS:-30}"
}

state() { # ACTIVE, WAITING_FOR_RESOURCES, ..., NONE, or UNKNOWN with gcloud's message
  local said
  if said=$(gcloud compute tpus queued-resources describe "$NAME" --zone="$ZONE" \
    --format='value(state.state)' 2>&1); then
    echo "${said##*$'\n'}" # warnings come before it
  elif [[ $said == *NOT_FOUND* ]]; then
    echo NONE
  else
    echo "$said" >&2
    echo UNKNOWN
  fi
}

create() {
  gcloud compute tpus queued-resources create "$NAME" --node-id="$NAME" \
    --zone="$ZONE" --accelerator-type="$TYPE" --runtime-version="$VERSION" \
    ${SPOT:+--spot}
}

delete() {
  gcloud compute tpus queued-resources delete "$NAME" --zone="$ZONE" --force --quiet
}

on_all() { # COMMAND; waits for all hosts, ends with the code of the first that failed
  gcloud compute tpus tpu-vm ssh "$NAME" --zone="$ZONE" --worker=all --quiet \
    --command="$1"
}

wait_for_slice() {
  local state
  while state=$(state) && [[ $state != ACTIVE ]]; do # state never fails
    case $state in
      NONE) create || failed ;;
      SUSPENDED) delete || failed ;;
      FAILED) die "gcloud could not make $NAME: describe the queued resource." ;;
      UNKNOWN) failed ;;
      *)
        failures=0
        sleep "${POLL_SECONDS:-30}"
        ;;
    esac
  done
}

copy_code() { # unless the hosts train already
  local folder code
  folder=$(mktemp -d)
  git -C "$(dirname "$0")/.." archive --format=tar.gz -o "$folder/sparx_jax.tgz" HEAD ||
    die "the code of HEAD cannot be packed: git's message is above."
  gcloud compute tpus tpu-vm scp "$folder/sparx_jax.tgz" "$NAME:" --zone="$ZONE" \
    --worker=all --quiet &&
    on_all "pgrep -F sparx_jax/run.pid -f supervise >/dev/null 2>&1 || {
      mkdir -p sparx_jax && tar xzf sparx_jax.tgz -C sparx_jax &&
      sparx_jax/launch/setup_vm.sh ${BUCKET-}; }"
  code=$?
  rm -r "$folder"
  return "$code"
}

train() { # COMMAND...
  local command code left
  left=$(count RESTARTS "${RESTARTS:-100}") || exit
  command="cd sparx_jax && PATH=\$PWD/.venv/bin:\$PATH launch/detach.sh$(printf ' %q' "$@")"
  while :; do
    wait_for_slice
    if ! copy_code; then
      failed
      continue
    fi
    failures=0
    on_all "$command" && exit
    code=$?
    case $(state) in
      ACTIVE | UNKNOWN) ;;
      *) code=137 ;; # the slice was taken away
    esac
    # 255: the connection is lost, but the hosts may train.
    if ! { restartable "$code" || ((code == 255)); } || ((left == 0)); then
      exit "$code"
    fi
    left=$((left - 1))
    echo "launch: exit code $code, starting again ($left restarts left)" >&2
    sleep "${POLL_SECONDS:-30}"
  done
}

verb=${1-}
shift
case $verb in
  train)
    (($#)) || die "no command: launch/tpu_vm.sh train python train.py ..."
    train "$@"
    ;;
  ssh) on_all "cd sparx_jax && $*" ;;
  stop) on_all "pkill -F sparx_jax/run.pid -f supervise" ;;
  delete) delete ;;
  *) die "'$verb' is none of train, ssh, stop, delete: see the head of launch/tpu_vm.sh." ;;
esac
