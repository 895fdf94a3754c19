"""Selective scan of a map along its rows, its columns, and both backwards."""

import os
from functools import partial
from typing import Literal, get_args

import jax
import jax.numpy as jnp

from sparx_jax.ops import loop, mosaic_tpu, triton_gpu
from sparx_jax.ops.batch import by_platform, shard_batch, target_kind
from sparx_jax.ops.scan import ScanMethod, selective_scan
from sparx_jax.typing import Array, Float

MapScanMethod = Literal["auto", ScanMethod, "loop", "mosaic_tpu", "triton_gpu"]
SCAN_METHODS: tuple[str, ...] = get_args(MapScanMethod)
# Methods that are kernels: their platform and module.
KERNELS = {"mosaic_tpu": ("tpu", mosaic_tpu), "triton_gpu": ("cuda", triton_gpu)}


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
    Arithmetic is float32 inside whatever the storage dtype of `x`.

    Methods, equal in value and in every gradient:
      sequential   `selective_scan`'s: the oracle of the others
      associative  `selective_scan`'s: for accelerators without a kernel
      loop         line by line with a hand-written gradient: for CPUs
      mosaic_tpu   TPU kernels for the four scans and the step sizes: one for a whole
                   map, one each way where it exceeds VMEM
      triton_gpu   the same for GPUs of NVIDIA's Ampere generation and later; forward by
                   CUDA for bfloat16, one state and maps that fit shared memory, where
                   the sum of the directions is rounded to bfloat16 after each
      auto         by the platform that it is compiled for, as `by_platform` says: the
                   kernel of the devices that `batch_on` names, or else of the default
                   ones; where there is none, or not even a line fits a TPU's VMEM,
                   loop on CPU and associative elsewhere; or what the environment says
                   in SPARX_JAX_SCAN_METHOD when the call is traced
    Raises ValueError for others, or if mosaic_tpu does not fit.

    Source: SS2D of Liu et al., "VMamba", arXiv:2401.10166.
    """
    if method == "auto":
        method = os.environ.get("SPARX_JAX_SCAN_METHOD", method)
    if method not in SCAN_METHODS:
        raise ValueError(f"scan method {method!r} is none of {SCAN_METHODS}")
    x_proj, dt_proj = (w.astype(x.dtype) for w in (x_proj, dt_proj))
    kernel = _kernel(x, x_proj, a) if method == "auto" else method
    x_proj, dt_proj = aligned(kernel, x_proj, dt_proj, a.shape[-1])
    # Projections act on single pixels: in the map's own order, for all directions.
    p = jnp.einsum("bhwd,kde->bhwke", x, x_proj)
    p = p.reshape(*p.shape[:3], -1)
    operands = x, p, dt_proj, dt_bias, a, skip
    if method == "sequential":
        return by_sequences("sequential", *operands)
    with jax.named_scope("four_scans"):  # by which sparx_jax.summary knows it
        scans = shard_batch(partial(four_scans, method), "bb....", "b")
        if kernel not in KERNELS:
            return scans(*operands)
        platform, module = KERNELS[kernel]
        if method == kernel:
            return module.four_scans(*operands)
        return by_platform(*operands, default=scans, **{platform: module.four_scans})


def _kernel(x, x_proj, a) -> str | None:
    """The method of one kernel where the devices have one."""
    if target_kind().startswith("NVIDIA"):
        return "triton_gpu"
    (_, height, width, _), e, n = x.shape, x_proj.shape[-1], a.shape[-1]
    vmem = mosaic_tpu.target_vmem()
    if vmem and mosaic_tpu.calls(height, width, e, n, x.dtype, vmem):
        return "mosaic_tpu"
    return None


def aligned(method, x_proj, dt_proj, n: int):
    """Projections by which a pixel's numbers lie as the method's kernels need them.

    That is, with more inputs of the step sizes, zero.
    """
    if method not in KERNELS:
        return x_proj, dt_proj
    (*_, e), rank = x_proj.shape, dt_proj.shape[1]
    zeros = (0, 0), (0, KERNELS[method][1].aligned(e, n, x_proj.dtype) - e), (0, 0)
    dt, bc = jnp.split(x_proj, [rank], -1)
    dt = jnp.pad(dt, (zeros[0], zeros[2], zeros[1]))
    return jnp.concatenate([dt, bc], -1), jnp.pad(dt_proj, zeros)


# The gradient is defined once for both methods, so that `platform_dependent` does not
# keep the residuals of two platforms: the inputs, and the loop's states.


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def four_scans(method, *operands):
    """As `triton_gpu.four_scans`; `method` is loop, associative or auto."""
    return _forward(method, *operands)[0]


def _forward(method, *operands):
    y, states = _choose(method, loop.forward, _associative, *operands)
    return y, (operands, states)


def _backward(method, residuals, grad):
    operands, states = residuals
    return _choose(method, loop.backward, _associative_vjp, *operands, states, grad)


four_scans.defvjp(_forward, _backward)


def _choose(method, on_cpu, elsewhere, *args):
    if method == "auto":
        return by_platform(*args, cpu=on_cpu, default=elsewhere)
    return (on_cpu if method == "loop" else elsewhere)(*args)


def _associative(*operands):
    shapes = jax.eval_shape(loop.forward, *operands)[1]
    states = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
    return by_sequences("associative", *operands), states


def _associative_vjp(*args):
    *operands, _, grad = args
    return jax.vjp(partial(by_sequences, "associative"), *operands)[1](grad)


def by_sequences(method: ScanMethod, x, p, dt_proj, dt_bias, a, skip):
    r, n = dt_proj.shape[1], a.shape[-1]

    def there_and_back(x, p, ways):
        x, p = (t.reshape(t.shape[0], -1, t.shape[-1]) for t in (x, p))
        p = jnp.moveaxis(p.reshape(*p.shape[:2], 4, -1)[:, :, ways], 2, 0)
        dt, b, c = jnp.split(p, (r, r + n), -1)
        dt = jnp.einsum("kblr,krd->kbld", dt, dt_proj[ways])
        dt = dt + dt_bias[ways][:, None, None].astype(x.dtype)
        return selective_scan(
            x, dt, a[ways], b, c, skip[ways], reverse=(False, True), method=method
        )

    # Rows and columns need one transposed copy of the map, not four.
    rows = there_and_back(x, p, slice(0, None, 2)).reshape(x.shape)
    x, p = x.swapaxes(1, 2), p.swapaxes(1, 2)
    columns = there_and_back(x, p, slice(1, None, 2)).reshape(x.shape)
    return rows + columns.swapaxes(1, 2)
