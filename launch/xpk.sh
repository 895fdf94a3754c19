#!/usr/bin/env bash
# Trains on a GKE cluster that xpk made, as a JobSet that xpk writes.
#
#   export NAME=sparx CLUSTER=my-cluster TPU_TYPE=v5litepod-16 IMAGE=...  [SLICES=1]
#   launch/xpk.sh [--storage=NAME and other options of xpk] -- \
#       python train.py --config=... --workdir=...
#
# xpk restarts on 42 and 127 to 255 by itself; 17 is added.
set -u
# shellcheck source=launch/common.sh
source "$(dirname "$0")/common.sh"
for variable in NAME CLUSTER TPU_TYPE IMAGE; do
  [[ ${!variable-} ]] || die "$variable is not set: see the head of launch/xpk.sh."
done

options=()
while (($#)) && [[ $1 != -- ]]; do
  options+=("$1")
  shift
done
(($# > 1)) || die "no command: launch/xpk.sh -- python train.py ..."
shift
# exec: xpk's shell hands SIGTERM to its child, which has to be the program.
exec xpk workload create --workload="$NAME" --cluster="$CLUSTER" \
  --tpu-type="$TPU_TYPE" --num-slices="${SLICES:-1}" --docker-image="$IMAGE" \
  --max-restarts=50 --termination-grace-period-seconds=300 \
  --restart-on-exit-codes="$(IFS=, && echo "${RESTART_CODES[*]}")" \
  ${options[@]+"${options[@]}"} --command="exec $(printf '%q ' "$@")"
