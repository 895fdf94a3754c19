"""The forward scans in CUDA: `four_scans.cu`, compiled where it is used.

NVRTC, which comes with JAX for CUDA, makes PTX of it and XLA runs that: nothing is
built when this package is installed.  A shape has a program of its own.
"""

import ctypes
import importlib.util
import re
from ctypes.util import find_library
from functools import cache
from math import gcd
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import Primitive
from jax.interpreters import mlir

from sparx_jax.errors import UserError

SOURCE = Path(__file__).with_name("four_scans.cu")
CHANNELS = 16  # of a block
LOG2_E, LN_2 = 1.4426950408889634, 0.6931471805599453
# Shared memory that a block may have, in KiB, by the names of chips.
_LIMITS = {r"\bG?[BH]\d00\b|\bH20\b": 227, r"\bA[18]00\b|\bA30\b": 163, "": 99}


class Program(NamedTuple):
    """What `four_scans.cu` is compiled with; the names are its own in lower case."""

    height: int
    width: int
    dim: int
    numbers: int
    run: int
    warps: int
    steps: int

    @property
    def shared_bytes(self) -> int:
        """Of the map and the sums, with a gap after each run."""
        height, width, run = self.height, self.width, self.run
        slab = height * width
        if width % run == height % run == 0:
            slab += height * (width // run) + height // run
        return 2 * slab * 2 * CHANNELS


def program(x, p, n: int, *, keep: bool, kind: str) -> Program | None:
    """For a map `x` and its numbers `p`, or None if it can't do them.

    Args:
      keep: whether the states before every few pixels are wanted.
      kind: of the device, as JAX names it.
    """
    _, height, width, dim = x.shape
    numbers = p.shape[-1] // 4
    if n != 1 or numbers % 8 or dim % CHANNELS or x.dtype != jnp.bfloat16:
        return None
    tokens = height * width

    def cost(run):
        """About the instructions, of threads without pixels too."""
        threads = -(-tokens // (4 * run)) * 4
        uneven = height % run and run % height
        return threads * (run * (30 + 6 * bool(uneven)) + 30)

    run = min(range(2, 17, 2), key=cost)
    chunks = -(-tokens // (4 * run))
    limit = next(v for k, v in _LIMITS.items() if re.search(k, kind)) * 2**10
    shape = height, width, dim, numbers, run
    # Two blocks of 7 warps are faster than one of 14, but need twice the memory.
    alone = 2 * Program(*shape, 8, 0).shared_bytes > limit
    rounds = -(-chunks // (14 if alone else 8))
    # The gradient walks along whole lines, and needs a state before each few steps.
    steps = max(s for s in range(1, 9) if gcd(height, width, run) % s == 0)
    found = Program(*shape, -(-chunks // rounds), steps * keep)
    needed = found.shared_bytes + 256 * found.warps + 128  # `Shared` of the kernel
    return found if needed <= limit else None


def forward(of: Program, x, p, w, bias, a, d):
    """y, and the states before every few pixels if `of` keeps them."""

    @jax.custom_batching.sequential_vmap
    def scans(*args):
        return tuple(_four_scans.bind(*args, of=of))

    y, *states = scans(*operands(of, x, p, w, bias, a, d))
    return y.reshape(x.shape), *states


def operands(of: Program, x, p, w, bias, a, d):
    """As `four_scans.cu` takes them."""
    batch, *_, dim = x.shape
    w = jnp.swapaxes(w.astype(jnp.float32) * LOG2_E, 1, 2)
    w = jnp.pad(w, ((0, 0), (0, 0), (0, of.numbers - w.shape[-1])))[:, :, _order(of)]
    rough = w.astype(jnp.bfloat16)
    halves = rough, (w - rough.astype(jnp.float32)).astype(jnp.bfloat16)
    x, p = (t.reshape(batch, -1, t.shape[-1]) for t in (x, p))
    skip = d.sum(0) / LN_2
    return x, p, jnp.stack(halves, 1), bias * LOG2_E, a.reshape(4, dim), skip


def _order(of: Program) -> list[int]:
    """Which number of a pixel stands where in the eights that are multiplied.

    Threads 0 to 3 have two of each eight, and read theirs of 4, 2 or 1 eights at once.
    """
    order, eights = [], of.numbers // 8
    for size in (4, 2, 1):
        while eights >= size:
            begin = of.numbers - 8 * eights
            theirs = np.arange(8 * size).reshape(4, size, 2) + begin
            order += theirs.swapaxes(0, 1).ravel().tolist()
            eights -= size
    return order


_four_scans = Primitive("cuda_four_scans")
_four_scans.multiple_results = True


@_four_scans.def_abstract_eval
def _results(x, *_, of: Program):
    batch, tokens, dim = x.shape
    y = jax.core.ShapedArray(x.shape, x.dtype)
    if not of.steps:
        return [y]
    states = 4, batch, tokens // of.steps, 1, dim
    return [y, jax.core.ShapedArray(states, jnp.float32)]


def _lower(ctx, *args, of: Program):
    batch, dim = ctx.avals_in[0].shape[0], of.dim
    count = len(args)
    rule = jax.ffi.ffi_lowering(
        "__gpu$xla.gpu.ptx",
        operand_layouts=[tuple(range(a.ndim))[::-1] for a in ctx.avals_in],
        result_layouts=[tuple(range(a.ndim))[::-1] for a in ctx.avals_out],
    )
    sizes = dict(grid_x=dim // CHANNELS, grid_y=batch, grid_z=1, block_x=32 * of.warps)
    return rule(
        ctx, *args, name="four_scans", kernel_type="ptx", kernel_data=ptx(of),
        **sizes, block_y=1, block_z=1, shared_mem_bytes=of.shared_bytes,
        output_indices=list(range(count, count + len(ctx.avals_out))),
    )  # fmt: skip


mlir.register_lowering(_four_scans, _lower, platform="cuda")


@cache
def ptx(of: Program) -> str:
    """The program in NVIDIA's portable assembly, for Ampere and later."""
    defines = [f"-D{k.upper()}={v}" for k, v in of._asdict().items()]
    options = ["--gpu-architecture=compute_80", "--std=c++17", *defines]
    nvrtc, handle, size = _nvrtc(), ctypes.c_void_p(), ctypes.c_size_t()

    def text(get_size, get):
        getattr(nvrtc, get_size)(handle, ctypes.byref(size))
        buffer = ctypes.create_string_buffer(size.value)
        getattr(nvrtc, get)(handle, buffer)
        return buffer.value.decode()

    source, name = SOURCE.read_bytes(), SOURCE.name.encode()
    nvrtc.nvrtcCreateProgram(ctypes.byref(handle), source, name, 0, None, None)
    encoded = (ctypes.c_char_p * len(options))(*(o.encode() for o in options))
    if nvrtc.nvrtcCompileProgram(handle, len(options), encoded):
        log = text("nvrtcGetProgramLogSize", "nvrtcGetProgramLog")
        raise RuntimeError(f"NVRTC does not compile {SOURCE} for {of}:\n{log}")
    code = text("nvrtcGetPTXSize", "nvrtcGetPTX")
    nvrtc.nvrtcDestroyProgram(ctypes.byref(handle))
    # It uses nothing later than this, and a driver may be older than NVRTC.
    return re.sub(r"^\.version .*$", ".version 7.8", code, count=1, flags=re.M)


@cache
def _nvrtc() -> ctypes.CDLL:
    spec = importlib.util.find_spec("nvidia")
    roots = spec.submodule_search_locations if spec else []
    found = [str(f) for r in roots for f in Path(r).glob("*/lib/libnvrtc.so.*")]
    if not (name := max(found, default=None) or find_library("nvrtc")):
        raise UserError(
            "The scans' CUDA kernel is compiled by NVRTC, and there is no libnvrtc: "
            "pip install nvidia-cuda-nvrtc, which jax[cuda13] brings along."
        )
    return ctypes.CDLL(name)
