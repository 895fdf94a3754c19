"""Batches for training and evaluation, read ahead by Grain threads or processes."""

import multiprocessing
import os
import threading
from collections.abc import Callable, Iterator
from typing import Any

import grain
import numpy as np
from absl import flags
from PIL import UnidentifiedImageError

from sparx_jax.data.fast import fast_train_transform
from sparx_jax.data.sources import Source
from sparx_jax.data.transforms import decode_image, eval_transform, train_transform
from sparx_jax.errors import UserError

Batch = dict[str, np.ndarray]


def train_batches(
    data: Any,
    source: Source,
    *,
    batch_size: int,
    seed: int,
    start_step: int = 0,
    process_index: int = 0,
    process_count: int = 1,
) -> Iterator[Batch]:
    """Augmented batches without end, reshuffled each epoch.

    Batch k is a function of (seed, k) alone, whatever `start_step`, the number of
    workers, or the process count, so training resumes exactly from its step number.
    Each epoch covers each example once; an epoch may end inside of a batch.

    Args:
      data: see `train_transform`; `decode`, "exact" for pixels equal to timm's or
        "fast" (see `fast.py`); and `workers`, the number of processes that prepare
        batches, 0 for threads of this process. Workers hand batches over in /dev/shm,
        which must hold about three local batches for each of them.
      source: the examples.
      batch_size: of the global batch, over all processes.
      seed: of the order and of the augmentation.
      start_step: the first batch to yield.
      process_index: this process reads the examples process_index, process_index +
        process_count, ... of each global batch.
      process_count: number of processes that share each global batch.

    Yields:
      "image": uint8 (n, image_size, image_size, 3) and "label": int32 (n,), where n =
      batch_size / process_count.

    Raises:
      UserError: the processes cannot share the batch equally, or, while iterating, an
        image cannot be decoded.
    """
    if data.decode == "fast":
        decode, transform = fast_train_transform(data)
    else:
        decode, transform = (
            lambda image, rng: decode_image(image),
            train_transform(data),
        )

    def load(index, rng):
        image, label = _read(source, index, lambda image: decode(image, rng))
        return {"image": transform(image, rng), "label": label}

    local_size = _local_size(batch_size, process_count)
    examples = grain.MapDataset.range(len(source)).seed(seed).shuffle().repeat(None)
    # Augment before slicing: the draws then do not depend on the process count.
    examples = examples.random_map(load)[process_index::process_count]
    batches = examples.batch(local_size, drop_remainder=True)[start_step:]
    return _read_ahead(batches, data.workers)


def eval_batches(
    data: Any,
    source: Source,
    *,
    batch_size: int,
    process_index: int = 0,
    process_count: int = 1,
) -> Iterator[Batch]:
    """Each example once and in order, in equally many and large batches per process.

    Args:
      data: see `eval_transform`, and `workers` as in `train_batches`.
      source, batch_size, process_index, process_count: as in `train_batches`.

    Yields:
      "image": uint8 (n, image_size, image_size, 3), "label": int32 (n,), "weight":
      float32 (n,), and "index": int32 (n,), the position in the source. The last batch
      is filled up with black images of label 0, weight 0 and index -1.

    Raises:
      UserError: as `train_batches`.
    """
    transform = eval_transform(data)
    filler = {
        "image": np.zeros((data.image_size, data.image_size, 3), np.uint8),
        "label": np.int32(0),
        "weight": np.float32(0),
        "index": np.int32(-1),
    }

    def load(index):
        if index >= len(source):
            return filler
        image, label = _read(source, index)
        return {
            "image": transform(image),
            "label": label,
            "weight": np.float32(1),
            "index": np.int32(index),
        }

    local_size = _local_size(batch_size, process_count)
    padded_length = -(-len(source) // batch_size) * batch_size
    examples = grain.MapDataset.range(padded_length).map(load)
    batches = examples[process_index::process_count].batch(local_size)
    return _read_ahead(batches, data.workers)


def _local_size(batch_size: int, process_count: int) -> int:
    if batch_size < 1 or batch_size % process_count:
        raise UserError(
            f"The batch size is {batch_size} for {process_count} process(es): use a "
            f"positive multiple of {process_count}."
        )
    return batch_size // process_count


def _read(
    source: Source, index: int, decode: Callable[[Any], Any] = decode_image
) -> tuple[Any, np.int32]:
    try:
        example = source[index]
        return decode(example["image"]), np.int32(example["label"])
    except Exception as error:  # Pillow's decoders raise errors of every kind
        unknown = isinstance(error, UnidentifiedImageError)
        reason = "not a known image format" if unknown else error
        raise UserError(
            f"{source.name(index)} cannot be decoded ({reason}): replace or delete it."
        ) from error


def _read_ahead(batches: grain.MapDataset, workers: int) -> Iterator[Batch]:
    # An element is a whole batch, so a buffer as long as the threads are many keeps
    # them all busy; the bound keeps the memory in check on machines with many cores.
    threads = 1 if workers else min(os.cpu_count() or 1, 16)
    options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=threads)
    dataset = batches.to_iter_dataset(options)
    if workers:
        flags.FLAGS.mark_as_parsed()  # Grain reads flags, which only absl.app parses
        dataset = dataset.mp_prefetch(
            grain.MultiprocessingOptions(num_workers=workers),
            worker_init_fn=_die_with_parent,
        )
    return iter(dataset)


def _die_with_parent(worker_index: int, worker_count: int) -> None:
    # Otherwise a worker outlives a killed trainer and keeps its shared memory.
    def wait():
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()
