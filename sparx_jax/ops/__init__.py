"""Pure functions of arrays: one contract each, several backends, jax only."""

from sparx_jax.ops.batch import batch_on, by_platform
from sparx_jax.ops.depthwise import depthwise_conv
from sparx_jax.ops.gelu import gelu
from sparx_jax.ops.matmul import matmul
from sparx_jax.ops.norm import batch_norm, group_norm, layer_norm, moments
from sparx_jax.ops.scan import selective_scan
from sparx_jax.ops.ss2d import MapScanMethod, ss2d

__all__ = [
    "MapScanMethod",
    "batch_norm",
    "batch_on",
    "by_platform",
    "depthwise_conv",
    "gelu",
    "group_norm",
    "layer_norm",
    "matmul",
    "moments",
    "selective_scan",
    "ss2d",
]
