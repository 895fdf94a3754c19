"""The mesh of devices: batches split over all of it, weights copied or split.

Axis `data` holds copies of the weights, axis `fsdp` splits the large ones.  One device
is a mesh of one; nothing else in the package knows how many there are.
"""

import math
import re
from collections.abc import Sequence
from typing import Any, Literal

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from sparx_jax.errors import UserError

AXES = ("data", "fsdp")
# (pattern of an array's path in the training state, how it lies on the mesh); the
# first match counts.  Averages and moments lie as their parameter does.
RULES: tuple[tuple[str, Literal["split", "copy"]], ...] = (
    (r"\.(kernel|\w+_proj)$", "split"),
    (r"", "copy"),
)
# Smaller arrays are copied to every device: splitting them saves nothing.
MIN_SPLIT_SIZE = 2**16


def make_mesh(
    data: int = -1, fsdp: int = 1, devices: Sequence[jax.Device] | None = None
) -> Mesh:
    """A mesh over `devices`, or all of all processes; -1 stands for "the rest".

    Raises UserError if data * fsdp is not the number of devices: a smaller mesh would
    leave devices idle without a word.
    """
    count = jax.device_count() if devices is None else len(devices)
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
        tuple(sizes.values()),
        AXES,
        axis_types=(AxisType.Auto,) * len(AXES),
        devices=devices,
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


def state_shardings(
    tree: Any, mesh: Mesh, rules: Sequence[tuple[str, str]] = RULES
) -> Any:
    """Shardings for a tree of arrays or `ShapeDtypeStruct`s, by its leaves' names.

    A leaf that the rules call "split" and that has at least `MIN_SPLIT_SIZE` elements
    is split over `fsdp` along its largest axis that it divides.

    Raises ValueError if no rule matches a leaf.
    """
    parts = mesh.shape["fsdp"]

    def sharding(path, leaf):
        name = leaf_name(path)
        rule = next((how for p, how in rules if re.search(p, name)), None)
        if rule is None:
            raise ValueError(f"no sharding rule matches {name!r}: add one")
        axes = [axis for axis, size in enumerate(leaf.shape) if size % parts == 0]
        small = math.prod(leaf.shape) < MIN_SPLIT_SIZE
        if rule == "copy" or parts == 1 or small or not axes:
            return replicated(mesh)
        split = max(axes, key=lambda axis: leaf.shape[axis])
        return NamedSharding(mesh, P(*[None] * split, "fsdp"))

    return jax.tree_util.tree_map_with_path(sharding, tree)


def leaf_name(path: tuple) -> str:
    """A leaf's place in a tree, such as "weights/params/stem.conv.kernel"."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def check_rules(tree: Any, rules: Sequence[tuple[str, str]] = RULES) -> None:
    """Raises ValueError if a rule is the first match of no leaf: it would mislead."""
    paths = jax.tree_util.tree_leaves_with_path(tree)
    names = [leaf_name(path) for path, _ in paths]
    first = {next((p for p, _ in rules if re.search(p, n)), None) for n in names}
    for pattern, how in rules:
        if pattern not in first:
            raise ValueError(
                f"sharding rule {pattern!r} ({how}) matches no array of the training "
                "state, or earlier rules match all that it would: remove or move it"
            )
