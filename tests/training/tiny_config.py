"""The tiny run as a config file, for tests that start and kill real processes."""

from tests.training.conftest import tiny_settings


def get_config():
    """12 steps with evaluations after 4, 8 and 12, each of 15 batches.

    Window attention, since XLA compiles it soonest.  Adam divides gradients that are
    only rounding by themselves; the epsilon lets them stay rounding on every mesh.
    """
    return tiny_settings(
        **{
            "model.name": "sparx_swin_nano",
            "model.dims": (8, 8, 8, 16),
            "model.head_dim": 8,
            "model.drop_path_rate": 0.0,
            "eval_batch_size": 24,
            "optimizer.eps": 1e-3,
        }
    )
