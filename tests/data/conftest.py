"""What timm made, see make_timm_goldens.py."""

from pathlib import Path

import numpy as np
import pytest


@pytest.fixture(scope="session")
def timm():
    with np.load(Path(__file__).parent / "goldens/timm.npz") as file:
        return dict(file)
