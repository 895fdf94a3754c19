"""Laws of what is on disk: damage is found and named, and an older step serves."""

import contextlib
import errno
import fcntl
import os
import re
import shutil
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparx_jax.data.sources import DigitsSource
from sparx_jax.errors import BusyError, DamagedError, StorageError, UserError
from sparx_jax.training import checkpoint, loop
from sparx_jax.training import workdir as workdirs
from sparx_jax.training.checkpoint import Checkpoints, other_class
from sparx_jax.training.config import as_dict
from sparx_jax.training.evaluate import evaluate_checkpoint
from sparx_jax.training.fingerprint import _sums, differing, fingerprints
from tests.training.conftest import digest, tiny_settings


def test_a_fingerprint_sees_every_flipped_bit_and_every_swap():
    def of(**arrays):
        return fingerprints({k: jnp.asarray(array) for k, array in arrays.items()})

    rng = np.random.default_rng(0)
    array = rng.normal(size=(5, 7)).astype(np.float32)
    expected = of(a=array)
    for bit in range(32):
        for index in ((0, 0), (2, 3), (4, 6)):
            other = array.copy()
            other.view(np.uint32)[index] ^= np.uint32(1 << bit)
            assert differing(expected, of(a=other)) == ["a"]
    swapped = array[::-1].copy()
    assert differing(expected, of(a=swapped)) == ["a"]
    assert differing(expected, of(a=array)) == []
    assert differing(expected, of(b=array)) == ["a", "b"]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int32", "uint8"])
def test_a_fingerprint_is_two_sums_of_words(dtype):
    """Against the definition in numpy."""
    array = jnp.arange(-3, 9).reshape(3, 4).astype(dtype)
    words = np.asarray(array).view(f"uint{8 * array.dtype.itemsize}")
    words, position = words.astype(np.uint64).ravel(), np.arange(12, dtype=np.uint64)
    factor = (2 * position * 1640531527 + 1) % 2**32
    expected = [int(words.sum() % 2**32), int((words * factor % 2**32).sum() % 2**32)]
    assert fingerprints([array]) == {"0": expected}


def test_parts_of_an_array_add_up_to_its_fingerprint():
    """On several devices each sums its own part, by its place in the whole."""
    array = np.arange(1, 25, dtype=np.float32).reshape(4, 6)
    (expected,) = fingerprints([jnp.asarray(array)]).values()
    total = np.zeros(2, np.uint32)
    for rows in (slice(0, 2), slice(2, 4)):
        for columns in (slice(0, 3), slice(3, None)):
            part = np.ascontiguousarray(array[rows, columns])
            total += np.array(_sums(part, (rows, columns), array.shape))
    assert total.tolist() == expected


def data_files(item):
    """Of the arrays, and of trees of which an array's write made a newer version."""
    return list((item / "ocdbt.process_0/d").iterdir())


def flip(item):
    def damage(step):
        for path in data_files(step / item):
            content = bytearray(path.read_bytes())
            for place in range(len(content) // 32, len(content), len(content) // 16):
                content[place] ^= 8  # one alone may hit an obsolete tree
            path.write_bytes(content)

    return damage


def truncate(step):
    for path in data_files(step / "params"):
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def empty(step):
    shutil.rmtree(step)
    step.mkdir()


def half_copied(step):
    shutil.rmtree(step / "optimizer")


def without_meta(step):
    shutil.rmtree(step / "meta")


def another_word_in_meta(step):
    file = step / "meta/metadata"
    file.write_text(file.read_text().replace('"batch_size"', '"catch_size"', 1))


def meta_of_another_step(step):
    shutil.copy(step.parent / "8/meta/metadata", step / "meta/metadata")


def without_average(step):
    shutil.rmtree(step / "ema")


DAMAGES = {
    "flipped bits in each file of params": flip("params"),
    "flipped bits in each file of ema": flip("ema"),
    "flipped bits in each file of optimizer": flip("optimizer"),
    "truncated files": truncate,
    "an empty folder": empty,
    "a half-copied folder": half_copied,
    "no meta": without_meta,
    "another word in meta": another_word_in_meta,
    "the meta of another step": meta_of_another_step,
    "a folder without the average": without_average,
}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    workdir = str(tmp_path_factory.mktemp("finished") / "run")
    loop.train(tiny_settings(), workdir)
    return workdir


@pytest.mark.parametrize(
    "kind",
    [
        pytest.param(kind, marks=() if "params" in kind else pytest.mark.slow)
        for kind in DAMAGES
    ],
)
def test_a_damaged_checkpoint_is_refused_and_the_one_before_serves(
    finished, run, tmp_path, capsys, kind
):
    workdir = str(shutil.copytree(finished, tmp_path / "run"))
    path = Path(workdir) / "checkpoints"
    DAMAGES[kind](path / "12")
    model = as_dict(run.config)["model"]
    checkpoints = Checkpoints(workdir, read_only=True)
    with pytest.raises(DamagedError, match=r"checkpoint 12 in .* is damaged") as error:
        checkpoints.restore(12, run.init(), model)
    if "flipped" in kind:
        item = kind.split()[-1]
        assert f" {item} " in str(error.value) or "cannot be read" in str(error.value)
    checkpoints.close()

    checkpoints = Checkpoints(workdir)
    state = checkpoints.restore_latest(run.init(), model)
    assert int(state.step) == checkpoints.latest_step() == 8
    expected = checkpoints.restore(8, run.init(), model)
    assert digest(state) == digest(expected)
    checkpoints.close()
    told = capsys.readouterr().out
    assert "checkpoint 12 in" in told and "moved damaged checkpoint(s) [12]" in told
    assert [p.name.split("-")[0] for p in Path(workdir, "damaged").iterdir()] == ["12"]


def test_damaged_metrics_of_an_old_step_close_no_folder(finished, tmp_path):
    workdir = str(shutil.copytree(finished, tmp_path / "run"))
    checkpoints = Checkpoints(workdir, read_only=True)
    best = checkpoints.find("best")
    checkpoints.close()
    (tmp_path / f"run/checkpoints/{best}/metrics/metrics").write_text('{"top1": 1')
    checkpoints = Checkpoints(workdir)
    assert checkpoints.find("best") == best and checkpoints.latest_step() == 12
    top1 = checkpoints.meta(best)["metrics"]["top1"]
    assert checkpoints._manager.metrics(best) == {"top1": top1}
    checkpoints.close()


@pytest.mark.slow
def test_a_flipped_bit_is_named_by_its_leaf(finished, run, tmp_path):
    """Orbax itself restores it: without the fingerprint nothing would be told.

    A bit of a tree that is obsolete changes nothing.
    """
    workdir = str(shutil.copytree(finished, tmp_path / "run"))
    step = Path(workdir) / "checkpoints" / "12"
    data = max(data_files(step / "optimizer"), key=lambda path: path.stat().st_size)
    told = []
    content, model = data.read_bytes(), as_dict(run.config)["model"]
    checkpoints = Checkpoints(workdir, read_only=True)
    whole = digest(checkpoints.restore(12, run.init(), model))
    for place in range(len(content) // 20, len(content), len(content) // 6):
        damaged = bytearray(content)
        damaged[place] ^= 1
        data.write_bytes(damaged)
        try:
            state = checkpoints.restore(12, run.init(), model)
        except DamagedError as error:
            told.append(str(error))
        else:
            assert digest(state) == whole
    checkpoints.close()
    # Which arrays lie at those places differs from save to save.
    named = re.findall(r"optimizer 0/[mn]u/([\w.]+) (?:and|differs)", " ".join(told))
    assert named and set(named) <= run.init().weights.params.keys(), told


@pytest.mark.slow
def test_training_goes_on_from_the_step_before_with_the_same_bits(
    finished, run, tmp_path
):
    workdir = str(shutil.copytree(finished, tmp_path / "run"))
    flip("params")(Path(workdir) / "checkpoints" / "12")
    loop.train(tiny_settings(), workdir)
    model = as_dict(run.config)["model"]
    states = []
    for folder in (finished, workdir):
        checkpoints = Checkpoints(folder, read_only=True)
        states.append(digest(checkpoints.restore(12, run.init(), model)))
        checkpoints.close()
    assert states[0] == states[1]


def test_nothing_is_trained_anew_when_all_checkpoints_are_damaged(finished, tmp_path):
    workdir = str(shutil.copytree(finished, tmp_path / "run"))
    steps = list((Path(workdir) / "checkpoints").glob("*"))
    for step in steps:
        empty(step)
    numbers = sorted((int(step.name) for step in steps), reverse=True)
    assert numbers[:2] == [12, 8]  # and the best, if that is another
    message = rf"no checkpoint .* {re.escape(str(numbers))} are damaged"
    with pytest.raises(DamagedError, match=message):
        loop.train(tiny_settings(), workdir)
    assert not Path(workdir, "damaged").exists()


@pytest.mark.slow
def test_other_settings_are_refused_with_the_difference(finished, capsys):
    changed = tiny_settings(**{"seed": 5, "optimizer.lr": 2e-3, "data.workers": 3})
    with pytest.raises(
        UserError, match=r"optimizer\.lr=0\.001 there, 0\.002 here; seed"
    ):
        loop.train(changed, finished)
    loop.train(changed, finished, allow_config_change=True)
    told = capsys.readouterr().out
    assert "with changed settings: optimizer.lr=0.001 there" in told
    assert "workers" not in told and "nothing to do" in told


def test_classes_of_other_names_are_refused_with_the_first(finished, monkeypatch):
    """A renamed folder moves all labels behind it."""
    names = ("0", "1", "two", *"3456789")
    monkeypatch.setattr(DigitsSource, "class_names", names)
    message = "class 2 is '2' there, 'two' here"
    for go_on in loop.train, evaluate_checkpoint:
        with pytest.raises(UserError, match=message):
            go_on(tiny_settings(), finished)


def test_of_a_checkpoint_without_names_nothing_is_told():
    assert other_class({}, "ab") == other_class({"class_names": []}, "ab") == ""
    assert other_class({"class_names": ["a"]}, ()) == ""
    assert (
        other_class({"class_names": ["a"]}, "ab") == "class 1 is None there, 'b' here"
    )


def test_a_second_trainer_is_refused(finished):
    with workdirs.held(finished), pytest.raises(BusyError, match=r"by process \d+ on"):
        loop.train(tiny_settings(), finished)
    loop.train(tiny_settings(), finished)  # the lock is gone


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP])
def test_file_systems_without_locks_are_told(tmp_path, monkeypatch, capsys, number):
    def flock(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", flock)
    with workdirs.held(str(tmp_path)):
        assert "lock cannot be locked" in capsys.readouterr().out


def test_folders_that_the_processes_do_not_share_are_told(tmp_path, monkeypatch):
    waits = []
    monkeypatch.setattr(workdirs.time, "sleep", waits.append)
    (tmp_path / "lock").write_text("process 7 on vm since yesterday")  # of another run
    with pytest.raises(UserError, match=r"process 0 does not see .*all hosts share"):
        workdirs._check_shared(str(tmp_path), "since today")
    assert sum(waits) == 60
    with workdirs.held(str(tmp_path)):
        # Of a bucket other hosts see files that are closed: this must be one.
        since = re.search(r"since .*", (tmp_path / "lock").read_text())[0]
        workdirs._check_shared(str(tmp_path), since)
    assert sum(waits) == 60


def test_a_write_that_fails_is_told_at_the_next_save(run, tmp_path, monkeypatch):
    checkpoints = Checkpoints(str(tmp_path))

    def fail():
        raise ValueError("RESOURCE_EXHAUSTED: Error writing: No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(checkpoints._manager, "wait_until_finished", fail)
        with pytest.raises(StorageError, match="make room"):
            checkpoints.save(run.init(), as_dict(run.config), None)
    checkpoints.close()


@pytest.mark.slow
def test_a_step_is_replaced_only_when_its_successor_is_complete(
    run, tmp_path, monkeypatch
):
    """A run that is stopped in an evaluation saves the step again with its metrics."""
    workdir, settings = str(tmp_path), as_dict(run.config)
    checkpoints, state = Checkpoints(workdir), run.init()
    checkpoints.save(state, settings, None)
    step = int(state.step)
    checkpoints.wait()
    with monkeypatch.context() as patch:
        patch.setattr(type(checkpoints._manager), "save", lambda *_, **__: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            checkpoints.save(state, settings, {"top1": 1.0})
    checkpoints.close()
    again = Checkpoints(workdir)  # as after a kill at that moment
    assert again.latest_step() == step and again.meta(step)["metrics"] is None
    again.save(state, settings, {"top1": 1.0})
    again.wait()
    assert again.meta(step)["metrics"] == {"top1": 1.0}
    assert not (tmp_path / "replaced").exists()
    again.close()


def test_a_checkpoint_of_another_optimizer_is_refused_and_stays(finished, run):
    """Such as one with the moments in two vectors, of before 2026-11-27."""
    state, model = run.init(), as_dict(run.config)["model"]
    some = run.optimizer.init(dict(list(state.weights.params.items())[:3]))
    checkpoints = Checkpoints(finished, read_only=True)
    with pytest.raises(UserError, match=r"arrays in optimizer than .* such as 0/mu"):
        checkpoints.restore_latest(state._replace(opt_state=some), model)
    checkpoints.close()
    assert not (Path(finished) / "damaged").exists()


def test_a_step_whose_loss_is_not_finite_changes_nothing(run, batch):
    state = run.init()
    params = dict(state.weights.params)
    name = next(iter(params))
    params[name] = params[name].at[(0,) * params[name].ndim].set(jnp.inf)
    state = state._replace(weights=state.weights._replace(params=params))
    before = digest(state)
    after, metrics = run.train_step(state, batch)
    assert bool(metrics["skipped"])
    changed = [k for k, v in digest(after).items() if v != before[k]]
    assert changed == [".step"]
    assert jax.tree.all(jax.tree.map(lambda x: bool(jnp.isfinite(x).all()), after.ema))


def test_a_checkpoint_knows_how_many_images_it_was_trained_on(finished):
    with contextlib.closing(Checkpoints(finished, read_only=True)) as checkpoints:
        assert checkpoints.meta(12)["train_examples"] == 1437


def saved(checkpoints, run, step, top1=None):
    state = run.init()._replace(step=jnp.int32(step))
    metrics = None if top1 is None else {"top1": top1}
    checkpoints.save(state, as_dict(run.config), metrics)
    checkpoints.wait()


@pytest.mark.slow
def test_checkpoints_between_evaluations_make_room_for_later_ones(run, tmp_path):
    with contextlib.closing(Checkpoints(str(tmp_path))) as checkpoints:
        saved(checkpoints, run, 1, top1=5.0)
        for step in (2, 3, 4):
            saved(checkpoints, run, step)
        assert sorted(p.name for p in checkpoints.path.iterdir()) == ["1", "3", "4"]


def test_the_best_is_the_latest_before_the_first_evaluation_and_new_ones_are_found(
    run, tmp_path
):
    with contextlib.closing(Checkpoints(str(tmp_path))) as writer:
        saved(writer, run, 1)
        with contextlib.closing(Checkpoints(str(tmp_path), read_only=True)) as reader:
            assert reader.find("best") == reader.find("latest") == 1
            saved(writer, run, 2)
            assert reader.find("best") == reader.find("latest") == 2


@pytest.mark.slow
@pytest.mark.parametrize("which, read", [("latest", [1, 2]), ("1", [1])])
def test_a_step_that_training_deletes_meanwhile_is_read_no_more(
    run, tmp_path, monkeypatch, which, read
):
    """Orbax's list has it until all its files are gone."""
    monkeypatch.setattr(time, "sleep", lambda _: saved(writer, run, 2))
    tried = []

    def attempt(step):
        tried.append(step)
        if step == 1:
            raise DamagedError("deleted")
        return step

    with contextlib.closing(Checkpoints(str(tmp_path))) as writer:
        saved(writer, run, 1)
        reader = contextlib.closing(Checkpoints(str(tmp_path), read_only=True))
        with reader as checkpoints, contextlib.suppress(DamagedError):
            assert checkpoints.read(which, attempt) == 2
    assert tried == read


def test_a_damaged_step_is_tried_twice(run, tmp_path, monkeypatch):
    monkeypatch.setattr(time, "sleep", lambda _: None)
    tried = []

    def attempt(step):
        tried.append(step)
        raise DamagedError("a bit flipped")

    with contextlib.closing(Checkpoints(str(tmp_path))) as checkpoints:
        saved(checkpoints, run, 1)
        with pytest.raises(DamagedError, match="flipped"):
            checkpoints.read("best", attempt)
    assert tried == [1, 1]


def test_a_list_of_steps_is_made_again_where_one_vanishes(tmp_path, monkeypatch):
    manager, calls = checkpoint._Manager, []

    def vanishing(*args, **options):
        calls.append(args)
        if len(calls) == 1:
            raise FileNotFoundError("checkpoints/71")
        return manager(*args, **options)

    monkeypatch.setattr(checkpoint, "_Manager", vanishing)
    Checkpoints(str(tmp_path)).close()
    assert len(calls) == 2


def test_what_was_replaced_gives_way_to_a_complete_successor(run, tmp_path):
    """A run that was killed after the save, before the old one was removed."""
    with contextlib.closing(Checkpoints(str(tmp_path))) as checkpoints:
        saved(checkpoints, run, 1, top1=5.0)
        old = tmp_path / "replaced/1"
        shutil.copytree(checkpoints.path / "1", old)
        (old / "meta/metadata").write_text("of before")
    with contextlib.closing(Checkpoints(str(tmp_path))) as checkpoints:
        assert checkpoints.meta(1)["metrics"] == {"top1": 5.0}
    assert not (tmp_path / "replaced").exists()


@pytest.mark.slow
def test_a_step_may_be_damaged_once_more(finished, run, tmp_path):
    workdir = str(shutil.copytree(finished, tmp_path / "run"))
    model = as_dict(run.config)["model"]
    for _ in range(2):
        step = tmp_path / "run/checkpoints/12"
        shutil.rmtree(step, ignore_errors=True)
        (step / "params").mkdir(parents=True)
        with contextlib.closing(Checkpoints(workdir)) as checkpoints:
            assert int(checkpoints.restore_latest(run.init(), model).step) == 8
    assert len(list((tmp_path / "run/damaged").iterdir())) == 2


def test_a_write_that_fails_leaves_the_old_text(tmp_path, monkeypatch):
    path = tmp_path / "config.json"
    path.write_text("old")

    def refuse(*_):
        assert path.read_text() == "old"
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch, pytest.raises(StorageError):
        patch.setattr(workdirs.os, "replace", refuse)
        workdirs.replace_text(path, "new")
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]
