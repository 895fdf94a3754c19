"""Batches for training and evaluation, read ahead by Grain threads or processes.

What cannot be read never stops or shifts the batches: such an example is a plain
image of weight 0, its name goes to the log, and only where too many of the split are
bad does the run stop.  A worker process that dies is replaced at the same batch.
"""

import multiprocessing
import os
import re
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from multiprocessing import popen_spawn_posix, shared_memory, util
from typing import Any

import grain
import numpy as np
from absl import flags, logging
from PIL import UnidentifiedImageError

from sparx_jax.data.config import DataConfig
from sparx_jax.data.fast import fast_train_transform
from sparx_jax.data.sources import Source
from sparx_jax.data.transforms import (
    decode_image,
    eval_transform,
    mean_color,
    train_transform,
)
from sparx_jax.errors import BadDataError, TooManyUnreadableError, UserError

Batch = dict[str, np.ndarray]

UNREADABLE = -1
"""The label of an example that cannot be read."""


def train_batches(
    data: DataConfig,
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
      data: see `train_transform` or, where `decode` is "fast", `fast.py`. Its `workers`
        hand batches over in /dev/shm, which must hold about three local batches for
        each of them.
      source: the examples.
      batch_size: of the global batch, over all processes.
      seed: of the order and of the augmentation.
      start_step: the first batch to yield.
      process_index: this process reads the examples process_index, process_index +
        process_count, ... of each global batch.
      process_count: number of processes that share each global batch.

    Yields:
      "image": uint8 (n, image_size, image_size, 3), "label": int32 (n,) and "weight":
      float32 (n,), where n = batch_size / process_count. An example that cannot be
      read has the mean colour, label -1 and weight 0; all others have weight 1.

    Raises:
      UserError: the processes cannot share the batch equally.
      BadDataError: while iterating: too many examples are unreadable, where several
        processes read for the caller to find, or a worker has died twice at the same
        batch.
    """
    if data.decode == "fast":
        decode, transform = fast_train_transform(data)
    else:
        decode, transform = (
            lambda image, rng: decode_image(image),
            train_transform(data),
        )

    blank = _blank(data)

    def load(index, rng):
        return _read(source, index, lambda x: transform(decode(x, rng), rng), blank)

    local_size = _local_size(batch_size, process_count)
    examples = grain.MapDataset.range(len(source)).seed(seed).shuffle().repeat(None)
    # Augment before slicing: the draws then do not depend on the process count.
    examples = examples.random_map(load)[process_index::process_count]
    batches = examples.batch(local_size, drop_remainder=True)[start_step:]
    for_training = ("image", "label", "weight")
    return (
        {key: batch[key] for key in for_training}
        for batch in _checked(batches, data, source, process_count)
    )


def eval_batches(
    data: DataConfig,
    source: Source,
    *,
    batch_size: int,
    process_index: int = 0,
    process_count: int = 1,
) -> Iterator[Batch]:
    """Each example once and in order, in equally many and large batches per process.

    Args:
      data: see `eval_transform`.
      source, batch_size, process_index, process_count: as in `train_batches`.

    Yields:
      "image": uint8 (n, image_size, image_size, 3), "label": int32 (n,), "weight":
      float32 (n,), and "index": int32 (n,), the position in the source. Unreadable
      examples are as in `train_batches`. The last batch is filled up with plain images
      of label 0, weight 0 and index -1.

    Raises:
      UserError: as `train_batches`.
    """
    transform, blank = eval_transform(data), _blank(data)
    filler = _example(blank, 0, weight=0, index=-1)

    def load(index):
        if index >= len(source):
            return filler
        return _read(source, index, lambda x: transform(decode_image(x)), blank)

    local_size = _local_size(batch_size, process_count)
    padded_length = -(-len(source) // batch_size) * batch_size
    examples = grain.MapDataset.range(padded_length).map(load)
    batches = examples[process_index::process_count].batch(local_size)
    return _checked(batches, data, source, process_count)


def _local_size(batch_size: int, process_count: int) -> int:
    if batch_size < 1 or batch_size % process_count:
        raise UserError(
            f"The batch size is {batch_size} for {process_count} process(es): use a "
            f"positive multiple of {process_count}."
        )
    return batch_size // process_count


def _blank(data):
    shape = (data.image_size, data.image_size, 3)
    return np.broadcast_to(np.array(mean_color(data), np.uint8), shape)


def _example(image, label, weight, index, reason=""):
    return {
        "image": image,
        "label": np.int32(label),
        "weight": np.float32(weight),
        "index": np.int32(index),
        "reason": np.array(reason, "U200"),  # why it is unreadable; of fixed width
    }


def _read(
    source: Source, index: int, prepare: Callable[[Any], np.ndarray], blank: np.ndarray
) -> dict[str, Any]:
    # An exception would end Grain's worker, and with it all that it had yet to read.
    try:
        example = source[index]
        label, classes = example["label"], len(source.class_names)
        if label < 0:  # TFDS's for the labels that nobody has published
            raise ValueError("it has no label")
        if label >= classes:  # the loss would be 0
            raise ValueError(f"label {label} is none of the {classes} classes, from 0")
        return _example(prepare(example["image"]), label, 1, index)
    except Exception as error:  # Pillow's decoders raise errors of every kind
        unknown = isinstance(error, UnidentifiedImageError)
        reason = str(error) or type(error).__name__
        reason = "not a known image format" if unknown else reason
        return _example(blank, UNREADABLE, 0, index, reason)


def too_many_unreadable(
    count: int, source: Source, data: DataConfig, names: str = "the logs name them"
) -> TooManyUnreadableError | None:
    """An error if `count` unreadable examples are more than `data` allows."""
    if count <= data.max_bad_fraction * len(source):
        return None
    return TooManyUnreadableError(
        f"{count} of {len(source)} examples cannot be read, more than "
        f"data.max_bad_fraction={data.max_bad_fraction} allows: {names}; replace or "
        "delete them."
    )


def _checked(
    batches: grain.MapDataset, data: DataConfig, source: Source, process_count: int
) -> Iterator[Batch]:
    """The batches; logs each unreadable example once, stops at too many of them."""
    bad = {}  # why, by index
    for batch in _read_ahead(batches, data.workers):
        reasons = batch.pop("reason")
        for row in np.flatnonzero(reasons):
            index = int(batch["index"][row])
            if index in bad:
                continue
            bad[index] = f"{source.name(index)} ({reasons[row]})"
            logging.error("unreadable, left out with weight 0: %s", bad[index])
        names = ", ".join(list(bad.values())[:5])
        error = too_many_unreadable(len(bad), source, data, names)
        if error and process_count == 1:  # several have to stop together
            raise error
        yield batch


def _read_ahead(batches: grain.MapDataset, workers: int) -> Iterator[Batch]:
    """The batches in order, prepared ahead; dead worker processes are replaced."""
    position, died_at = 0, None
    while True:
        prepared = _start(batches[position:], workers)
        try:
            for batch in prepared:
                _unlink(batch)
                yield batch
                position += 1
            return
        except RuntimeError as error:
            if "was terminated unexpectedly" not in str(error):  # Grain's own words
                raise
            exit_code = str(error).partition("exit code ")[2].partition(".")[0]
            if died_at == position:
                raise BadDataError(
                    "A data worker died twice at the same batch (exit code "
                    f"{exit_code}): if memory is short, lower data.workers; if a "
                    "image crashes the decoder, set data.workers=0 to see where."
                ) from error
            died_at = position
            logging.error("a data worker died (exit code %s): restarting", exit_code)
        finally:
            prepared.close()


def _unlink(batch):
    """Takes away the names of its shared memory, which lasts as long as its arrays.

    Or what a program still holds at its end would be told as leaked.
    """
    for array in batch.values():
        if shm := getattr(array, "shm", None):
            shm.unlink()
            array._unlink_on_del = False


def _start(batches: grain.MapDataset, workers: int) -> grain.DatasetIterator:
    # An element is a whole batch, so a buffer as long as the threads are many keeps
    # them all busy; the bound keeps the memory in check on machines with many cores.
    threads = 1 if workers else min(os.cpu_count() or 1, 16)
    options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=threads)
    dataset = batches.to_iter_dataset(options)
    if workers:
        flags.FLAGS.mark_as_parsed()  # Grain reads flags, which only absl.app parses
        popen_spawn_posix.Popen, util.spawnv_passfds = _Popen, _spawn
        dataset = dataset.mp_prefetch(
            grain.MultiprocessingOptions(num_workers=workers),
            worker_init_fn=_die_with_parent,
        )
    return iter(dataset)


class _Popen(popen_spawn_posix.Popen):
    """A process that may die while it is sent its work: later that is noticed."""

    def _launch(self, process):
        with suppress(BrokenPipeError):
            super()._launch(process)


def _spawn(path, args, passfds, *, spawn=util.spawnv_passfds):
    """Starts a process as Python does, and lets go of its end of their pipe.

    Python would hold that while it writes there, and so wait forever for a process
    that has died.
    """
    pid = spawn(path, args, passfds)
    handle = re.search(r"pipe_handle=(\d+)", " ".join(map(os.fsdecode, args)))
    if handle:  # not that of the resource tracker; Python will close what is there
        with open(os.devnull) as nothing:
            os.dup2(nothing.fileno(), int(handle[1]), inheritable=False)
    return pid


def _die_with_parent(worker_index: int, worker_count: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the trainer
    # Otherwise a worker outlives a killed trainer and keeps its shared memory.  Not
    # between making some and telling Python's resource tracker, which would remove it.
    make, making = shared_memory.SharedMemory.__init__, threading.Lock()

    def make_whole(*args, **kwargs):
        with making:
            make(*args, **kwargs)

    def wait():
        multiprocessing.parent_process().join()
        with making:
            os._exit(1)

    shared_memory.SharedMemory.__init__ = make_whole
    threading.Thread(target=wait, daemon=True).start()
