"""Laws of the batches: position, coverage, and sharing between processes."""

import multiprocessing
import os
import signal
from dataclasses import replace
from itertools import islice

import numpy as np
import pytest

from sparx_jax.data import DataConfig, eval_batches, open_source, train_batches
from sparx_jax.errors import UserError

DATA = DataConfig(
    name="digits",
    decode="exact",
    image_size=16,
    crop="resized",
    crop_padding=2,
    scale=(0.2, 1.0),
    interpolation="random",
    flip=True,
    rand_augment="rand-m9-mstd0.5-inc1",
    mean=(0.5, 0.4, 0.3),
    crop_ratio=0.9,
    workers=0,
    max_bad_fraction=0.5,
)


def with_workers(workers):
    return replace(DATA, workers=workers)


class Numbered:
    """Random images whose label is their index."""

    def __init__(self, length):
        rng = np.random.default_rng(0)
        self.images = rng.integers(256, size=(length, 20, 18, 3)).astype(np.uint8)
        self.class_names = tuple(map(str, range(length)))

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        return {"image": self.images[index], "label": index}

    def name(self, index):
        return f"numbered #{index}"


def slices(batch, process_index, process_count):
    return {k: v[process_index::process_count] for k, v in batch.items()}


def take(count, *args, **kwargs):
    return list(islice(train_batches(*args, **kwargs), count))


def assert_equal(batches, others):
    for batch, other in zip(batches, others, strict=True):
        assert batch.keys() == other.keys()
        for key, value in batch.items():
            np.testing.assert_array_equal(value, other[key])


@pytest.mark.parametrize("workers, processes", [(0, 1), (3, 1), (2, 2)])
def test_position_is_a_function_of_the_step(workers, processes):
    """Resumed with other numbers of workers and hosts than it began with."""
    source, common = open_source(DATA, "train"), dict(batch_size=8, seed=3)
    batches = take(182, DATA, source, **common)[177:]  # over the end of an epoch
    share = dict(process_index=processes - 1, process_count=processes)
    resumed = take(5, with_workers(workers), source, **common, start_step=177, **share)
    assert_equal(resumed, [slices(b, **share) for b in batches])


def test_train_batches_have_the_documented_shapes_and_types():
    (batch,) = take(1, DATA, Numbered(10), batch_size=4, seed=0)
    assert {key: (v.shape, v.dtype) for key, v in batch.items()} == {
        "image": ((4, 16, 16, 3), np.uint8),
        "label": ((4,), np.int32),
        "weight": ((4,), np.float32),
    }
    assert batch["weight"].all()


def test_every_epoch_covers_each_example_once():
    batches = take(5, DATA, Numbered(10), batch_size=4, seed=0)
    first, second = np.concatenate([b["label"] for b in batches]).reshape(2, 10)
    assert sorted(first) == sorted(second) == list(range(10))
    assert first.tolist() != second.tolist()  # reshuffled


def test_the_same_example_is_augmented_anew_each_epoch():
    first, second = take(2, DATA, Numbered(1), batch_size=1, seed=0)
    assert (first["image"] != second["image"]).any()


def test_another_seed_gives_another_order():
    one, other = (take(1, DATA, Numbered(50), batch_size=50, seed=s)[0] for s in (0, 1))
    assert one["label"].tolist() != other["label"].tolist()


@pytest.mark.parametrize("processes", [2, 4])
def test_hosts_see_slices_of_the_same_global_batch(processes):
    source, common = Numbered(10), dict(batch_size=8, seed=1, start_step=1)
    whole = take(3, DATA, source, **common)
    for index in range(processes):
        part = take(
            3, DATA, source, **common, process_index=index, process_count=processes
        )
        assert_equal(part, [slices(b, index, processes) for b in whole])


def test_a_split_smaller_than_the_batch_is_repeated():
    (batch,) = take(1, DATA, Numbered(3), batch_size=8, seed=0)
    assert np.bincount(batch["label"]).tolist() in ([3, 3, 2], [3, 2, 3], [2, 3, 3])


@pytest.mark.parametrize(
    "batch, processes", [(1, 1), (4, 1), (16, 1), (4, 2), (8, 2), (8, 4), (40, 4)]
)
def test_eval_counts_every_example_once(batch, processes):
    source = Numbered(12)
    parts = [
        list(
            eval_batches(
                DATA, source, batch_size=batch, process_index=i, process_count=processes
            )
        )
        for i in range(processes)
    ]
    assert {len(part) for part in parts} == {-(-12 // batch)}
    batches = [batch for part in parts for batch in part]
    assert {b["image"].shape for b in batches} == {(batch // processes, 16, 16, 3)}
    index, label, weight = (
        np.concatenate([b[key] for b in batches])
        for key in ("index", "label", "weight")
    )
    assert index.dtype == label.dtype == np.int32 and weight.dtype == np.float32
    assert sorted(index[weight == 1]) == list(range(12))
    np.testing.assert_array_equal(label[weight == 1], index[weight == 1])
    assert set(index[weight == 0]) <= {-1} and set(weight) <= {0, 1}


@pytest.mark.parametrize("batch, processes", [(0, 1), (-8, 1), (10, 4)])
def test_batch_sizes_that_cannot_be_shared_are_rejected(batch, processes):
    for batches in (lambda *a, **k: train_batches(*a, seed=0, **k), eval_batches):
        with pytest.raises(UserError, match=f"batch size is {batch} for {processes}"):
            batches(DATA, Numbered(4), batch_size=batch, process_count=processes)


def test_ctrl_c_is_for_the_trainer_and_not_for_its_workers(caplog):
    source, common = Numbered(16), dict(batch_size=4, seed=0)
    expected = list(islice(train_batches(DATA, source, **common), 12))
    batches = train_batches(with_workers(1), source, **common)
    found = [next(batches)]
    for worker in multiprocessing.active_children():
        os.kill(worker.pid, signal.SIGINT)
    found += islice(batches, 11)
    assert_equal(expected, found)
    assert "died" not in caplog.text
    batches.close()
