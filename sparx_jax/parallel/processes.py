"""Processes that train together: how they start, agree, stop and lose each other."""

import os
import re
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal, NoReturn

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from sparx_jax.errors import PeerLostError, Preempted, UserError

# How long a failing process waits for the others to fail in the same way.
PATIENCE_S = 5
Mode = Literal["auto", "on", "off"]

# By hand and for launch/local.sh; clusters describe themselves.
VARIABLES = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
# By which MPIs tell how many they started; JAX knows none but Open MPI before 5.
_MPI_VARIABLES = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE")


def start(mode: Mode, *, start_timeout_s: int, heartbeat_timeout_s: int) -> None:
    """Joins the other processes of the job, if there are any.

    Args:
      mode: "on" demands other processes or a cluster; "auto" looks for the variables
        `VARIABLES`, then for what JAX knows: TPU pods, GKE, SLURM, Open MPI 4; "off"
        looks for nothing.
      start_timeout_s: after so many seconds without all processes this one ends with
        the exit code of `PeerLostError`.
      heartbeat_timeout_s: after so many seconds of silence a process counts as dead,
        and the others end with that exit code.

    Raises UserError if the variables are incomplete, if the coordinator's port is in
    use, and if nothing is found with "on" or under an MPI that JAX does not know.
    """
    if mode == "off":
        return
    given = {name: os.environ.get(name) for name in VARIABLES}
    explicit = {}
    if any(given.values()):
        address, count, index = (value or "" for value in given.values())
        whole = re.fullmatch(r"\S+:\d+ \d+ \d+", f"{address} {count} {index}", re.A)
        if not whole or int(index) >= int(count):
            raise UserError(
                "the processes of a job are described by all of "
                + ", ".join(f"{k}={v or ''}" for k, v in given.items())
                + " (host:port, a number, and one from 0 below it): set all or none."
            )
        if int(index) == 0:
            _check_port(address)
        explicit = dict(
            coordinator_address=address,
            num_processes=int(count),
            process_id=int(index),
        )

    def give_up():
        where = f" at {given[VARIABLES[0]]}" if explicit else ""
        print(
            f"error: the {given[VARIABLES[1]] or ''} processes of this job did not "
            f"all meet{where} within {start_timeout_s} s (this is process "
            f"{given[VARIABLES[2]] or '?'}): see the logs of the others, and start "
            "all of them again.",
            file=sys.stderr,
            flush=True,
        )
        os._exit(PeerLostError.exit_code)

    # Before training there is nothing to save: SIGTERM ends the process.
    jax.config.update("jax_enable_preemption_service", False)
    # JAX itself ends the process with a stack trace; this is a little earlier.
    watchdog = threading.Timer(start_timeout_s, give_up)
    watchdog.daemon = True
    watchdog.start()
    try:
        jax.distributed.initialize(
            **explicit,
            initialization_timeout=start_timeout_s + 5,
            heartbeat_timeout_seconds=heartbeat_timeout_s,
            shutdown_timeout_seconds=heartbeat_timeout_s,
        )
    except ValueError as error:  # how JAX says that it has found no cluster
        sizes = {name: os.environ.get(name, "1") for name in _MPI_VARIABLES}
        mpi = " ".join(f"{name}={size}" for name, size in sizes.items() if size != "1")
        if explicit or mode == "on" or mpi:
            raise UserError(
                f"--distributed={mode} found no job to join ({mpi or error}): set "
                f"{', '.join(VARIABLES)}, or use --distributed=off."
            ) from error
    finally:
        watchdog.cancel()


def _check_port(address):
    """That process 0 can listen there; where it cannot jaxlib 0.10.2 may crash."""
    try:
        socket.create_server(("", int(address.rpartition(":")[2]))).close()
    except (OSError, OverflowError) as error:
        raise UserError(
            f"process 0 cannot listen at {address} ({error}): end what uses the port, "
            "or give another."
        ) from error


def end(exit_code: int) -> NoReturn:
    """Ends the process; after a failure it does not wait for others that go on."""
    if exit_code not in (0, Preempted.exit_code) and jax.distributed.is_initialized():
        sys.stdout.flush()
        sys.stderr.flush()
        leave = threading.Thread(target=jax.distributed.shutdown, daemon=True)
        leave.start()
        leave.join(PATIENCE_S)
        os._exit(exit_code)
    sys.exit(exit_code)


def lost_peer(error: Exception) -> PeerLostError | None:
    """What `error` means if it came from a collective whose partner is gone."""
    signs = ("Gloo", "by peer", "coordination service", "heartbeat", "UNAVAILABLE")
    if not jax.distributed.is_initialized() or not any(s in str(error) for s in signs):
        return None
    return PeerLostError(
        f"process {jax.process_index()} of {jax.process_count()} lost another one "
        f"({str(error).splitlines()[0][:200]}): start all of them again; training "
        "goes on from the latest checkpoint."
    )


def together(function: Callable[[], Any]) -> Any:
    """Calls `function` on every process; a UserError on one is one of its kind on all.

    Without that the others would wait for the one that is gone.  `function` itself must
    not wait for other processes.
    """
    if jax.process_count() == 1:
        return function()
    result, failed = None, None
    try:
        result = function()
    except UserError as error:
        failed = error
    code = np.int32(failed.exit_code if failed else 0)
    codes = multihost_utils.process_allgather(code)
    if failed:
        raise failed
    for process in np.flatnonzero(codes):
        kinds = {kind.exit_code: kind for kind in UserError.__subclasses__()}
        kind = kinds.get(int(codes[process]), UserError)
        raise kind(f"process {process} of this job failed: see its log.")
    return result


class StopRequest:
    """Whether to save and stop: some process of the job got SIGTERM or Ctrl-C.

    JAX's own service for this cannot be used: each save by Orbax resets its counter of
    calls, after which the processes may wait for a number that never comes.
    """

    def __init__(self):
        self._received, self._before = False, signal.getsignal(signal.SIGINT)
        self._anywhere = None

    def poll(self) -> bool:
        """True at the same call on all processes, which must call equally often.

        With more processes than one this is the answer to the call before: waiting
        for an exchange of this moment would leave the devices idle.
        """
        if jax.process_count() == 1:
            return self._received
        before, self._anywhere = self._anywhere, _any(self._received)
        return before is not None and bool(before)

    def _receive(self, number, frame):
        del frame
        self._received = True
        if number == signal.SIGINT:  # the next one ends the process
            signal.signal(signal.SIGINT, self._before)


def _any(flag: bool) -> jax.Array:
    """Whether `flag` is true on any process; returns before that is known."""
    mesh = jax.make_mesh((jax.device_count(),), ("all",), axis_types=(AxisType.Auto,))
    flags = jax.make_array_from_process_local_data(
        NamedSharding(mesh, P("all")), np.full(jax.local_device_count(), flag)
    )
    return _logical_or(flags)


@jax.jit
def _logical_or(flags):
    return flags.any()


@contextmanager
def stop_request() -> Iterator[StopRequest]:
    """While open, SIGTERM and Ctrl-C set a `StopRequest` instead of ending the process.

    A signal that arrives while XLA compiles counts at the next poll; a second Ctrl-C
    does not wait for it.
    """
    request, numbers = StopRequest(), [signal.SIGTERM]
    if signal.getsignal(signal.SIGINT) != signal.SIG_IGN:  # as a shell's background has
        numbers.append(signal.SIGINT)
    before = {number: signal.signal(number, request._receive) for number in numbers}
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
