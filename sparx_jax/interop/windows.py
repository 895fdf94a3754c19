"""Relative position biases for attention windows of another size."""

import numpy as np
from scipy.interpolate import make_interp_spline


def resize_position_bias(table: np.ndarray, window: int) -> np.ndarray:
    """Stretches a bias (y, x, heads) over the offsets of a `window` of another size.

    Cubic splines along y and x: the largest offsets keep their bias, and what is linear
    in the offset stays linear.
    """
    new = np.linspace(-1, 1, 2 * window - 1)
    for axis in (0, 1):
        old = np.linspace(-1, 1, table.shape[axis])
        degree = min(3, len(old) - 1)
        table = make_interp_spline(old, table, k=degree, axis=axis)(new)
    return table
