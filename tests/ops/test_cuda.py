"""The CUDA kernel of the forward scans, where there is no GPU.

Its source is compiled for this machine, CUDA's threads being fibers, and compared with
a plain recurrence in float64.  On a GPU it was run by benchmarks/gpu.sh.
"""

import ctypes
import shutil
import subprocess
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparx_jax.errors import UserError
from sparx_jax.ops import cuda
from sparx_jax.ops.ss2d import aligned
from tests.gpus import H100

RTX = "NVIDIA GeForce RTX 4090"
HERE = Path(__file__).parent
# pictures, height, width, channels, rank
SHAPES = [
    (2, 14, 14, 32, 6),  # several warps, one round
    (1, 7, 7, 16, 32),  # one warp, runs of two columns, five eights of numbers
    (1, 12, 8, 16, 2),
    (1, 5, 3, 16, 3),  # runs that end within a column
    (1, 9, 12, 32, 20),  # a last run that ends beyond the map
    (1, 28, 28, 16, 12),  # two rounds
    (1, 40, 24, 16, 2),  # rounds that end within a row
    pytest.param((1, 56, 56, 16, 6), marks=pytest.mark.slow),
]


def draw(b, h, w, d, rank):
    """Step sizes of all channels are between 1e-4 and 10."""
    rng = np.random.default_rng(0)

    def normal(*shape):
        return jnp.asarray(rng.standard_normal(shape), jnp.float32)

    x = normal(b, h, w, d).astype(jnp.bfloat16)
    x_proj = (normal(4, d, rank + 2) * d**-0.5).astype(jnp.bfloat16)
    dt_proj = (normal(4, rank, d) * 0.3).astype(jnp.bfloat16)
    x_proj, dt_proj = aligned("triton_gpu", x_proj, dt_proj, 1)
    p = jnp.einsum("bhwd,kde->bhwke", x, x_proj).reshape(b, h, w, -1)
    bias = jnp.log(jnp.expm1(jnp.logspace(-4, 1, 4 * d))).reshape(4, d)
    return x, p, dt_proj, bias, -jnp.exp(normal(4, 1, d)), normal(4, d)


def recurrence(x, p, w, bias, a, skip, steps):
    """The scans, and the states before every few pixels, in float64."""
    x, p, w, bias, a, skip = (
        np.asarray(t, np.float64) for t in (x, p, w, bias, a[:, 0], skip)
    )
    b, height, width, d = x.shape
    rows = np.arange(height * width).reshape(height, width)
    ways = [rows.ravel(), rows.T.ravel()]
    x, p = x.reshape(b, -1, d), p.reshape(b, height * width, 4, -1)
    y, states = x * skip.sum(0), []
    for k, way in enumerate([*ways, *(way[::-1] for way in ways)]):
        h, kept = np.zeros((b, d)), []
        for i, pixel in enumerate(way):
            if i % steps == 0:
                kept.append(h)
            *dt, b_n, c_n = np.moveaxis(p[:, pixel, k], 1, 0)[..., None]
            z = bias[k] + sum(t * w_r for t, w_r in zip(dt, w[k], strict=True))
            delta = np.logaddexp(0, z)
            h = np.exp(delta * a[k]) * h + delta * x[:, pixel] * b_n
            y[:, pixel] += c_n * h
        states.append(np.stack(kept, 1))
    return y, np.stack(states)[:, :, :, None]


def on_cpu(of, operands, pictures, folder, descending):
    """Runs four_scans.cu for `of`: y and the states."""
    compiler = shutil.which("g++")
    if not compiler:
        pytest.skip("there is no g++ to compile the kernel for this machine")
    library = folder / f"{'_'.join(map(str, of))}.so"
    defines = [f"-D{k.upper()}={v}" for k, v in of._asdict().items()]
    if not library.exists():
        flags = ["-std=c++17", "-O1", "-fPIC", "-shared", f"-I{cuda.SOURCE.parent}"]
        source = HERE / "four_scans_on_cpu.cpp"
        subprocess.check_call([compiler, *flags, *defines, source, "-o", library])
    tokens = of.height * of.width
    y = np.zeros((pictures, tokens, of.dim), jnp.bfloat16)
    kept = tokens // of.steps if of.steps else 0
    states = np.zeros((4, pictures, kept, 1, of.dim), np.float32)
    arrays = [np.ascontiguousarray(t) for t in operands] + [y, states]
    pointers = [ctypes.c_void_p(t.ctypes.data) for t in arrays]
    ctypes.CDLL(library).run(*pointers, pictures, of.shared_bytes, descending)
    return y.astype(np.float64), states


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("kernels")


def error(got, want):
    return np.linalg.norm(got - want) / np.linalg.norm(want)


@pytest.mark.parametrize("shape", SHAPES)
def test_kernel_equals_the_recurrence(shape, folder):
    args = draw(*shape)
    of = cuda.program(*args[:2], 1, keep=True, kind=H100)
    operands = cuda.operands(of, *args)
    y, states = on_cpu(of, operands, shape[0], folder, descending=False)
    want_y, want_states = recurrence(*args, of.steps)
    # Three sums and the result are rounded to bfloat16; nothing else is.
    assert error(y, want_y) < 2**-8
    assert error(states, want_states) < 1e-4
    # With the threads in another order and memory that begins where arrays begin.
    again = on_cpu(of, operands, shape[0], folder, descending=True)
    np.testing.assert_array_equal(again[0], y)
    np.testing.assert_array_equal(again[1], states)


def test_evaluation_keeps_no_states(folder):
    args = draw(1, 14, 14, 32, 6)
    values = []
    for keep in (True, False):
        of = cuda.program(*args[:2], 1, keep=keep, kind=H100)
        operands = cuda.operands(of, *args)
        values.append(on_cpu(of, operands, 1, folder, descending=False)[0])
    np.testing.assert_array_equal(*values)


@pytest.mark.parametrize(
    ("shape", "dtype", "n", "kind"),
    [
        ((1, 14, 14, 32), "float32", 1, H100),
        ((1, 14, 14, 32), "bfloat16", 16, H100),
        ((1, 14, 14, 24), "bfloat16", 1, H100),  # not of 16 channels
        ((1, 96, 96, 32), "bfloat16", 1, H100),  # more than shared memory
        ((1, 56, 56, 32), "bfloat16", 1, RTX),
    ],
)
def test_what_it_cannot_do_is_left_to_triton(shape, dtype, n, kind):
    x = jax.ShapeDtypeStruct(shape, dtype)
    p = jax.ShapeDtypeStruct((*shape[:3], 4 * (6 + 2 * n)), dtype)
    assert cuda.program(x, p, n, keep=False, kind=kind) is None
    possible = jax.ShapeDtypeStruct((1, 14, 14, 32), "bfloat16")
    p = jax.ShapeDtypeStruct((1, 14, 14, 4 * 8), "bfloat16")
    assert cuda.program(possible, p, 1, keep=False, kind=kind)


@pytest.mark.parametrize("batched", [False, True])
def test_nvrtc_compiles_it_for_a_gpu_that_is_not_there(batched):
    args = draw(1, 7, 7, 16, 6)
    of = cuda.program(*args[:2], 1, keep=True, kind=H100)
    run = partial(cuda.forward, of)
    if batched:
        run, args = jax.vmap(run), [t[None] for t in args]
    traced = jax.jit(run).trace(*args)
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert "__gpu$xla.gpu.ptx" in text
    assert ".version 7.8" in text
    assert "mma.sync.aligned.m16n8k16" in text


def test_without_nvrtc_it_says_what_to_install(monkeypatch):
    monkeypatch.setattr(cuda.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(cuda, "find_library", lambda name: None)
    with pytest.raises(UserError, match="pip install nvidia-cuda-nvrtc"):
        cuda._nvrtc.__wrapped__()
