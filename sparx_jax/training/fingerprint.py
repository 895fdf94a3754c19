"""Fingerprints of arrays: Orbax restores a flipped bit without a word; we do not."""

import itertools
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from sparx_jax.parallel import leaf_name

Fingerprints = dict[str, list[int]]
"""By the name of the leaf."""


def fingerprints(tree: Any) -> Fingerprints:
    """Two 32-bit sums for each array of a tree: of its words, and weighted by position.

    The same on any mesh. Every process must call it with its part of the arrays.  A
    single changed word changes the first sum; swapped words change the second.
    """
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    parts = [[s for s in x.addressable_shards if not s.replica_id] for _, x in leaves]
    for part in itertools.chain.from_iterable(parts):
        part.data.copy_to_host_async()
    # On the host: a program for each shape takes XLA longer than this takes NumPy.
    sums = np.zeros((len(leaves), 2), np.uint32)
    for total, (_, array), shards in zip(sums, leaves, parts, strict=True):
        for shard in shards:
            total += _sums(np.asarray(shard.data), shard.index, array.shape)
    if jax.process_count() > 1:
        sums = multihost_utils.process_allgather(sums).sum(0, dtype=np.uint32)
    names = [leaf_name(path) for path, _ in leaves]
    return dict(zip(names, sums.tolist(), strict=True))


def differing(expected: Fingerprints, found: Fingerprints) -> list[str]:
    """The names of the leaves that are not the same on both sides."""
    names = sorted(expected.keys() | found.keys())
    return [name for name in names if expected.get(name) != found.get(name)]


def _sums(part, index, shape):
    """Of the part of an array of `shape` that stands at `index`, a slice an axis."""
    words = part.view(f"uint{8 * part.dtype.itemsize}").astype(np.uint32, copy=False)
    position = np.zeros((), np.uint32)
    for place, size in zip(index, shape, strict=True):
        here = np.arange(*place.indices(size), dtype=np.uint32)
        position = position[..., None] * np.uint32(size) + here
    # An odd factor: no bit of a word is lost.
    weighted = words * (position * np.uint32(2 * 1640531527 % 2**32) + np.uint32(1))
    return [np.sum(words, dtype=np.uint32), np.sum(weighted, dtype=np.uint32)]
