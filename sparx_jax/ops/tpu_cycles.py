"""Static cycles of our TPU kernels, which XLA's estimates leave out."""

import re

import numpy as np

from sparx_jax.ops.mosaic_tpu import LANES, SUBLANES

# Instruction bundles of a register of pixels (and of one direction) in the compiler's
# schedules for v5e, by side of the map (`python -m benchmarks.tpu_kernel`, to which a
# test holds them).  Maps in strips are v5p's, whose other kernels take as many; v6e's
# take fewer.
SIDES = 7, 14, 28, 56
CYCLES = {
    "four_scans_forward": (9.6, 8.4, 8.0, 7.9),
    "four_scans_backward": (25.2, 21.4, 20.7, 20.3),
    "one_of_four_scans_forward": (13.8,) * 4,
    "one_of_four_scans_backward": (31.4,) * 4,
    "depthwise3_forward": (10.4, 8.8, 8.2, 8.0),
    "depthwise3_backward": (17.4, 16.2, 15.4, 14.4),
    "depthwise5_forward": (22.0, 19.7, 18.7, 17.8),
    "depthwise5_backward": (37.5, 35.6, 34.1, 32.6),
}
V4_CYCLES = {  # maps of 28 and more are walked in strips, smaller ones as a whole
    "four_scans_forward": (14.8, 13.8, 13.8, 13.8),
    "four_scans_backward": (40.2, 37.0, 37.0, 37.0),
    "one_of_four_scans_forward": (18.2, 18.2, 18.2, 17.8),
    "one_of_four_scans_backward": (43.2, 43.2, 43.2, 43.8),
    "depthwise3_forward": (16.4, 14.0, 13.2, 13.2),
    "depthwise3_backward": (29.2, 26.8, 25.6, 25.6),
    "depthwise5_forward": (40.2, 37.0, 36.0, 36.0),
    "depthwise5_backward": (72.2, 68.6, 66.0, 66.0),
}
# Cores that share a kernel's programs; XLA's own estimates are of both, too.
CORES = {"TPU v4": 2, "TPU v5": 2, "TPU v5p": 2}


def static_cycles(program: str, device_kind: str = "") -> float:
    """Of the kernels of a compiled program; waiting for memory is not in it."""
    pattern = rf"%({'|'.join(CYCLES)})[.\d]* = \(?\w+\[([\d,]+)\]"
    cycles = V4_CYCLES if device_kind == "TPU v4" else CYCLES
    total = 0.0
    for kernel, shape in re.findall(pattern, program):
        height, width, batch, dim = map(int, shape.split(","))
        ways = 4 if kernel.startswith("four_scans") else 1
        registers = -(-batch // SUBLANES) * -(-dim // LANES) * height * width
        each = np.interp((height + width) / 2, SIDES, cycles[kernel])
        total += ways * registers * each
    return total / CORES.get(device_kind, 1)
