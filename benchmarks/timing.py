"""How the benchmarks measure: interleaved, in one process, medians and their spread."""

import os
import platform
import statistics
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


def clock(
    calls: dict[str, Callable[[], Any]], *, rounds: int = 5, seconds: float = 0.1
) -> dict[str, Time]:
    """Times each function in turn, `rounds` times, for at least `seconds` a time.

    On CPU it is the CPU time of this process, whatever else the machine does; on an
    accelerator the time until the last of the results is there.
    """
    read = time.process_time if on_cpu() else time.perf_counter
    numbers, times = {}, {name: [] for name in calls}
    for name, call in calls.items():
        for _ in range(2):  # the first compiles
            start = read()
            jax.block_until_ready(call())
        numbers[name] = max(1, round(seconds / max(read() - start, 1e-9)))
    for _ in range(rounds):
        for name, call in calls.items():
            start = read()
            for _ in range(numbers[name]):
                result = call()
            jax.block_until_ready(result)
            times[name].append((read() - start) / numbers[name] * 1e3)
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
    """MB that the compiled function needs beside its arguments and results."""
    memory = jax.jit(function).lower(*args).compile().memory_analysis()
    return memory.temp_size_in_bytes / 1e6
