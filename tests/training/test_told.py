"""What one process of several finds wrong is told to the others, or they would wait."""

import contextlib

import jax
import numpy as np
import pytest

from sparx_jax.errors import DamagedError, StorageError, UserError
from sparx_jax.parallel import processes
from sparx_jax.training import evaluate, finetune, loop
from sparx_jax.training import workdir as workdirs
from sparx_jax.training.checkpoint import Checkpoints
from sparx_jax.training.config import as_dict
from tests.training.conftest import tiny_settings


@contextlib.contextmanager
def as_one_of_two():
    """The exit codes that this process tells the other."""
    told = []

    def process_allgather(code):
        told.append(int(code))
        return np.array([code, 0])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(processes.multihost_utils, "process_allgather", process_allgather)
        patch.setattr(jax, "process_count", lambda: 2)
        yield told


def test_bad_settings_here_are_told_to_the_other_processes(tmp_path):
    bad = tiny_settings(**{"mesh.data": 3})
    with as_one_of_two() as told, pytest.raises(UserError, match="does not fit"):
        loop.train(bad, str(tmp_path))
    assert told == [UserError.exit_code]


def test_bad_settings_of_an_evaluation_are_told(tmp_path, monkeypatch, run):
    checkpoints = Checkpoints(str(tmp_path))
    checkpoints.save(run.init(), as_dict(run.config), None)
    checkpoints.wait()
    monkeypatch.setattr(evaluate, "Checkpoints", lambda *_, **__: checkpoints)
    bad = tiny_settings(**{"mesh.data": 3})
    with as_one_of_two() as told, pytest.raises(UserError, match="does not fit"):
        evaluate.evaluate_checkpoint(bad, str(tmp_path))
    assert told == [UserError.exit_code]


def test_a_missing_start_is_told(run):
    state = run.init()
    with as_one_of_two() as told, pytest.raises(UserError, match="does not exist"):
        finetune.start_from("/nowhere/x.pth", state)
    assert told == [UserError.exit_code]


def test_damaged_meta_and_failed_writes_are_told(run, tmp_path, monkeypatch):
    checkpoints = Checkpoints(str(tmp_path))
    checkpoints.save(run.init(), as_dict(run.config), None)
    checkpoints.wait()
    (checkpoints.path / "0/meta/metadata").write_text("{")
    with as_one_of_two() as told, pytest.raises(DamagedError):
        checkpoints.meta(0)
    assert told == [DamagedError.exit_code]

    def fail():
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(checkpoints._manager, "wait_until_finished", fail)
        with as_one_of_two() as told, pytest.raises(StorageError):
            checkpoints.wait()
    assert told == [StorageError.exit_code]
    checkpoints.close()


def test_a_folder_that_is_not_shared_is_told(tmp_path, monkeypatch):
    monkeypatch.setattr(workdirs.time, "sleep", lambda _: None)
    monkeypatch.setattr(workdirs, "_lock", lambda *_: None)  # as another host's
    refused = pytest.raises(UserError, match="all hosts share")
    with as_one_of_two() as told, refused, workdirs.held(str(tmp_path)):
        pass
    assert told[1:] == [0, UserError.exit_code]
