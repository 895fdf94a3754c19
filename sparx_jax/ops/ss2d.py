"""Selective scan of a map along its rows, its columns, and both backwards."""

from typing import Literal

import jax.numpy as jnp

from sparx_jax.ops import mosaic_tpu, triton_gpu
from sparx_jax.ops.batch import target_kind
from sparx_jax.ops.scan import ScanMethod, selective_scan
from sparx_jax.typing import Array, Float

MapScanMethod = Literal[ScanMethod, "mosaic_tpu", "triton_gpu"]


def ss2d(
    x: Float[Array, "b h w d"],
    x_proj: Float[Array, "4 d e"],
    dt_proj: Float[Array, "4 r d"],
    dt_bias: Float[Array, "4 d"],
    a: Float[Array, "4 d n"],
    skip: Float[Array, "4 d"],
    *,
    method: MapScanMethod = "auto",
) -> Float[Array, "b h w d"]:
    """The sum of four selective scans: rows, columns, rows and columns backwards.

    `x_proj` makes of each pixel the r inputs of `dt_proj`, then B and C, e = r + 2 n;
    `dt_bias` is added to the step size before softplus; `a` must be negative.

    Methods are those of `selective_scan`, and
      mosaic_tpu   one TPU kernel for the four scans and the step sizes
      triton_gpu   the same for GPUs of NVIDIA's Ampere generation and later
      auto         the kernel of the devices that `batch_on` names, or else of the
                   default ones; none where the maps do not fit a TPU's VMEM
    Raises ValueError for others, or if mosaic_tpu does not fit.

    Source: SS2D of Liu et al., "VMamba", arXiv:2401.10166.
    """
    x_proj, dt_proj = (w.astype(x.dtype) for w in (x_proj, dt_proj))
    if method == "auto":
        method = _kernel(x, x_proj, a) or method
    if method in ("mosaic_tpu", "triton_gpu"):
        p = jnp.einsum("bhwd,kde->bhwke", x, x_proj)
        p = p.reshape(*p.shape[:3], -1)
        if method == "triton_gpu":
            return triton_gpu.four_scans(x, p, dt_proj, dt_bias, a, skip)
        vmem = mosaic_tpu.target_vmem() or max(mosaic_tpu.VMEM.values())
        return mosaic_tpu.four_scans(x, p, dt_proj, dt_bias, a, skip, vmem=vmem)

    r = dt_proj.shape[1]

    def there_and_back(x, directions):
        tokens = x.reshape(len(x), -1, x.shape[-1])
        weights, bias = x_proj[directions], dt_bias[directions]
        k, d, e = weights.shape
        # One product for both directions, and the bias in the next one: XLA would
        # transpose the map for the first, and read and write all step sizes for a sum.
        p = (tokens @ weights.swapaxes(0, 1).reshape(d, -1)).reshape(
            *tokens.shape[:2], k, e
        )
        dt, b, c = jnp.split(jnp.moveaxis(p, 2, 0), (r, (r + e) // 2), -1)
        dt = jnp.concatenate([dt, jnp.ones_like(dt[..., :1])], -1)
        bias = bias[:, None].astype(x.dtype)
        dt = jnp.einsum(
            "kblr,krd->kbld", dt, jnp.concatenate([dt_proj[directions], bias], 1)
        )
        y = selective_scan(
            tokens,
            dt,
            a[directions],
            b,
            c,
            skip[directions],
            reverse=(False, True),
            method=method,
        )
        return y.reshape(x.shape)

    # Projections act on single pixels, so they are computed in the map's own order;
    # rows and columns need one transposed copy of the map, not four.
    by_column = there_and_back(x.swapaxes(1, 2), slice(1, None, 2)).swapaxes(1, 2)
    return there_and_back(x, slice(0, None, 2)) + by_column


def _kernel(x, x_proj, a) -> MapScanMethod | None:
    """The method of one kernel where the devices have one."""
    if target_kind().startswith("NVIDIA"):
        return "triton_gpu"
    (_, height, width, _), (k, _, e), n = x.shape, x_proj.shape, a.shape[-1]
    vmem = mosaic_tpu.target_vmem()
    if vmem and mosaic_tpu.fits(height, width, k * e, n, x.dtype, vmem):
        return "mosaic_tpu"
    return None
