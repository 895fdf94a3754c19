"""Accelerators: what one of them can do, and machines of them that need not be there.

Datasheet figures.  Sources: the system-architecture pages of Cloud TPU's documentation
(docs.cloud.google.com/tpu/docs/v4, v5e, v5p, v6e); v4's links from Jouppi et al.,
arXiv:2304.01433; NVIDIA's H100 and H200 (SXM) datasheets.
"""

import os
import re
from importlib.util import find_spec
from typing import NamedTuple

import jax
from jax.experimental import topologies

from sparx_jax.errors import UserError


class Chip(NamedTuple):
    """One device; None: not known."""

    kind: str
    """How JAX calls it, or the beginning of that."""
    memory: float
    """Bytes."""
    flops: float | None = None
    """bfloat16 operations a second in matrix products."""
    bandwidth: float | None = None
    """Bytes a second to and from its memory."""
    links: float | None = None
    """Bytes a second to other chips, over all links, in one direction."""
    clock: float | None = None
    """Cycles a second; follows from `flops` and the number of 128 x 128 units."""


CHIPS = {
    "v4": Chip("TPU v4", 32 * 2**30, 275e12, 1200e9, 300e9, 1.05e9),
    "v5e": Chip("TPU v5 lite", 16 * 2**30, 197e12, 819e9, 200e9, 1.5e9),
    "v5p": Chip("TPU v5", 95e9, 459e12, 2765e9, 600e9, 1.75e9),
    "v6e": Chip("TPU v6 lite", 32e9, 918e12, 1638e9, 400e9),
    "h100": Chip("NVIDIA H100", 80e9, 989e12, 3350e9, 450e9),
    "h200": Chip("NVIDIA H200", 141e9, 989e12, 4800e9, 450e9),
}

HERE = "here"
KNOWN = (
    "v5e:16x16 (v6e likewise: 1x1, 2x2, 2x4, 4x4, 4x8, 8x8, 8x16, 16x16), v4:2x2x4 "
    "(v5p likewise: 2x2x1, 2x2x2, 2x2x4, 2x4x4, 4x4x4, 4x4x8 and so on), h100:8 or "
    "h200:8 (that many GPUs), and here (the devices of this machine)"
)

# What XLA must know of a Hopper GPU; the two differ in their memory alone.
HOPPER = """
gpu_device_info {{
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: 49152
  shared_memory_per_core: 233472
  shared_memory_per_block_optin: 232448
  threads_per_core_limit: 2048
  core_count: 132
  fpus_per_core: 128
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
  clock_rate_ghz: 1.98
  l2_cache_size: 52428800
  memory_bandwidth: {bandwidth:.0f}
  device_memory_size: {memory:.0f}
  cuda_compute_capability {{ major: 9 }}
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 10 }}
runtime_version {{ major: 13 minor: 0 }}
device_description_str: "{kind}"
"""


def find_devices(topology: str) -> tuple[list[jax.Device], Chip]:
    """The devices of `topology`, such as "v5e:16x16", and what one of them can do.

    All but "here" exist for the compiler alone: nothing can run on them.  For them
    this must be called before JAX has looked for devices: it then looks for a CPU only.

    Raises UserError on an unknown name, or if its compiler is not installed.
    """
    if topology == HERE:
        devices = jax.devices()
        return devices, _chip_of(devices[0], len(devices))
    name, _, shape = topology.partition(":")
    if name not in CHIPS or not re.fullmatch(r"\d+(x\d+)*", shape):
        raise UserError(f"--topology={topology} is not known; there are {KNOWN}.")
    jax.config.update("jax_platforms", "cpu")  # what else is here may be busy
    chip, version = CHIPS[name], jax.__version__
    if chip.kind.startswith("NVIDIA"):
        _require("jax_plugins", topology, f"jax-cuda13-plugin=={version}")
        config = HOPPER.format(**chip._asdict())
        options = dict(platform="cuda", target_config=config, topology=f"1x1x{shape}")
    else:
        _require("libtpu", topology, f"jax[tpu]=={version}")
        # The cloud's metadata and the lock of the chips are for those who have any.
        os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
        os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
        os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
        options = dict(platform="tpu", topology_name=topology)
        if name == "v4":  # one device a chip, as on a real one; by default it is two
            options["chip_config_name"] = "megacore"
    try:
        return list(topologies.get_topology_desc(**options).devices), chip
    except jax.errors.JaxRuntimeError as error:
        raise UserError(
            f"--topology={topology} does not exist ({error}); there are {KNOWN}."
        ) from error


def _require(module, topology, package):
    if find_spec(module) is None:
        raise UserError(
            f"--topology={topology} needs the compiler for it, though no such device: "
            f'pip install "{package}".'
        )


def _chip_of(device, count):
    """By name, longest first: "TPU v5 lite" begins like "TPU v5"."""
    chips = sorted(CHIPS.values(), key=lambda chip: -len(chip.kind))
    for chip in chips:
        if device.device_kind.startswith(chip.kind):
            break
    else:
        memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / count
        chip = Chip(device.device_kind, memory)
    stats = device.memory_stats() or {}  # a CPU keeps none
    return chip._replace(memory=stats.get("bytes_limit", chip.memory))
