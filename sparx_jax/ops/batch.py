"""Functions that every device applies to its own part of the batch."""

from collections.abc import Callable
from functools import wraps
from typing import Any

import jax
from jax import lax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P


def batch_on(mesh: Mesh, function: Callable) -> Callable:
    """`function`, to be compiled, whose batches are split over all of `mesh`.

    It also tells for which devices: the default backend is wrong ahead of time.
    """

    @wraps(getattr(function, "func", function))  # a partial has no name
    def inside(*args):
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return function(*args)

    return inside


def _named():
    """The devices that `batch_on` names, if it does."""
    mesh = jax.sharding.get_abstract_mesh()
    return None if mesh.empty else mesh.abstract_device


def target_kind() -> str:
    """JAX's name of the devices that `batch_on` names, or else of the default ones."""
    return (_named() or jax.devices()[0]).device_kind


def by_platform(*args: Any, default: Callable, **branches: Callable) -> Any:
    """`lax.platform_dependent`, but traces one branch alone where `batch_on` names it.

    Half of the tracing of a training step was for other platforms than its own.
    """
    maker = getattr(_named(), "device_kind", "").split(" ")[0]
    platform = {"cpu": "cpu", "TPU": "tpu", "NVIDIA": "cuda"}.get(maker)
    if platform is None:
        return lax.platform_dependent(*args, default=default, **branches)
    return branches.get(platform, default)(*args)


def shard_batch(function: Callable, inputs: str, outputs: str) -> Callable:
    """`function`, called on each device's part of the batch.

    XLA cannot split a loop over the batch or a hand-written kernel by itself: it would
    gather the whole batch on every device.  Does nothing where neither `batch_on` nor
    `jax.set_mesh` named a mesh of several devices which the batch divides among, or
    inside of a shard_map, whose batch is a part already.

    Args:
      function: of arrays.
      inputs: a letter for each of them: "b" if its first axis is the batch, "." if
        every device has all of it.
      outputs: the same for the results, and "+" for a sum over the batch.
    """

    def whole(*arrays: Any) -> Any:
        mesh = jax.sharding.get_abstract_mesh()
        batches = (x for x, kind in zip(arrays, inputs, strict=True) if kind == "b")
        if mesh.empty or mesh.size == 1 or mesh.manual_axes:
            return function(*arrays)
        if any(x.shape[0] % mesh.size for x in batches):
            return function(*arrays)
        axes = mesh.axis_names
        specs = {"b": P(axes), ".": P(), "+": P()}

        def part(*arrays):
            results = function(*arrays)
            if len(outputs) == 1:
                results = (results,)
            return tuple(
                lax.psum(result, axes) if kind == "+" else result
                for kind, result in zip(outputs, results, strict=True)
            )

        results = jax.shard_map(
            part,
            in_specs=tuple(specs[kind] for kind in inputs),
            out_specs=tuple(specs[kind] for kind in outputs),
            check_vma=False,
        )(*arrays)
        return results if len(outputs) > 1 else results[0]

    return whole
