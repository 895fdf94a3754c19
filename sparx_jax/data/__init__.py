"""Host-side data: sources of labelled images, transforms, and batches (no JAX)."""

from sparx_jax.data.config import DataConfig
from sparx_jax.data.eval_sets import EVAL_SETS, EvalSet, open_eval_set
from sparx_jax.data.pipeline import (
    UNREADABLE,
    eval_batches,
    too_many_unreadable,
    train_batches,
)
from sparx_jax.data.sources import Source, open_source
from sparx_jax.data.transforms import decode_image, eval_transform, train_transform

__all__ = [
    "EVAL_SETS",
    "UNREADABLE",
    "DataConfig",
    "EvalSet",
    "Source",
    "decode_image",
    "eval_batches",
    "eval_transform",
    "open_eval_set",
    "open_source",
    "too_many_unreadable",
    "train_batches",
    "train_transform",
]
