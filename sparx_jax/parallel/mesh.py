"""The mesh of devices: batches split over all of it, weights copied or split.

Axis `data` holds copies of the weights, axis `fsdp` splits the large ones.  One device
is a mesh of one; nothing else in the package knows how many there are.
"""

import math
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from sparx_jax.errors import UserError

AXES = ("data", "fsdp")
# Smaller arrays are copied to every device: splitting them saves nothing.
MIN_SPLIT_SIZE = 2**16


def make_mesh(data: int = -1, fsdp: int = 1) -> Mesh:
    """A mesh over all devices of all processes; -1 stands for "the rest".

    Raises UserError if data * fsdp is not the number of devices: a smaller mesh would
    leave devices idle without a word.
    """
    count = jax.device_count()
    sizes = {"data": data, "fsdp": fsdp}
    known = math.prod(size for size in sizes.values() if size != -1)
    if list(sizes.values()).count(-1) == 1 and known and count % known == 0:
        sizes = {k: count // known if v == -1 else v for k, v in sizes.items()}
    if min(sizes.values()) < 1 or math.prod(sizes.values()) != count:
        raise UserError(
            f"mesh data={data}, fsdp={fsdp} does not fit {count} device(s): their "
            "product must be that number; -1 for one of them means the rest."
        )
    return jax.make_mesh(
        tuple(sizes.values()), AXES, axis_types=(AxisType.Auto,) * len(AXES)
    )


def replicated(mesh: Mesh) -> NamedSharding:
    """Every device holds the whole array."""
    return NamedSharding(mesh, P())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """The first axis is split over all devices."""
    return NamedSharding(mesh, P(AXES))


def put_batch(batch: dict[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """Global arrays from the part of a batch that this process has read."""
    sharding = batch_sharding(mesh)
    return {
        key: jax.make_array_from_process_local_data(sharding, value)
        for key, value in batch.items()
    }


def state_shardings(abstract_state: Any, mesh: Mesh) -> Any:
    """Shardings for a tree of arrays or `ShapeDtypeStruct`s.

    Arrays of at least `MIN_SPLIT_SIZE` elements are split over `fsdp` along their
    largest axis that it divides.  Moments and averages have the shapes of their
    parameters and so lie beside them.
    """
    parts = mesh.shape["fsdp"]

    def sharding(leaf):
        axes = [axis for axis, size in enumerate(leaf.shape) if size % parts == 0]
        if parts == 1 or math.prod(leaf.shape) < MIN_SPLIT_SIZE or not axes:
            return replicated(mesh)
        split = max(axes, key=lambda axis: leaf.shape[axis])
        return NamedSharding(mesh, P(*[None] * split, "fsdp"))

    return jax.tree.map(sharding, abstract_state)
