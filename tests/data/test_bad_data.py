"""Laws of what cannot be read: it counts nowhere, is named, and moves nothing else."""

import io
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import replace
from functools import partial
from itertools import islice
from multiprocessing import util
from pathlib import Path

import numpy as np
import pytest
from array_record.python.array_record_data_source import ArrayRecordDataSource
from array_record.python.array_record_module import ArrayRecordWriter
from PIL import Image

from sparx_jax.data import eval_batches, pipeline, train_batches
from sparx_jax.errors import BadDataError
from tests.data.test_pipeline import DATA, Numbered, assert_equal, with_workers

COLOUR = (200, 80, 40)
PLAIN = (128, 102, 76)  # DATA.mean in grey levels


def encode(pixels, format="PNG", mode="RGB", **options):
    image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    buffer = io.BytesIO()
    image.convert(mode).save(buffer, format, **options)
    return buffer.getvalue()


def flat(colour, size=(24, 20)):
    return Image.new("RGB", size, colour)


NOISE = encode(Numbered(1).images[0], "JPEG")
DEEP = Image.fromarray(np.full((20, 24), 150 << 8 | 77, np.uint16))
GREY = (150, 150, 150)

# Content of a file and its colour, None if it is unreadable.
FILES = {
    "truncated": (NOISE[: len(NOISE) // 2], None),
    "empty": (b"", None),
    "zeros": (bytes(500), None),
    "text": (b"<html>Not found</html>", None),
    "damaged": (NOISE[:400] + bytes(60) + NOISE[460:], None),
    "too narrow": (encode(flat(COLOUR, (1, 60_000)), "JPEG"), None),
    "JPEG": (encode(flat(COLOUR), "JPEG", quality=95), COLOUR),
    "PNG": (encode(flat(COLOUR)), COLOUR),
    "GIF": (encode(flat(COLOUR), "GIF"), COLOUR),
    "WebP": (encode(flat(COLOUR), "WEBP", lossless=True), COLOUR),
    "palette": (encode(flat(COLOUR).quantize(4), mode="P"), COLOUR),
    "transparent": (encode(flat(COLOUR), mode="RGBA"), COLOUR),
    "CMYK": (encode(flat(COLOUR), "JPEG", mode="CMYK", quality=95), COLOUR),
    "grey": (encode(flat(GREY), "JPEG", mode="L"), GREY),
    "grey of 16 bits": (encode(DEEP, mode="I;16"), GREY),
    "one pixel": (encode(flat(COLOUR, (1, 1))), COLOUR),
    "huge": (encode(Image.new("L", (10_000, 10_000), 150), mode="L"), GREY),
}


class Files:
    """Encoded images in memory; the label is the index."""

    class_names = tuple(map(str, range(50)))

    def __init__(self, *contents):
        self.contents = contents

    def __len__(self):
        return len(self.contents)

    def __getitem__(self, index):
        return {"image": self.contents[index], "label": index}

    def name(self, index):
        return f"{index}.JPEG"


def tolerant(**changes):
    return replace(DATA, **{"max_bad_fraction": 0.99} | changes)


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("crop", ["resized", "padded"])
def test_every_kind_of_file_is_read_or_counts_nowhere(crop, caplog):
    """Whatever the name's ending says."""
    contents, colours = zip(*FILES.values(), strict=True)
    data, source = tolerant(crop=crop, image_size=64), Files(*contents)
    (batch,) = eval_batches(data, source, batch_size=len(contents))
    for row, (kind, colour) in enumerate(zip(FILES, colours, strict=True)):
        bad = colour is None
        assert batch["weight"][row] == (not bad), kind
        assert batch["label"][row] == (-1 if bad else row), kind
        expected = PLAIN if bad else colour
        assert np.abs(batch["image"][row].astype(int) - expected).max() <= 3, kind
        assert (f"weight 0: {row}.JPEG (" in caplog.text) == bad, kind


def test_an_example_without_a_label_of_the_classes_counts_nowhere(caplog):
    """TFDS gives -1 where none was published, as for ImageNet's test pictures.

    One beyond the classes, as where a source of one's own counts from 1, would have
    loss 0, without a word.
    """

    class Unlabelled(Files):
        def __getitem__(self, index):
            return super().__getitem__(index) | {"label": (0, -1, 50)[index]}

    source = Unlabelled(*[encode(flat(COLOUR, (8, 8)))] * 3)
    (batch,) = eval_batches(tolerant(), source, batch_size=3)
    assert batch["weight"].tolist() == [1, 0, 0]
    assert "1.JPEG (it has no label)" in caplog.text
    assert "2.JPEG (label 50 is none of the 50 classes, from 0)" in caplog.text


@pytest.mark.parametrize("workers", [0, 1])
def test_bad_examples_change_no_other_example(workers):
    """Five files of 16 are damaged; the batches before and after are read on."""
    rng = np.random.default_rng(0)
    images = rng.integers(256, size=(16, 20, 24, 3)).astype(np.uint8)
    whole = [encode(image) for image in images]
    bad = [1, 2, 4, 5, 7]
    damaged = [c[:50] if i in bad else c for i, c in enumerate(whole)]
    common = dict(batch_size=4, seed=0)
    expected = list(islice(train_batches(DATA, Files(*whole), **common), 8))
    data = tolerant(workers=workers)
    found = list(islice(train_batches(data, Files(*damaged), **common), 8))
    for one, other in zip(expected, found, strict=True):
        read = ~np.isin(one["label"], bad)
        np.testing.assert_array_equal(other["weight"], read)
        assert (other["image"][~read] == PLAIN).all()
        assert_equal(
            [{k: v[read] for k, v in one.items()}],
            [{k: v[read] for k, v in other.items()}],
        )


def test_each_bad_example_is_logged_once_and_counted_once(caplog):
    source = Files(b"", *[encode(flat(COLOUR))] * 3)
    data = tolerant(max_bad_fraction=0.25)
    weights = [
        batch["weight"]
        for batch in islice(train_batches(data, source, batch_size=4, seed=0), 5)
    ]
    assert np.sum(weights) == 15  # one of four in each of five epochs
    assert caplog.text.count("0.JPEG") == 1


@pytest.mark.parametrize("batches", [eval_batches, train_batches])
def test_too_many_bad_examples_stop_the_run_and_five_are_named(batches):
    source = Files(*[b"nothing"] * 7, *[encode(flat(COLOUR))] * 13)
    options = dict(batch_size=20, **{"seed": 0} if batches is train_batches else {})
    message = (
        r"7 of 20 examples cannot be read, more than data\.max_bad_fraction=0\.3 "
        r"allows: (\d\.JPEG \(not a known image format\)(, |;)){5} replace or delete"
    )
    with pytest.raises(BadDataError, match=message) as error:
        next(batches(tolerant(max_bad_fraction=0.3), source, **options))
    assert error.value.exit_code == 65
    next(batches(tolerant(max_bad_fraction=0.35), source, **options))


class Records:
    """ArrayRecord files of encoded images; label and image follow from the index."""

    class_names = tuple(map(str, range(50)))

    def __init__(self, *paths):
        self.records = ArrayRecordDataSource([str(path) for path in paths])

    def __len__(self):
        return len(self.records)

    def __getitem__(self, index):
        return {"image": self.records[index], "label": index}

    def name(self, index):
        return f"record {index}"


def record_file(path, count):
    writer = ArrayRecordWriter(str(path), "group_size:1")
    rng = np.random.default_rng(0)
    for image in rng.integers(256, size=(count, 32, 32, 3)).astype(np.uint8):
        writer.write(encode(image))
    writer.close()
    return path


def test_a_flipped_bit_in_a_record_costs_that_record_only(tmp_path, caplog):
    path = record_file(tmp_path / "a.array_record", 24)
    (whole,) = eval_batches(DATA, Records(path), batch_size=24)
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 3] ^= 1
    path.write_bytes(raw)
    (batch,) = eval_batches(DATA, Records(path), batch_size=24)
    assert whole["weight"].all() and np.sum(batch["weight"]) == 23
    assert "(Corrupted Riegeli/records file" in caplog.text
    read = batch["weight"] == 1
    for key, value in whole.items():
        np.testing.assert_array_equal(value[read], batch[key][read])


def test_a_shard_that_is_lost_during_the_run_is_no_silent_loss(tmp_path):
    """Truncated or missing ones are noticed at the start, as `len` fails."""
    paths = [record_file(tmp_path / f"{i}.array_record", 6) for i in range(2)]
    source = Records(*paths)
    assert len(source) == 12
    paths[1].unlink()  # nothing of it was read so far
    batches = eval_batches(tolerant(), source, batch_size=4)
    assert np.concatenate([b["weight"] for b in batches]).tolist() == [1] * 6 + [0] * 6
    with pytest.raises(BadDataError, match=r"record 6 \(.*No such file"):
        next(eval_batches(tolerant(max_bad_fraction=0.4), source, batch_size=12))
    with pytest.raises(RuntimeError, match="No such file"):
        len(Records(*paths))


class Deadly(Numbered):
    """Reading one of its examples ends the process that does it."""

    def __getitem__(self, index):
        if index == 5:
            os._exit(9)
        return super().__getitem__(index)


def test_a_worker_that_dies_is_replaced_at_the_same_batch(caplog):
    source, common = Numbered(16), dict(batch_size=4, seed=0)
    expected = list(islice(train_batches(DATA, source, **common), 8))
    batches = train_batches(with_workers(2), source, **common)
    found = list(islice(batches, 3))
    for worker in multiprocessing.active_children():
        os.kill(worker.pid, signal.SIGKILL)
    found += list(islice(batches, 5))
    assert_equal(expected, found)
    assert "a data worker died (exit code -9)" in caplog.text
    batches.close()
    assert multiprocessing.active_children() == []


@pytest.mark.slow
def test_a_worker_that_dies_while_it_starts_is_replaced(monkeypatch, caplog):
    source = Numbered(16)
    source.ballast = bytes(1_000_000)  # more than a pipe holds
    starts, spawn = [], util.spawnv_passfds

    def dead_at_first(path, args, passfds):
        starts.append(path)
        if len(starts) == 1:
            path, args = b"/bin/false", [b"false", *args[1:]]
        return spawn(path, args, passfds)

    monkeypatch.setattr(
        pipeline, "_spawn", partial(pipeline._spawn, spawn=dead_at_first)
    )
    batches = eval_batches(with_workers(1), source, batch_size=4)
    assert_equal(list(batches), list(eval_batches(DATA, source, batch_size=4)))
    assert len(starts) == 2 and "a data worker died" in caplog.text


@pytest.mark.slow
def test_a_worker_that_dies_twice_at_the_same_batch_stops_the_run():
    batches = eval_batches(with_workers(1), Deadly(8), batch_size=4)
    with pytest.raises(
        BadDataError, match=r"died twice at the same batch \(exit code 9\)"
    ):
        list(batches)
    assert multiprocessing.active_children() == []


# A sitecustomize: other tests have shared memory too.  Python allows ten characters.
NAMED = f"""
from multiprocessing import resource_tracker, shared_memory
shared_memory._SHM_NAME_PREFIX = '/{os.getpid():x}_'
"""


def shared_memory():
    return list(Path("/dev/shm").glob(f"{os.getpid():x}_*"))


TRAINER = """
import sys, time
from sparx_jax.data import train_batches
from tests.data.test_pipeline import Numbered, with_workers
if __name__ == "__main__":
    batches = train_batches(with_workers(2), Numbered(64), batch_size=8, seed=0)
    next(batches), next(batches)
    print("ready", flush=True)
    time.sleep(60)
"""


# Death between making memory and registering it is rare, so that this takes long.
SLOW_TO_REGISTER = """
import time
def register(*args, register=resource_tracker.register):
    time.sleep(0.2)
    register(*args)
resource_tracker.register = register
"""


@pytest.mark.slow
def test_a_killed_trainer_leaves_no_workers_and_no_shared_memory(tmp_path):
    (tmp_path / "sitecustomize.py").write_text(NAMED + SLOW_TO_REGISTER)
    trainer = subprocess.Popen(
        [sys.executable, "-c", TRAINER],
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path])},
        start_new_session=True,
    )
    try:
        assert trainer.stdout.readline() == b"ready\n"
        assert shared_memory()
        trainer.kill()
        # The workers share the pipe, so it ends only when they have.
        trainer.communicate(timeout=10)
        end = time.monotonic() + 10
        while shared_memory() and time.monotonic() < end:
            time.sleep(0.1)
        assert not shared_memory()
    finally:
        with suppress(ProcessLookupError):
            os.killpg(trainer.pid, signal.SIGKILL)


@pytest.mark.slow
def test_memory_stays_flat(tmp_path, monkeypatch):
    """A lost batch in ten would show as 4 MB between the halves."""
    (tmp_path / "sitecustomize.py").write_text(NAMED)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), *sys.path]))
    source = Numbered(64)
    data = replace(with_workers(1), rand_augment="", image_size=128)
    batches = train_batches(data, source, batch_size=8, seed=0)
    sizes = []
    for step in range(300):
        shared = next(batches)["image"].shm
        if step >= 100:  # what Python and the allocator keep for good is there by now
            sizes.append(resident_bytes())
    first, second = np.median(np.reshape(sizes, (2, 100)), 1)
    assert second - first < 2e6
    assert shared.name.startswith(f"{os.getpid():x}_")
    assert len(shared_memory()) < 20  # a few batches on their way
    assert not Path("/dev/shm", shared.name).exists()  # or it may be told as leaked


def resident_bytes():
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def test_one_of_several_processes_leaves_too_many_bad_examples_to_the_caller():
    """Alone it would leave the others waiting."""
    source = Files(*[b"nothing"] * 15, encode(flat(COLOUR)))
    share = dict(process_index=0, process_count=2)
    data = tolerant(max_bad_fraction=0.1)
    batches = train_batches(data, source, batch_size=16, seed=0, **share)
    weights = [batch["weight"].sum() for batch in islice(batches, 4)]
    assert sum(weights) < 5
