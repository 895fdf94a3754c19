"""Laws of processes: how they are found, and that one failure is everybody's."""

import os
import signal
import socket

import jax
import numpy as np
import pytest

from sparx_jax.errors import BusyError, UserError
from sparx_jax.parallel import processes


@pytest.fixture
def calls(monkeypatch):
    """What jax.distributed.initialize is called with; it finds no cluster."""
    found = []

    def initialize(**options):
        found.append(options)
        if "coordinator_address" not in options:
            raise ValueError("coordinator_address should be defined.")

    monkeypatch.setattr(jax.distributed, "initialize", initialize)
    for name in processes.VARIABLES:
        monkeypatch.delenv(name, raising=False)
    return found


def start(mode):
    processes.start(mode, start_timeout_s=30, heartbeat_timeout_s=20)


def test_a_single_process_needs_nothing(calls):
    start("off")
    assert calls == []
    start("auto")
    assert len(calls) == 1 and "num_processes" not in calls[0]
    with pytest.raises(UserError, match="--distributed=on found no job to join"):
        start("on")


def test_explicit_processes_are_joined(calls, monkeypatch):
    for name, value in zip(processes.VARIABLES, ("host:99", "4", "3"), strict=True):
        monkeypatch.setenv(name, value)
    start("auto")
    assert calls[0]["coordinator_address"] == "host:99"
    assert (calls[0]["num_processes"], calls[0]["process_id"]) == (4, 3)
    assert calls[0]["heartbeat_timeout_seconds"] == 20
    monkeypatch.delenv("JAX_PROCESS_ID")
    with pytest.raises(UserError, match="JAX_NUM_PROCESSES=4, JAX_PROCESS_ID= "):
        start("auto")


@pytest.mark.parametrize(
    "values",
    [("host", "4", "3"), (":99", "4", "3"), ("host:9", "4", "4"), ("host:a", "4", "3")],
)
def test_processes_that_cannot_be_are_refused(calls, monkeypatch, values):
    for name, value in zip(processes.VARIABLES, values, strict=True):
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=f"JAX_COORDINATOR_ADDRESS={values[0]}, "):
        start("auto")
    assert calls == []


def test_processes_of_an_mpi_that_jax_does_not_know_are_refused(calls, monkeypatch):
    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "1")
    start("auto")
    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "2")
    with pytest.raises(UserError, match=r"no job to join \(OMPI_COMM_WORLD_SIZE=2\)"):
        start("auto")
    start("off")


def test_a_port_in_use_is_told(calls, monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        for name, value in zip(processes.VARIABLES, (address, "2", "0"), strict=True):
            monkeypatch.setenv(name, value)
        with pytest.raises(UserError, match=f"cannot listen at {address} .*in use"):
            start("auto")
        monkeypatch.setenv("JAX_PROCESS_ID", "1")  # which connects to it
        start("auto")
    monkeypatch.setenv("JAX_PROCESS_ID", "0")
    start("auto")
    assert len(calls) == 2


def test_a_task_of_slurm_knows_its_job(monkeypatch):
    """As srun sets its environment; JAX reads it."""
    from jax._src import clusters

    for name, value in {
        "SLURM_JOB_ID": "4711",
        "SLURM_STEP_NODELIST": "node[07-08]",
        "SLURM_NTASKS": "2",
        "SLURM_PROCID": "1",
        "SLURM_LOCALID": "0",
    }.items():
        monkeypatch.setenv(name, value)
    found = clusters.ClusterEnv.auto_detect_unset_distributed_params(
        None, None, None, None, None, 30
    )
    assert found[0].startswith("node07:") and found[1:3] == (2, 1)


def test_a_failure_of_one_process_is_raised_on_all(monkeypatch):
    assert processes.together(lambda: 5) == 5
    monkeypatch.setattr(jax, "process_count", lambda: 3)
    codes = np.array([0, 75, 0])
    gather = lambda code: np.maximum(codes, [code, 0, 0])  # noqa: E731
    monkeypatch.setattr(processes.multihost_utils, "process_allgather", gather)
    with pytest.raises(UserError, match="process 1 of this job failed") as error:
        processes.together(lambda: 5)
    assert error.value.exit_code == BusyError.exit_code

    def fail():
        raise UserError("mine")

    with pytest.raises(UserError, match="mine"):
        processes.together(fail)


def test_a_signal_to_one_process_counts_for_all():
    assert processes._logical_or(np.array([False, True, False]))
    assert not processes._logical_or(np.zeros(3, bool))


def test_sigterm_becomes_a_request_and_then_death_again():
    before = signal.getsignal(signal.SIGTERM)
    with processes.stop_request() as stop:
        assert not stop.poll()
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.poll()
    assert signal.getsignal(signal.SIGTERM) == before


def test_ctrl_c_becomes_a_request_once():
    # In a shell's background it is ignored, and then by `stop_request` too.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with processes.stop_request() as stop:
            signal.raise_signal(signal.SIGINT)
            assert stop.poll()
            with pytest.raises(KeyboardInterrupt):
                signal.raise_signal(signal.SIGINT)
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)


def test_only_a_broken_connection_is_a_lost_peer(monkeypatch):
    gone = ValueError("UNKNOWN: Gloo all-reduce failed: Connection closed by peer")
    assert processes.lost_peer(gone) is None  # of one process alone
    monkeypatch.setattr(jax.distributed, "is_initialized", lambda: True)
    lost = processes.lost_peer(gone)
    assert lost.exit_code == 134 and "goes on from the latest" in str(lost)
    for told in ("UNAVAILABLE: 10.0.0.7:99", "no heartbeat", "coordination service"):
        assert processes.lost_peer(ValueError(told)) is not None
    assert processes.lost_peer(ValueError("RESOURCE_EXHAUSTED: 3 GB")) is None
