"""Real training jobs of one or more processes on this machine, for tests of faults."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp

ROOT = Path(__file__).parents[2]
CONFIG = "--config=tests/training/tiny_config.py"


class Job:
    """`processes` of train.py or another program, each with its log."""

    def __init__(
        self,
        workdir,
        *flags,
        program="train",
        config=CONFIG,
        processes=1,
        devices=1,
        env=(),
        **popen,
    ):
        self.started = time.monotonic()
        self.logs = [Path(f"{workdir}.{program}.{i}.log") for i in range(processes)]
        words = [sys.executable, f"{ROOT}/{program}.py", config, *flags]
        words.append(f"--workdir={workdir}")
        self.processes = []
        port = free_port()
        for index, log in enumerate(self.logs):
            given = {
                "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}",
                "JAX_NUM_PROCESSES": str(processes),
                "JAX_PROCESS_ID": str(index),
            }
            environment = {
                **os.environ,
                "JAX_PLATFORMS": "cpu",
                "JAX_NUM_CPU_DEVICES": str(devices),
                **(given if processes > 1 else {}),
                **dict(env),
            }
            with log.open("w") as file:
                self.processes.append(
                    subprocess.Popen(
                        words,
                        cwd=ROOT,
                        env=environment,
                        **(dict(stdout=file, stderr=subprocess.STDOUT) | popen),
                    )
                )

    def log(self, index=0):
        return self.logs[index].read_text()

    def wait_for(self, *texts, timeout=600):
        """Until process 0 has printed one of `texts`."""
        end = time.monotonic() + timeout
        while not any(text in self.log() for text in texts):
            ended = self.processes[0].poll() is not None
            assert not ended and time.monotonic() < end, self.log()
            time.sleep(0.005)

    def wait(self, timeout=600):
        """The exit codes, those of signals negative."""
        try:
            return [process.wait(timeout) for process in self.processes]
        finally:
            self.kill()

    def kill(self, number=signal.SIGKILL):
        for process in self.processes:
            if process.poll() is None:
                process.send_signal(number)
                process.wait()


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def arrays(workdir, step=12):
    """All arrays of a checkpoint by item and path, read without the package."""
    found = {}
    for item in ("params", "ema", "optimizer"):
        path = Path(workdir) / "checkpoints" / str(step) / item
        with ocp.PyTreeCheckpointer() as reader:
            tree = reader.metadata(path).item_metadata.tree
            kinds = jax.tree.map(lambda _: ocp.RestoreArgs(np.ndarray), tree)
            restored = reader.restore(path, restore_args=kinds)
        for name, array in jax.tree_util.tree_leaves_with_path(restored):
            found[item + jax.tree_util.keystr(name)] = np.asarray(array)
    return found


def same_bits(one, other):
    """Names of arrays that are not the same to the bit."""
    assert one.keys() == other.keys() and one
    return [n for n in one if one[n].tobytes() != other[n].tobytes()]
