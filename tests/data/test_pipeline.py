"""Laws of the batches: position, coverage, sharing between processes, and errors."""

import io
import os
import signal
import subprocess
import sys
from contextlib import suppress
from itertools import islice
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from sparx_jax.data import eval_batches, open_source, train_batches
from sparx_jax.errors import UserError

DATA = SimpleNamespace(
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
)


def with_workers(workers):
    return SimpleNamespace(**vars(DATA) | {"workers": workers})


class Numbered:
    """Random images whose label is their index."""

    def __init__(self, length):
        rng = np.random.default_rng(0)
        self.images = rng.integers(256, size=(length, 20, 18, 3)).astype(np.uint8)

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        return {"image": self.images[index], "label": index}

    def name(self, index):
        return f"numbered #{index}"


def folder_of_one(root, content):
    path = root / "train" / "cat" / "0.png"
    path.parent.mkdir(parents=True)
    path.write_bytes(content)
    return open_source(SimpleNamespace(name="folder", root=str(root)), "train")


def encode(pixels):
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


PNG = encode(Numbered(1).images[0])


def take(count, *args, **kwargs):
    return list(islice(train_batches(*args, **kwargs), count))


def assert_equal(batches, others):
    for batch, other in zip(batches, others, strict=True):
        assert batch.keys() == other.keys()
        for key, value in batch.items():
            np.testing.assert_array_equal(value, other[key])


@pytest.mark.parametrize("workers", [0, 2])
def test_position_is_a_function_of_the_step(workers):
    source = open_source(DATA, "train")
    batches = take(200, DATA, source, batch_size=8, seed=3)
    data = with_workers(workers)
    resumed = take(5, data, source, batch_size=8, seed=3, start_step=177)
    assert_equal(resumed, batches[177:182])  # across the end of the first epoch


def test_train_batches_have_the_documented_shapes_and_types():
    (batch,) = take(1, DATA, Numbered(10), batch_size=4, seed=0)
    assert {key: (v.shape, v.dtype) for key, v in batch.items()} == {
        "image": ((4, 16, 16, 3), np.uint8),
        "label": ((4,), np.int32),
    }


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
        assert_equal(
            part, [{k: v[index::processes] for k, v in b.items()} for b in whole]
        )


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


@pytest.mark.parametrize(
    "workers, content, reason",
    [
        (0, b"no image", "not a known image format"),
        (0, PNG[:300], "truncated"),
        (1, PNG[:300], "truncated"),
    ],
)
def test_an_image_that_cannot_be_decoded_is_named(tmp_path, workers, content, reason):
    source = folder_of_one(tmp_path, content)
    message = rf"cat/0\.png cannot be decoded \(.*{reason}.*\): replace or delete it"
    with pytest.raises(UserError, match=message):
        next(train_batches(with_workers(workers), source, batch_size=2, seed=0))


TRAINER = """
import sys, time
from types import SimpleNamespace
from sparx_jax.data import open_source, train_batches
if __name__ == "__main__":
    data = SimpleNamespace(name="folder", root=sys.argv[1], image_size=16, flip=True,
        decode="exact",
        crop="padded", crop_padding=2, scale=(0.2, 1.0), interpolation="bicubic",
        rand_augment="", mean=(0.5, 0.5, 0.5), workers=2)
    batches = train_batches(data, open_source(data, "train"), batch_size=8, seed=0)
    next(batches), next(batches)
    print("ready", flush=True)
    time.sleep(60)
"""


def test_workers_die_with_a_killed_trainer(tmp_path):
    folder_of_one(tmp_path, PNG)
    trainer = subprocess.Popen(
        [sys.executable, "-c", TRAINER, str(tmp_path)],
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        start_new_session=True,
    )
    try:
        assert trainer.stdout.readline() == b"ready\n"
        trainer.kill()
        # The workers share the pipe, so it ends only when they have.
        trainer.communicate(timeout=10)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(trainer.pid, signal.SIGKILL)
