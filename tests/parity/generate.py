"""Deterministic weights and inputs behind the parity goldens, numpy only.

manifest = json.load(open("manifests/sparx_mamba_t.json"))
weights = state_dict(manifest)  # {key: array}, PyTorch names and layouts
x = image("sparx_mamba_t/224x224", (2, 3, 224, 224))
"""

import hashlib
import json
import math
import sys

import numpy as np

DT_MIN, DT_MAX = 1e-3, 1e-1


def _rng(key):
    """A generator that depends on `key` alone, so tensors can be made in any order."""
    seed = int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "little")
    return np.random.Generator(np.random.PCG64(seed))


def normal(key, shape):
    """Standard normal float32 array named `key`."""
    return _rng(key).standard_normal(size=tuple(shape), dtype=np.float32)


def _gain(key):
    """Extra factor on 1/sqrt(fan_in), so that depth and attention stay well scaled."""
    if ".pos_embed." in key:
        return 0.2
    if ".downsample." in key:
        return 0.5
    if ".op.k." in key or ".op.v." in key:
        return 2.0
    return 1.0


def tensor(key, shape):
    """Value of the state_dict entry `key` (float32, or int64 for BN step counters)."""
    shape = tuple(shape)
    name = key.rsplit(".", 1)[-1]
    if name == "num_batches_tracked":
        return np.zeros(shape, np.int64)
    if name == "dt_projs_bias":  # inverse softplus of a log-uniform step size
        u = _rng(key).random(size=shape, dtype=np.float32).astype(np.float64)
        dt = np.exp(math.log(DT_MIN) + u * (math.log(DT_MAX) - math.log(DT_MIN)))
        return (dt + np.log(-np.expm1(-dt))).astype(np.float32)

    n = normal(key, shape).astype(np.float64)  # float64 maths, one rounding at the end
    if name == "running_var":
        v = np.exp(0.2 * n)
    elif name == "A_logs":
        v = np.log(np.arange(1, shape[-1] + 1)) + 0.5 * n
    elif name == "Ds":
        v = 1.0 + 0.2 * n
    elif name == "x_proj_weight":  # fan-in is d_inner, whichever axis holds it
        v = n / math.sqrt(max(shape[1:]))
    elif name == "dt_projs_weight":  # (K, d_inner, dt_rank)
        v = n / math.sqrt(shape[-1])
    elif name == "relative_position_bias_table":
        v = 0.5 * n
    elif name in ("bias", "running_mean"):
        v = 0.1 * n
    elif name == "weight" and (len(shape) == 1 or ".layerscale_" in key):
        # norms, layer scale
        v = 1.0 + 0.1 * n
    elif name == "weight":  # conv (O, I/groups, kh, kw) and linear (O, I)
        v = _gain(key) * n / math.sqrt(math.prod(shape[1:]))
    else:
        raise KeyError(f"no rule for {key} {shape}")
    return v.astype(np.float32)


def state_dict(manifest):
    """All tensors of a manifest: {key: array}."""
    return {e["key"]: tensor(e["key"], e["shape"]) for e in manifest["tensors"]}


def image(key, shape):
    """Image-like float32 batch (N, C, H, W): 32- and 8-pixel blocks plus pixel noise.

    Every operation is exact or one IEEE rounding, so it is bitwise reproducible.
    """
    n, c, h, w = shape
    rng = _rng("image/" + key)

    def blocks(size):
        cells = (n, c, -(-h // size), -(-w // size))
        coarse = rng.standard_normal(size=cells, dtype=np.float32)
        return coarse.repeat(size, axis=2).repeat(size, axis=3)[:, :, :h, :w]

    a, b, d = blocks(32), blocks(8), blocks(1)
    return a + np.float32(0.5) * b + np.float32(0.5) * d


def probe(key, array):
    """<array, r>, r = normal("probe/" + key): sees every element and its sign."""
    r = normal("probe/" + key, np.shape(array)).astype(np.float64)
    return float(np.sum(np.asarray(array, np.float64) * r))


def digest(weights):
    """sha256 over the tensors, sorted by key: key bytes, then little-endian data."""
    h = hashlib.sha256()
    for key in sorted(weights):
        a = np.ascontiguousarray(weights[key])
        h.update(key.encode())
        h.update(a.astype(a.dtype.newbyteorder("<"), copy=False).tobytes())
    return h.hexdigest()


if __name__ == "__main__":  # python generate.py manifests/*.json: check the digests
    for path in sys.argv[1:]:
        with open(path) as f:
            m = json.load(f)
        got = digest(state_dict(m))
        print("ok  " if got == m["weights_sha256"] else "DIFF", path, got[:16])
