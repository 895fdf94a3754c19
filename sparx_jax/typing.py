"""Notation and array types used by every signature of the package.

Axes: `b` batch, `h` rows, `w` columns, `c` channels, `l` tokens (`h * w`), `d` inner
channels of a mixer, `n` states of the recurrence, `r` rank of the step-size
projection, `k` scan directions, `g` attention groups.  Images and feature maps are
NHWC (`b h w c`), token sequences `b l c`.

Scans use the letters of the state-space papers:
`x` input, `dt` step size, `a` `b` `c` the recurrence, `d` the skip weight.
"""

from jaxtyping import Array, Float, Int, Key, UInt8

__all__ = ["Array", "Float", "Int", "Key", "UInt8"]
