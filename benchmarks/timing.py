"""How the benchmarks measure: interleaved, in one process, medians and their spread."""

import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jaxlib


class Time(NamedTuple):
    """Of one call, in milliseconds."""

    median: float
    least: float
    most: float


def pin() -> None:
    """To one core where there is no accelerator; before JAX starts its threads."""
    accelerator = any(Path("/dev").glob("nvidia[0-9]")) or any(
        Path("/dev").glob("accel*")
    )
    if hasattr(os, "sched_setaffinity") and not accelerator:
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})


class Process:
    """A program that does what each line of its input asks for, and answers "done"."""

    def __init__(self, *command: str) -> None:
        pipe = subprocess.PIPE
        self._process = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True)

    def ask(self, line: str) -> tuple[float, float]:
        """Seconds of wall clock and of CPU, those of its own processes included."""
        wall, cpu = time.perf_counter(), _cpu_seconds(self._process.pid)
        self._process.stdin.write(f"{line}\n")
        self._process.stdin.flush()
        if (answer := self._process.stdout.readline()) != "done\n":
            raise RuntimeError(f"{self._process.args} ended or said {answer!r}")
        cpu = _cpu_seconds(self._process.pid) - cpu
        return time.perf_counter() - wall, cpu

    def close(self) -> None:
        self._process.stdin.close()
        self._process.wait()


class Peer(NamedTuple):
    """A step of another process, which `clock` times beside our functions."""

    process: Process
    kind: str


def _cpu_seconds(pid):
    """Of a process and its descendants, from Linux's /proc."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        # A thread may have started them.
        threads = Path(f"/proc/{pid}/task").glob("*/children")
        children = [child for path in threads for child in path.read_text().split()]
    except OSError:  # it has ended
        return 0.0
    own = (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    return own + sum(map(_cpu_seconds, children))


def _spend(call, number):
    """Seconds of `number` calls."""
    if isinstance(call, Peer):
        return call.process.ask(f"{call.kind} {number}")[1]
    read = time.process_time if on_cpu() else time.perf_counter
    start = read()
    for _ in range(number):
        result = call()
    jax.block_until_ready(result)
    return read() - start


def clock(
    calls: dict[str, Callable[[], Any] | Peer], *, rounds: int = 5, seconds: float = 0.1
) -> dict[str, Time]:
    """Times each function in turn, `rounds` times, for at least `seconds` a time.

    A call before each time is not counted: memory that a virtual machine's host took
    back meanwhile can cost more than a training step, but not one that follows another.
    On CPU it is the CPU time of the process, whatever else the machine does; on an
    accelerator the time until the last of the results is there.
    """
    numbers, times = {}, {name: [] for name in calls}
    for name, call in calls.items():
        _spend(call, 1)  # compiles
        numbers[name] = max(1, round(seconds / max(_spend(call, 1), 1e-9)))
    for _ in range(rounds):
        for name, call in calls.items():
            _spend(call, 1)
            times[name].append(_spend(call, numbers[name]) / numbers[name] * 1e3)
    return {
        name: Time(statistics.median(t), min(t), max(t)) for name, t in times.items()
    }


def on_cpu() -> bool:
    return jax.default_backend() == "cpu"


def conditions() -> dict[str, str]:
    """What a figure has to be read with."""
    return {
        "date": date.today().isoformat(),
        "device": jax.devices()[0].device_kind,
        "processor": _processor(),
        "method": "CPU time of one pinned core" if on_cpu() else "time to the result",
        "jax": jax.__version__,
        "jaxlib": jaxlib.__version__,
        "python": platform.python_version(),
    }


def _processor():
    try:
        with open("/proc/cpuinfo") as file:
            names = [line for line in file if line.startswith("model name")]
        return names[0].partition(":")[2].strip()
    except (OSError, IndexError):
        return platform.processor() or platform.machine()


def temporaries(function: Callable, *args: Any) -> float:
    """MB that the jitted function needs beside its arguments and results."""
    memory = function.lower(*args).compile().memory_analysis()
    return memory.temp_size_in_bytes / 1e6
