#!/usr/bin/env bash
# Prepares one VM: .venv with JAX for TPUs and, if BUCKET is given, bucket/ mounted.
#
#   launch/setup_vm.sh [BUCKET]
set -euo pipefail
cd "$(dirname "$0")/.."

PATH=$HOME/.local/bin:$PATH
# The Python of TPU images is older than ours.
command -v uv >/dev/null || curl -LsSf https://astral.sh/uv/install.sh | sh
[[ -d .venv ]] || uv venv --python 3.12
uv pip install --quiet -r requirements.txt 'jax[tpu]'

if [[ ${1-} ]] && ! mountpoint -q bucket; then
  if ! command -v gcsfuse >/dev/null; then
    key=/usr/share/keyrings/cloud.google.asc
    curl -fsSL https://packages.cloud.google.com/apt/doc/apt-key.gpg |
      sudo tee "$key" >/dev/null
    echo "deb [signed-by=$key] https://packages.cloud.google.com/apt" \
      "gcsfuse-$(lsb_release -cs) main" |
      sudo tee /etc/apt/sources.list.d/gcsfuse.list >/dev/null
    sudo apt-get -q update
    sudo apt-get -qy install gcsfuse
  fi
  mkdir -p bucket
  # No cache of names: hosts must see at once what others wrote.
  gcsfuse --implicit-dirs --metadata-cache-ttl-secs=0 \
    --metadata-cache-negative-ttl-secs=0 "$1" bucket
fi
