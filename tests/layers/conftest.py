"""What the tests of several layers share."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx


@pytest.fixture(scope="session")
def randomised():
    """Gives all variables of a layer unit size: initial ones would hide mistakes."""

    def randomise(layer, seed=5):
        rng = np.random.default_rng(seed)
        for _, variable in nnx.to_flat_state(nnx.state(layer)):
            shape = variable.shape
            value = rng.standard_normal(shape) / math.sqrt(math.prod(shape[:-1]))
            if isinstance(variable, nnx.BatchStat):
                value = np.exp(value)  # variances are positive
            variable.set_value(jnp.asarray(value, jnp.float32))
        return layer

    return randomise


@pytest.fixture(scope="session")
def compiled():
    """Calls a layer, or a function of a layer, compiled: op by op takes longer."""

    def run(layer, *args, function=None):
        function = function or type(layer).__call__
        graphdef, state = nnx.split(layer)
        call = jax.jit(lambda state, *args: function(nnx.merge(graphdef, state), *args))
        return call(state, *args)

    return run
