"""Static cycles of our TPU kernels, which XLA's estimates leave out."""

import re

from sparx_jax.ops.mosaic_tpu import LANES, SUBLANES

# Instruction bundles of a register of pixels (and of one direction), and those of each
# line of pixels, within 8 % of the compiler's schedules at 7, 14, 28 and 56 pixels a
# line (`python -m benchmarks.tpu_kernel`), to which a test holds those of v5e.  v6e's
# are fewer than v5e's, v5p's the same.
CYCLES = {
    "four_scans_forward": (15.7, 57.0),
    "four_scans_backward": (35.5, 115.0),
    "depthwise3_forward": (7.6, 19.0),
    "depthwise3_backward": (14.2, 21.0),
    "depthwise5_forward": (17.2, 33.0),
    "depthwise5_backward": (32.3, 34.0),
}
V4_CYCLES = {
    "four_scans_forward": (27.5, 56.0),
    "four_scans_backward": (58.3, 97.0),
    "depthwise3_forward": (11.6, 34.0),
    "depthwise3_backward": (24.0, 37.0),
    "depthwise5_forward": (35.0, 34.0),
    "depthwise5_backward": (64.0, 59.0),
}
# Cores that share a kernel's programs; XLA's own estimates are of both, too.
CORES = {"TPU v4": 2, "TPU v5": 2, "TPU v5p": 2}


def static_cycles(program: str, device_kind: str = "") -> float:
    """Of the kernels of a compiled program; waiting for memory is not in it."""
    pattern = rf"%(one_of_)?({'|'.join(CYCLES)})[.\d]* = \(?\w+\[([\d,]+)\]"
    cycles = V4_CYCLES if device_kind == "TPU v4" else CYCLES
    total = 0.0
    for one, kernel, shape in re.findall(pattern, program):
        height, width, batch, dim = map(int, shape.split(","))
        each, line = cycles[kernel]
        pixels, lines = height * width, height
        if "scans" in kernel:
            ways = 1 if one else 4
            pixels, lines = ways * pixels, ways * (height + width) / 2
        blocks = -(-batch // SUBLANES) * -(-dim // LANES)
        total += blocks * (pixels * each + lines * line)
    return total / CORES.get(device_kind, 1)
