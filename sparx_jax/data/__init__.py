"""Host-side data: sources of labelled images, transforms, and batches (no JAX)."""

from sparx_jax.data.pipeline import UNREADABLE, eval_batches, train_batches
from sparx_jax.data.sources import Source, open_source
from sparx_jax.data.transforms import decode_image, eval_transform, train_transform

__all__ = [
    "UNREADABLE",
    "Source",
    "decode_image",
    "eval_batches",
    "eval_transform",
    "open_source",
    "train_batches",
    "train_transform",
]
