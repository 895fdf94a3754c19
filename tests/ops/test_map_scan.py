"""Laws of the scan of maps; `sequential` is the oracle of the other methods.

Kernels are interpreted here; that one compiles for TPUs is a law of the rehearsal.
"""

import re
import sys
from functools import partial

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest

from sparx_jax.ops import batch_on, loop, mosaic_tpu, ss2d
from sparx_jax.parallel import make_mesh
from tests.gpus import H100, named

# As in test_scan.py; bfloat16 here rounds the step sizes of the oracle too.
TOLERANCE = {"float32": 5e-6, "bfloat16": 3e-2}
NAMES = "x x_proj dt_proj dt_bias a skip".split()
MODULE = sys.modules["sparx_jax.ops.ss2d"]  # not the function of that name


def operands(batch, height, width, dim, rank, states, dtype):
    """Random; step sizes of all channels are between 1e-4 and 10."""
    rng = np.random.default_rng(0)

    def draw(*shape):
        return jnp.asarray(rng.standard_normal(shape), jnp.float32)

    return (
        draw(batch, height, width, dim).astype(dtype),
        draw(4, dim, rank + 2 * states) * dim**-0.5,
        draw(4, rank, dim) * 0.3,
        jnp.log(jnp.expm1(jnp.logspace(-4, 1, 4 * dim))).reshape(4, dim),
        -jnp.exp(draw(4, dim, states) * 0.3),
        draw(4, dim),
    )


def value_and_grads(method, args):
    @jax.jit
    def run(args):
        y, vjp = jax.vjp(partial(ss2d, method=method), *args)
        return y, *vjp(jnp.cos(jnp.arange(y.size).reshape(y.shape)).astype(y.dtype))

    return [np.asarray(t, np.float32) for t in run(args)]


SHAPES = [
    ((3, 3, 5, 130, 3, 1), "float32"),  # channels of two blocks, one partial
    ((9, 2, 4, 8, 2, 1), "bfloat16"),  # pictures of two blocks
    ((2, 4, 6, 16, 2, 1), "bfloat16"),  # forward by CUDA, had it a GPU
    ((2, 3, 2, 8, 2, 16), "float32"),
    ((2, 3, 3, 8, 40, 1), "float32"),  # on a TPU two directions share a register
    ((2, 2, 3, 8, 70, 1), "float32"),  # and here each has its own
]


@pytest.mark.parametrize(
    "method",
    ["loop", "associative"]
    + [pytest.param(k, marks=pytest.mark.slow) for k in ("mosaic_tpu", "triton_gpu")],
)
@pytest.mark.parametrize("shape, dtype", SHAPES)
def test_methods_equal_the_oracle(shape, dtype, method):
    assert_equal(method, operands(*shape, dtype), TOLERANCE[dtype])


@pytest.mark.slow
@pytest.mark.parametrize(
    "shape, dtype, vmem, lines",
    [
        ((3, 7, 5, 130, 3, 1), "float32", 2, [4, 3, 4, 3]),
        ((9, 7, 7, 8, 2, 1), "bfloat16", 3, [4, 4, 4, 4]),
        ((2, 4, 3, 8, 2, 16), "float32", 8, [2, 1, 2, 1]),
    ],
)
def test_the_tpu_kernels_walk_maps_in_strips(shape, dtype, vmem, lines, monkeypatch):
    """Where a map has no room; of 7 or 5 lines the last strip has fewer."""
    (_, *size, _, rank, n), dtype = shape, jnp.dtype(dtype)
    plan = mosaic_tpu.calls(*size, rank + 2 * n, n, dtype, vmem)
    assert [call.lines for call in plan] == lines
    monkeypatch.setattr(mosaic_tpu, "target_vmem", lambda: vmem)
    assert_equal("mosaic_tpu", operands(*shape, dtype), TOLERANCE[dtype.name])


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_tpu_kernel_walks_all_directions_of_a_square_side_by_side(
    dtype, monkeypatch
):
    """In five pieces, so that all four are at the middle at once."""
    monkeypatch.setattr(mosaic_tpu, "PIECE", 8)
    (call,) = mosaic_tpu.calls(5, 5, 4, 1, jnp.dtype(dtype), 128)
    assert call.walks == (mosaic_tpu.Walk(range(4), beside=4, piece=5),)
    args = operands(2, 5, 5, 8, 2, 1, dtype)
    assert_equal("mosaic_tpu", args, TOLERANCE[dtype])


def test_step_sizes_of_the_tpu_kernel_in_bfloat16():
    z = np.concatenate([np.linspace(-20, 20, 4001), [-100, 0, 100]])
    delta, sigmoid = jax.jit(mosaic_tpu._softplus_and_sigmoid, static_argnums=1)(
        jnp.float32(z), jnp.dtype("bfloat16")
    )
    exact = np.logaddexp(0, z)
    assert np.abs(delta - exact).max() < 2e-6
    assert np.abs(delta / exact - 1)[z > np.log(1e-4)].max() < 2e-3
    assert np.abs(sigmoid - np.exp(z - exact)).max() < 5e-7


@pytest.mark.parametrize("size", [(1, 1), (1, 6), (7, 1)])
def test_the_loop_takes_maps_of_one_line(size):
    assert_equal("loop", operands(2, *size, 5, 2, 3, "float32"), TOLERANCE["float32"])


@pytest.mark.parametrize("dim, states", [(600, 1), (38, 16)])
def test_the_loop_takes_rows_and_columns_in_parts(dim, states):
    tokens = [loop._tokens(side, 2 * dim * states) for side in (14, 21, 13)]
    assert tokens == [7, 7, 13], "13 has no parts"
    args = operands(2, 14, 21, dim, 2, states, "float32")
    assert_equal("loop", args, TOLERANCE["float32"])


def test_the_loop_takes_channels_of_whole_half_pages():
    assert_equal("loop", operands(1, 2, 3, 512, 2, 1, "float32"), TOLERANCE["float32"])


def assert_equal(method, args, tolerance):
    expected = value_and_grads("sequential", args)
    found = value_and_grads(method, args)
    for name, one, other in zip(["y", *NAMES], expected, found, strict=True):
        assert one.shape == other.shape and np.isfinite(other).all(), name
        error = np.abs(one - other).max() / (np.abs(one).max() + 1e-30)
        assert error < tolerance, (name, error)


def test_auto_is_the_loop_on_cpu_bit_for_bit():
    args = operands(2, 3, 4, 8, 2, 1, "float32")
    auto, loop = value_and_grads("auto", args), value_and_grads("loop", args)
    assert all(map(np.array_equal, auto, loop))


def test_the_loop_keeps_its_inputs_and_one_state_a_line():
    x, x_proj, *weights = operands(2, 3, 5, 8, 2, 4, "float32")
    p = jnp.einsum("bhwd,kde->bhwke", x, x_proj).reshape(2, 3, 5, -1)
    _, (kept, states) = jax.eval_shape(partial(MODULE._forward, "auto"), x, p, *weights)
    assert [t.shape for t in kept] == [t.shape for t in (x, p, *weights)]
    assert [t.shape for t in states] == [(3, 2, 2, 4, 8), (5, 2, 2, 4, 8)]


def test_the_loop_needs_a_tenth_of_the_memory_of_associative():
    args = operands(2, 24, 24, 32, 2, 1, "float32")

    def temporaries(method):
        run = jax.jit(
            lambda args: jax.vjp(partial(ss2d, method=method), *args)[1](args[0])
        )
        return run.lower(args).compile().memory_analysis().temp_size_in_bytes

    loop, associative = temporaries("loop"), temporaries("associative")
    assert loop < 0.1 * associative, (loop, associative)


def test_auto_asks_the_environment(monkeypatch):
    args = operands(1, 2, 3, 4, 1, 1, "float32")
    monkeypatch.setenv("SPARX_JAX_SCAN_METHOD", "sequential")
    found, sequential = (
        value_and_grads("auto", args),
        value_and_grads("sequential", args),
    )
    assert all(map(np.array_equal, found, sequential))
    monkeypatch.setenv("SPARX_JAX_SCAN_METHOD", "fast")
    with pytest.raises(ValueError, match="'fast' is none of"):
        ss2d(*args)


def test_unknown_methods_are_refused_by_name(monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    with pytest.raises(ValueError, match=r"'fast' is none of .*sequential.*loop"):
        ss2d(*operands(1, 2, 2, 4, 1, 1, "float32"), method="fast")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_gpu_kernels_are_lowered_for_gpus(dtype):
    """To Triton, which is as far as it goes without one."""

    def run(args):
        with named(H100):
            y, vjp = jax.vjp(partial(ss2d, method="triton_gpu"), *args)
            return y, vjp(y)

    args = operands(2, 4, 6, 24, 2, 1, dtype)
    lowered = jax.jit(run).trace(args).lower(lowering_platforms=("cuda",))
    kernels = re.findall(r'name = "(four_scans_\w+)"', lowered.as_text())
    assert sorted(kernels) == ["four_scans_backward", "four_scans_forward"]


def test_auto_takes_the_kernel_of_the_devices(monkeypatch):
    args = operands(1, 4, 4, 32, 2, 1, "float32")

    def program(platform):
        traced = jax.jit(lambda *args: ss2d(*args)).trace(*args)
        return traced.lower(lowering_platforms=(platform,)).as_text()

    with named(H100):
        assert "four_scans" in program("cuda")
    with named("Tesla V100-SXM2-16GB"):
        assert "four_scans" not in program("cuda")
    # What runs on the CPU of a machine with GPUs is the CPU's, not the kernel.
    here = program("cpu")
    monkeypatch.setattr(MODULE, "target_kind", lambda: H100)
    assert program("cpu").count("stablehlo.while") == here.count("stablehlo.while") > 0


def test_maps_that_do_not_fit_are_refused():
    args = operands(1, 2, 2, 4, 1, 1, "float32")
    big = [jax.ShapeDtypeStruct(a.shape, a.dtype) for a in args]
    big[0] = jax.ShapeDtypeStruct((1, 1, 4096, 4), jnp.float32)
    with pytest.raises(ValueError, match=r"more than 128 MiB .* 1 x 4096 in float32"):
        jax.eval_shape(partial(ss2d, method="mosaic_tpu"), *big)


def test_maps_without_room_on_a_tpu_are_walked_in_strips():
    """Of the stages of T at 224 pixels, as libtpu's compiler finds too."""
    stages = [(56, 8), (28, 14), (14, 22), (7, 34)]

    def strips(chip, dtype="bfloat16"):
        plans = [
            mosaic_tpu.calls(s, s, e, 1, jnp.dtype(dtype), mosaic_tpu.VMEM[chip])
            for s, e in stages
        ]
        assert all(len(p) == (1 if p[0].lines == s else 4) for p, (s, _) in
                   zip(plans, stages, strict=True))  # fmt: skip
        return [-(-s // p[0].lines) for p, (s, _) in zip(plans, stages, strict=True)]

    assert strips("TPU v5 lite") == strips("TPU v6 lite") == [1] * 4
    assert strips("TPU v5") == strips("TPU v5p") == [3, 1, 1, 1]
    assert strips("TPU v4") == [14, 4, 1, 1]
    seen = []
    batch_on(make_mesh(), lambda: seen.append(mosaic_tpu.target_vmem()))()
    assert seen == [0] and mosaic_tpu.target_vmem() == 0


def test_float32_stays_float32_where_jax_has_64_bits():
    args = operands(1, 3, 4, 8, 2, 1, "float32")
    expected = value_and_grads("sequential", args)
    with jax.enable_x64(True):
        y, vjp = jax.vjp(partial(ss2d, method="loop"), *args)
        found = y, *vjp(jnp.cos(jnp.arange(y.size)).reshape(y.shape).astype(y.dtype))
    for name, got, want in zip(("y", *NAMES), found, expected, strict=True):
        assert got.dtype == "float32", name
        limit = TOLERANCE["float32"] * np.abs(want).max()
        np.testing.assert_allclose(got, want, rtol=0, atol=limit, err_msg=name)
