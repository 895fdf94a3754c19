"""All backends of the depthwise convolution, against loops in NumPy."""

from contextlib import nullcontext
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType

from sparx_jax.ops import (
    depthwise,
    depthwise_conv,
    mosaic_depthwise,
    triton_depthwise,
)
from tests.gpus import H100, named

# Largest difference over the largest magnitude.  float32: sums of at most 100 products.
# bfloat16: the shifted sum rounds every one of its k * k partial sums to 8 bits.
TOLERANCE = {"float32": 2e-6, "bfloat16": 2e-2}


def interpreted(kernels):
    """Of a module with kernels, without the accelerator that they are for."""

    @partial(jax.custom_vjp, nondiff_argnums=(3,))
    def convolution(x, kernel, bias, residual):
        options = dict(residual=residual, interpret=True)
        return kernels.depthwise(x, kernel, bias, **options)

    def gradient(residual, operands, grad):
        options = dict(residual=residual, interpret=True)
        return kernels.depthwise_vjp(*operands, grad, **options)

    convolution.defvjp(lambda *args: (convolution(*args), args[:2]), gradient)

    def call(*args, stride, residual):
        assert stride == 1
        return convolution(*args, residual)

    return call


BACKENDS = {
    # What `depthwise_conv` runs here: on CPU the shifted sum, its gradient by hand.
    "default": depthwise_conv,
    "shifted_sum": depthwise._shifted_sum,
    "grouped_conv": depthwise._grouped_conv,
    "triton": interpreted(triton_depthwise),
    "mosaic": interpreted(mosaic_depthwise),
}

# Filter, stride, height, width: those of the network (5 and 3 at stride 1; r + 1 at
# stride r), on odd and even maps, and maps smaller than filter and stride.
CASES = [
    (3, 1, 7, 5),
    (3, 1, 1, 1),
    (5, 1, 6, 3),
    (5, 1, 1, 1),
    (3, 2, 7, 6),
    (3, 2, 1, 1),
    (5, 4, 14, 9),
    (9, 1, 5, 4),
    (9, 8, 17, 24),
    (9, 8, 3, 1),
]


def convolve(x, kernel, stride, cotangent=None):
    """Value in float64; with a cotangent the gradients of `x` and `kernel` instead."""
    x, kernel = np.asarray(x, np.float64), np.asarray(kernel, np.float64)
    k, (b, h, w, c) = len(kernel), x.shape
    rows, columns = (h - 1) // stride + 1, (w - 1) // stride + 1
    pad = k // 2
    y = np.zeros((b, rows, columns, c))
    grad_x, grad_kernel = np.zeros_like(x), np.zeros_like(kernel)
    for row, column, i, j in np.ndindex(rows, columns, k, k):
        source = row * stride + i - pad, column * stride + j - pad
        if not (0 <= source[0] < h and 0 <= source[1] < w):
            continue
        at = (slice(None), *source)
        y[:, row, column] += x[at] * kernel[i, j]
        if cotangent is not None:
            g = np.asarray(cotangent, np.float64)[:, row, column]
            grad_x[at] += g * kernel[i, j]
            grad_kernel[i, j] += (g * x[at]).sum(0)
    return y if cotangent is None else (grad_x, grad_kernel)


def assert_close(actual, expected, tolerance, what):
    assert actual.shape == expected.shape, what
    error = np.abs(np.asarray(actual, np.float64) - expected).max()
    assert error <= tolerance * np.abs(expected).max(), f"{what}: {error:.2e}"


def check(backend, size, stride, height, width, dtype, channels=3, residual=False):
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.standard_normal((2, height, width, channels)), dtype)
    kernel = jnp.asarray(rng.standard_normal((size, size, channels)), dtype)
    bias = jnp.asarray(rng.standard_normal(channels), dtype)
    expected = convolve(x, kernel, stride)
    cotangent = jnp.asarray(rng.standard_normal(expected.shape), dtype)
    convolution = partial(BACKENDS[backend], stride=stride, residual=residual)

    @jax.jit
    def run(x, kernel, bias, cotangent):
        y, vjp = jax.vjp(convolution, x, kernel, bias)
        return y, *vjp(cotangent)

    results = run(x, kernel, bias, cotangent)
    expected = expected + np.asarray(bias, np.float64)
    grad_x, grad_kernel = convolve(x, kernel, stride, cotangent)
    grad_bias = np.asarray(cotangent, np.float64).sum((0, 1, 2))
    if residual:
        expected = expected + np.asarray(x, np.float64)
        grad_x = grad_x + np.asarray(cotangent, np.float64)
    expected = expected, grad_x, grad_kernel, grad_bias
    names = "value", "gradient of x", "gradient of kernel", "gradient of bias"
    for what, got, want in zip(names, results, expected, strict=True):
        assert got.dtype == dtype
        assert_close(got, want, TOLERANCE[dtype], what)


@pytest.mark.parametrize("size, stride, height, width", CASES)
def test_value_and_gradients_equal_loops(size, stride, height, width):
    check("default", size, stride, height, width, "float32")


@pytest.mark.parametrize("size, stride, height, width", CASES)
def test_grouped_convolution_equals_loops(size, stride, height, width):
    check("grouped_conv", size, stride, height, width, "float32")


# More columns, more channels than a program has, and neither a multiple.
@pytest.mark.parametrize("backend", ["triton", "mosaic"])
@pytest.mark.parametrize(
    "size, height, width, channels",
    [(3, 7, 5, 3), (5, 6, 9, 80), (5, 1, 1, 64), (3, 2, 17, 130), (1, 2, 3, 4)],
)
def test_kernels_equal_loops(backend, size, height, width, channels):
    check(backend, size, 1, height, width, "float32", channels, residual=True)


@pytest.mark.parametrize("backend", ["default", "grouped_conv"])
def test_residual_adds_the_input(backend):
    check(backend, 5, 1, 6, 3, "float32", residual=True)


@pytest.mark.parametrize("stride", [1, 2])
def test_channels_of_whole_half_pages(stride):
    check("default", 3, stride, 3, 4, "float32", 512, residual=stride == 1)


@pytest.mark.parametrize("backend", BACKENDS)
def test_bfloat16_storage_loses_only_rounding(backend):
    check(backend, 5, 1, 6, 3, "bfloat16", residual=True)


def test_gradients_have_gradients():
    """Of penalties on them, for one; no kernel of other devices is in the way."""

    def penalty(convolution, x):
        grad = jax.grad(lambda x: jnp.sum(convolution(x, kernel, bias) ** 3))(x)
        return jnp.sum(grad**2)

    rng = np.random.default_rng(0)
    x, kernel, bias = (
        jnp.asarray(rng.standard_normal(shape), jnp.float32)
        for shape in ((2, 4, 3, 5), (3, 3, 5), (5,))
    )
    plain = partial(depthwise._grouped_conv, stride=1)
    got, expected = (jax.grad(partial(penalty, f))(x) for f in (depthwise_conv, plain))
    limit = 1e-5 * np.abs(expected).max()
    np.testing.assert_allclose(got, expected, rtol=0, atol=limit)


@pytest.mark.parametrize(
    "platform, mark", [("cuda", "xla.gpu.triton"), ("tpu", "tpu_custom_call")]
)
def test_accelerators_get_kernels_where_the_filter_is_small(
    platform, mark, monkeypatch
):
    """Lowered without one: strides, large filters and large maps stay XLA's."""
    monkeypatch.setattr(depthwise, "target_vmem", lambda: 4)

    def kernels(size, side=8, **settings):
        def both(x, kernel, bias):
            with named(H100) if platform == "cuda" else nullcontext():
                y, vjp = jax.vjp(partial(depthwise_conv, **settings), x, kernel, bias)
                return y, vjp(y)

        shapes = (1, side, side, 64), (size, size, 64), (64,)
        args = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
        lowered = jax.jit(both).trace(*args).lower(lowering_platforms=(platform,))
        return lowered.as_text().count(mark)

    # The gradient is two kernels on GPUs and one on TPUs.
    expected = 3 if platform == "cuda" else 2
    assert kernels(5, residual=True) == kernels(3) == expected
    assert kernels(7) == kernels(3, stride=2) == 0
    assert kernels(3, side=32) == (0 if platform == "tpu" else expected)


@pytest.mark.parametrize("residual", [False, True])
def test_accelerators_add_the_input_and_sum_over_their_devices(residual, monkeypatch):
    """What is traced for each platform, on four devices: no kernel runs here."""
    monkeypatch.setattr(depthwise, "target_vmem", lambda: 4)
    monkeypatch.setattr(depthwise, "target_kind", lambda: "NVIDIA H200")
    told = []
    for kernels in (triton_depthwise, mosaic_depthwise):

        def forward(x, kernel, bias, *, residual, interpret):
            told.append(residual)
            return x

        def gradient(x, kernel, grad, *, residual, interpret):
            told.append(residual)
            return x, kernel, kernel[0, 0]

        monkeypatch.setattr(kernels, "depthwise", forward)
        monkeypatch.setattr(kernels, "depthwise_vjp", gradient)

    def gradients(x, kernel, bias):
        y, vjp = jax.vjp(partial(depthwise_conv, residual=residual), x, kernel, bias)
        return vjp(y)

    mesh = jax.sharding.AbstractMesh((4,), ("data",), axis_types=(AxisType.Auto,))
    shapes = (4, 5, 6, 8), (3, 3, 8), (8,)
    with jax.sharding.use_abstract_mesh(mesh):
        program = jax.make_jaxpr(gradients)(*map(jnp.zeros, shapes))
    assert len(told) >= 4 and set(told) == {residual}
    # Of CPUs, GPUs and TPUs: the gradients of filter and bias.
    assert str(program).count(" = psum") == 3 * 2


def test_hand_written_gradient_is_that_of_the_shifted_sum():
    """What JAX derives from the forward code, where the loops above agree too."""
    check("shifted_sum", 3, 2, 7, 6, "float32")


def test_gradient_reaches_a_kernel_kept_in_another_dtype():
    """Parameters stay float32 while maps are bfloat16."""
    x, kernel = jnp.ones((1, 3, 3, 2), jnp.bfloat16), jnp.ones((3, 3, 2))
    grad = jax.grad(lambda kernel: depthwise_conv(x, kernel).astype(float).sum())(
        kernel
    )
    assert grad.dtype == jnp.float32
    # Each tap meets as many pixels as its row and column shift leave: 2, 3, 2.
    np.testing.assert_array_equal(grad[..., 0], np.outer([2, 3, 2], [2, 3, 2]))


def test_what_the_backends_would_do_differently_is_refused():
    x = jnp.ones((1, 4, 4, 2))
    with pytest.raises(ValueError, match="odd"):
        depthwise_conv(x, jnp.ones((4, 4, 2)))
    with pytest.raises(ValueError, match="stride 1"):
        depthwise_conv(x, jnp.ones((3, 3, 2)), stride=2, residual=True)
