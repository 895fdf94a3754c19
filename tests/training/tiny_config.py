"""The tiny run as a config file, for tests that start and kill real processes."""

from tests.training.conftest import tiny_settings


def get_config():
    """12 steps, evaluations after 4, 8 and 12."""
    return tiny_settings()
