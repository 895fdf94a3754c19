#!/bin/sh
# Everything that a GPU is needed for, in one call.  On an H200 the peer took 94 seconds,
# the networks three minutes, most of it compiling, the operations four:
#   sh benchmarks/gpu.sh OUT [PEER]
# Writes tables and JSON to the folder OUT.  PEER is the folder that peer.py takes:
# the authors' files, with PyTorch installed; it is measured first, on the same card.
set -eu
out=$1
mkdir -p "$out"
peer=${2:-}
python=${PYTHON:-python3}
if [ -n "$peer" ]; then
	$python benchmarks/peer.py "$peer" --batch 128 --quick --out "$out/peer.json" ||
		echo "the peer failed"
fi
$python -m benchmarks.model --batch=128 --dtype=bfloat16 --kernels \
	--peer="$out/peer.json" --out="$out/model.json"
$python -m benchmarks.ops --batch=128 --dtype=bfloat16 --only=scan,ss2d --rounds=3 \
	--out="$out/ops.json"
