"""The tiny run, in which process 1 cannot read the weights of step 12."""

import os

import orbax.checkpoint as ocp

from tests.training import tiny_config


def get_config():
    """As tiny_config, after making one process blind."""
    if os.environ["JAX_PROCESS_ID"] == "1":
        restore = ocp.StandardCheckpointHandler.restore

        def blind(handler, directory, *args, **kwargs):
            if directory.parent.name == "12":
                raise ValueError("a block of its disk is bad")
            return restore(handler, directory, *args, **kwargs)

        ocp.StandardCheckpointHandler.restore = blind
    return tiny_config.get_config()
