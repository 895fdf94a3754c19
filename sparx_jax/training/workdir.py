"""The folder of a run: made, held by one trainer at a time, its settings written."""

import json
import os
import platform
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib.metadata import version
from pathlib import Path

import jax
import numpy as np
from jax.experimental import multihost_utils

from sparx_jax.errors import BusyError, StorageError, UserError
from sparx_jax.locks import lock
from sparx_jax.parallel.processes import together
from sparx_jax.training.config import Config, as_dict

PACKAGES = ("jax", "flax", "optax", "orbax-checkpoint", "numpy")


@contextmanager
def held(workdir: str) -> Iterator[None]:
    """Makes the folder and keeps other trainers out of it until the end.

    The lock ends with its process, however that dies.  On file systems without locks
    between machines it keeps out those of this machine only, on those without any none.

    Raises UserError if the folder cannot be made or is not the same for all processes,
    BusyError if it is taken.
    """
    starts = multihost_utils.process_allgather(np.int32(time.time()))
    start = time.gmtime(np.ravel(starts)[0])  # of process 0
    since = f"since {time.strftime('%F %T UTC', start)}"
    file = together(lambda: _lock(workdir, since))
    try:
        together(lambda: _check_shared(workdir, since))
        yield
    finally:
        if file is not None:
            file.close()


def make_folder(workdir: str) -> Path:
    """The folder of runs, or of one.  Raises UserError if it cannot be made."""
    path = Path(workdir)
    # Orbax looks for its files by patterns: under a path with these it finds none, and
    # what it saves is incomplete.
    if "://" in workdir or set("[\\") & set(str(path.absolute())):
        raise UserError(
            f"--workdir={workdir} is a URL, or there is a [ or \\ in its path, "
            "where checkpoints cannot be kept: give the path of a folder, for instance "
            "in a mounted bucket."
        )
    with _user_errors(workdir):
        path.mkdir(parents=True, exist_ok=True)
    return path


@contextmanager
def _user_errors(workdir):
    try:
        yield
    except OSError as error:
        raise UserError(
            f"--workdir={workdir} cannot be made or written "
            f"({error.strerror or error}): give a folder that may be written."
        ) from error


def _lock(workdir, since):
    path = make_folder(workdir)
    if jax.process_index() != 0:
        return None
    with _user_errors(workdir):
        file = (path / "lock").open("a+")
    if not lock(file):
        file.seek(0)
        holder = file.read().strip()
        file.close()
        raise BusyError(
            f"--workdir={workdir} is in use by {holder or 'another trainer'}: wait for "
            "it, stop it, or give another --workdir."
        )
    # By a file that is closed: other hosts see nothing else in a bucket.
    holder = f"process {os.getpid()} on {socket.gethostname()} {since}"
    with _user_errors(workdir):
        (path / "lock").write_text(holder)
    return file


def _check_shared(workdir, since):
    """Otherwise the processes would wait for each other's files in the first save."""
    path = Path(workdir) / "lock"
    for _ in range(60):  # network file systems remember for a while what was there
        with suppress(OSError):
            if path.read_text().endswith(since):
                return
        time.sleep(1)
    raise UserError(
        f"process {jax.process_index()} does not see what process 0 wrote to {path}: "
        "give a --workdir that all hosts share."
    )


def replace_text(path: Path, text: str) -> None:
    """Writes a file; who reads it meanwhile, or after a kill, has the one before.

    Raises StorageError if it cannot be written.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with storage_errors(path):
        try:
            temporary.write_text(text)
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)


@contextmanager
def storage_errors(path: str | Path) -> Iterator[None]:
    """Raises StorageError for any OSError: the disk, or a mount that went away."""
    try:
        yield
    except OSError as error:
        raise StorageError(
            f"{path} cannot be written ({error.strerror or error}): make room, or "
            "repair the file system, then start again."
        ) from error


def write_config(workdir: str, config: Config, num_params: int) -> None:
    """`config.json`: all settings, package versions, devices."""
    if jax.process_index() == 0:
        versions = {name: version(name) for name in PACKAGES}
        content = {
            "config": as_dict(config),
            "parameters": num_params,
            "versions": versions | {"python": platform.python_version()},
            "devices": [str(device) for device in jax.devices()],
        }
        path = Path(workdir) / "config.json"  # which a sweep's other tasks may read now
        replace_text(path, json.dumps(content, indent=2) + "\n")
