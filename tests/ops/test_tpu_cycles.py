"""The cycles of a program are those of its kernels' registers."""

import json
import os
import re
import subprocess
import sys

import pytest

from sparx_jax.ops.tpu_cycles import CORES, CYCLES, V4_CYCLES, static_cycles
from tests.test_compile import LIBTPU, NO_FLAGS, needs_libtpu
from tests.training.jobs import ROOT


def test_cycles_are_counted_for_each_register_of_each_kernel():
    """9 pictures are two registers, 130 channels two more."""
    program = """
  %four_scans_backward.3 = (bf16[2,5,9,130]{3,2,1,0}, f32[2,5,9,8]) custom-call(%x)
  %add.1 = f32[2,5,9,130]{3,2,1,0} add(%four_scans_backward.3, %y)
  %one_of_four_scans_backward = (f32[2,5,9,130]{3,2,1,0}, f32[2,5]) custom-call(%x)
  %depthwise3_forward.7 = bf16[2,5,9,130]{3,2,1,0} custom-call(%x, %w)
"""

    def expected(cycles):
        scans = 4 * cycles["four_scans_backward"][0]
        scans += cycles["one_of_four_scans_backward"][0]
        return 4 * 2 * 5 * (scans + cycles["depthwise3_forward"][0])

    assert static_cycles(program) == pytest.approx(expected(CYCLES))
    on_v4 = expected(V4_CYCLES) / CORES["TPU v4"]
    assert static_cycles(program, "TPU v4") == pytest.approx(on_v4)
    between = "%depthwise3_forward = bf16[21,21,8,128]{3,2,1,0} custom-call(%x, %w)"
    assert static_cycles(between) == pytest.approx(441 * 8.5)  # of 8.8 and 8.2


@pytest.mark.slow
@needs_libtpu
def test_cycles_are_those_of_the_compilers_schedules(tmp_path):
    """Of all kernels in every stage of T, on v5e; a slower kernel fails here."""
    out = tmp_path / "kernels.json"
    subprocess.run(
        [sys.executable, "-m", "benchmarks.tpu_kernel", "--no_xla", f"--out={out}"],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(LIBTPU)} | NO_FLAGS,
        check=True,
    )
    rows = json.loads(out.read_text())["rows"]
    assert len(rows) == 24
    for row in rows:
        name, side = re.match(r"(scan|\d)(?: x \d,)? (\d+)", row["operation"]).groups()
        kernel = "four_scans" if name == "scan" else f"depthwise{name}"
        program = f"%{kernel}_{row['kind']} = bf16[{side},{side},8,128]"
        registers = int(side) ** 2 * (4 if name == "scan" else 1)
        told = static_cycles(program) / registers
        assert told == pytest.approx(row["ours"], rel=0.02), row
