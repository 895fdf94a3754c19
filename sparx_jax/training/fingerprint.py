"""Fingerprints of arrays: Orbax restores a flipped bit without a word; we do not."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sparx_jax.parallel import leaf_name

Fingerprints = dict[str, list[int]]
"""By the name of the leaf."""


def fingerprints(tree: Any) -> Fingerprints:
    """Two 32-bit sums for each array of a tree: of its words, and weighted by position.

    The same on any mesh. Every process must call it with its part of the arrays.  A
    single changed word changes the first sum; swapped words change the second.
    """
    # One small program for each shape: one for the whole tree takes XLA much longer.
    sums = jax.tree.map(_sums, tree)
    found = jax.tree_util.tree_leaves_with_path(jax.device_get(sums))
    return {leaf_name(path): [int(n) for n in pair] for path, pair in found}


def differing(expected: Fingerprints, found: Fingerprints) -> list[str]:
    """The names of the leaves that are not the same on both sides."""
    names = sorted(expected.keys() | found.keys())
    return [name for name in names if expected.get(name) != found.get(name)]


@jax.jit
def _sums(array):
    width = array.dtype.itemsize
    words = jax.lax.bitcast_convert_type(array, f"uint{8 * width}")
    words = words.astype(jnp.uint32)
    position = jnp.zeros(array.shape, jnp.uint32)
    for axis, size in enumerate(array.shape):
        position = position * np.uint32(size) + jax.lax.broadcasted_iota(
            jnp.uint32, array.shape, axis
        )
    # An odd factor: no bit of a word is lost.
    weighted = words * (2 * position * np.uint32(1640531527) + 1)
    return jnp.stack([jnp.sum(words), jnp.sum(weighted)])
