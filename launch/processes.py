"""Runs N processes of a program, which find each other as the hosts of a pod do.

    python launch/processes.py N [--grace=30] [--logs=runs/local] -- train.py ...

Each writes LOGS/process-I.log, process 0 to the terminal as well.  When one fails, the
others have GRACE seconds to end before they are killed, with all that they started.
The exit code is that of the first to fail, 128 + S after signal S.  SIGTERM goes to all
of them.  They run on the CPU unless JAX_PLATFORMS is set; JAX_NUM_CPU_DEVICES is the
number of devices of each.  local.sh adds the restarts.
"""

import argparse
import os
import queue
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from threading import Thread

EXIT_BAD_INPUT = 78
"""As of train.py."""


def main():
    """What the command line says."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.error = _fail
    parser.add_argument("n", type=int, help="number of processes")
    parser.add_argument("--grace", type=float, default=30.0, help="seconds")
    parser.add_argument("--logs", type=Path, default=Path("runs/local"), help="folder")
    parser.add_argument("program", nargs="+", help="Python file and its arguments")
    options = parser.parse_args()
    if options.n < 1:
        _fail(f"N={options.n} must be at least 1, the number of processes")
    try:
        options.logs.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        _fail(f"--logs={options.logs} cannot be made a folder: {error.strerror}")
    sys.exit(run(options.n, options.program, options.logs, options.grace))


def run(n: int, program: list[str], logs: Path, grace: float) -> int:
    """The exit code of the first of `n` processes that fails, or 0.

    Args:
      n: how many processes.
      program: a Python file and its arguments.
      logs: an existing folder; what process I prints is appended to process-I.log.
      grace: seconds from the first failure to the end of the others.
    """
    processes, codes, stopped = [], queue.SimpleQueue(), []

    def stop(*_):
        stopped.append(True)
        for process in processes:
            process.terminate()

    signal.signal(signal.SIGTERM, stop)
    with socket.create_server(("127.0.0.1", 0)) as server:  # a port that is free
        coordinator = "{}:{}".format(*server.getsockname())
    shown = None
    try:
        for i in range(n):
            with (logs / f"process-{i}.log").open("ab") as log:
                output = subprocess.PIPE if i == 0 else log
                process = _start(i, n, coordinator, program, output)
            processes.append(process)
            Thread(target=lambda p: codes.put(p.wait()), args=[process]).start()
        shown = Thread(target=_show, args=[processes[0], logs / "process-0.log"])
        shown.start()
        if stopped:  # the signal came before all of them
            stop()
        return _first_failure(codes, n, grace)
    finally:
        for process in processes:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
        if shown:
            shown.join()


def _start(i, n, coordinator, program, output):
    env = os.environ | {
        "JAX_PLATFORMS": os.environ.get("JAX_PLATFORMS", "cpu"),
        "PYTHONUNBUFFERED": "1",
        "JAX_COORDINATOR_ADDRESS": coordinator,
        "JAX_NUM_PROCESSES": str(n),
        "JAX_PROCESS_ID": str(i),
    }
    # A session each, so that what a process started can be killed with it.
    options = dict(stdout=output, stderr=subprocess.STDOUT, start_new_session=True)
    return subprocess.Popen([sys.executable, *program], env=env, **options)


def _show(process, log):
    with log.open("ab", buffering=0) as file:
        for line in process.stdout:
            file.write(line)
            sys.stdout.buffer.write(b"[0] " + line)
            sys.stdout.buffer.flush()


def _first_failure(codes, running, grace):
    """0 if all `running` processes end well; `codes` is in the order of their ends."""
    while running:
        if code := codes.get():
            break
        running -= 1
    else:
        return 0
    deadline = time.monotonic() + grace
    with suppress(queue.Empty):
        for _ in range(running - 1):
            codes.get(timeout=max(0.0, deadline - time.monotonic()))
    return code if code > 0 else 128 - code


def _fail(message):
    print(f"error: {message}; see launch/local.sh", file=sys.stderr)
    sys.exit(EXIT_BAD_INPUT)


if __name__ == "__main__":
    main()
