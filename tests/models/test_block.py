"""One layer of a backbone: the order of its parts, and what reaches each."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from sparx_jax.models.block import Block
from sparx_jax.ops import depthwise_conv

# float32 sums in another order.
TOLERANCE = dict(rtol=1e-5, atol=1e-5)

DIM = 6


class Project(nnx.Module):
    """Stands in for the input projection: what it reads can be told from its output."""

    def __call__(self, x, context=None):
        return 2 * x if context is None else 2 * x + context.sum(-1, keepdims=True)


class Mixer(nnx.Module):
    def __call__(self, x):
        return jnp.tanh(x[:, ::-1])


def build(scaled_residual, drop_path=0.0):
    block = Block(
        DIM,
        project=Project(),
        mixer=Mixer(),
        mlp_dim=8,
        drop_path=drop_path,
        scaled_residual=scaled_residual,
        dtype=jnp.dtype("float32"),
        rngs=nnx.Rngs(0),
    )
    rng = np.random.default_rng(1)
    for _, variable in nnx.to_flat_state(nnx.state(block)):
        value = rng.standard_normal(variable.shape)
        variable.set_value(jnp.asarray(value, jnp.float32))
    return block


def draw(channels=DIM, seed=0):
    x = np.random.default_rng(seed).standard_normal((16, 4, 3, channels))
    return jnp.asarray(x, jnp.float32)


def position(block, x):
    layer = block.position
    return depthwise_conv(x, layer.kernel[...], layer.bias[...])


def affine(layer, x):
    return x if layer is None else x * layer.scale[...] + layer.bias[...]


@pytest.mark.parametrize("with_context", [False, True])
@pytest.mark.parametrize("scaled_residual", [False, True])
def test_parts_follow_each_other_as_in_the_paper(scaled_residual, with_context):
    """Position, then mixer and MLP behind a norm each; the residual path is scaled."""
    block, x = build(scaled_residual), draw()
    context = (draw(seed=1), draw(seed=2)) if with_context else ()
    assert (block.mixer_residual is not None) == scaled_residual

    h = x + position(block, x)
    projected = 2 * block.mixer_norm(h)
    if context:  # the maps side by side, as they are: normalised by the aggregator
        projected += sum(context).sum(-1, keepdims=True)
    h = affine(block.mixer_residual, h) + jnp.tanh(projected[:, ::-1])
    h = affine(block.mlp_residual, h) + block.mlp(block.mlp_norm(h))
    np.testing.assert_allclose(block(x, context), h, **TOLERANCE)


def test_both_branches_are_dropped_independently_and_the_residual_never():
    block, x = build(True, drop_path=0.5), draw()
    block.train()
    h = x + position(block, x)
    mixed = 2 * jnp.tanh(2 * block.mixer_norm(h)[:, ::-1])
    draws = jax.random.uniform(jax.random.key(3), (2, len(x)))
    fates = []
    for picture, got in enumerate(block(x, (), draws)):
        for fate in np.ndindex(2, 2):
            y = affine(block.mixer_residual, h[picture]) + fate[0] * mixed[picture]
            branch = 2 * block.mlp(block.mlp_norm(y[None]))[0]
            y = affine(block.mlp_residual, y) + fate[1] * branch
            if np.allclose(got, y, **TOLERANCE):
                fates.append(fate)
    assert len(fates) == len(x), "a picture met none of the four fates"
    assert len(set(fates)) == 4
