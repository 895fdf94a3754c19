"""The cycles of a program are those of its kernels' registers."""

from sparx_jax.ops.tpu_cycles import CORES, CYCLES, V4_CYCLES, static_cycles


def test_cycles_are_counted_for_each_register_of_each_kernel():
    """9 pictures are two registers, 130 channels two more."""
    program = """
  %four_scans_backward.3 = (bf16[2,5,9,130]{3,2,1,0}, f32[2,5,9,8]) custom-call(%x)
  %add.1 = f32[2,5,9,130]{3,2,1,0} add(%four_scans_backward.3, %y)
  %one_of_four_scans_backward = (f32[2,5,9,130]{3,2,1,0}, f32[2,5]) custom-call(%x)
  %depthwise3_forward.7 = bf16[2,5,9,130]{3,2,1,0} custom-call(%x, %w)
"""

    def expected(cycles):
        each, line = cycles["four_scans_backward"]
        scans = (4 + 1) * (2 * 5 * each + (2 + 5) / 2 * line)
        each, line = cycles["depthwise3_forward"]
        return 4 * (scans + 2 * 5 * each + 2 * line)

    assert static_cycles(program) == expected(CYCLES)
    assert static_cycles(program, "TPU v4") == expected(V4_CYCLES) / CORES["TPU v4"]
