"""What train.py, eval.py and sweeps share: flags, one-sentence errors, exit codes."""

import errno
import logging
import os
import re
import sys
import traceback
from collections.abc import Callable, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import NoReturn

import jax
from absl import app, flags
from absl import logging as absl_logging
from ml_collections import ConfigDict, config_flags

from sparx_jax.errors import Preempted, StorageError, UserError
from sparx_jax.parallel import processes
from sparx_jax.training.config import default_config, from_config_dict

_STORAGE_ERRNOS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO)
_CONFIG = config_flags.DEFINE_config_file(
    "config", None, "Config file, such as configs/digits.py.", lock_config=True
)
_WORKDIR = flags.DEFINE_string(
    "workdir", None, "Folder of the run: checkpoints, metrics.jsonl, report.png."
)
_DISTRIBUTED = flags.DEFINE_enum(
    "distributed",
    "auto",
    ["auto", "on", "off"],
    "Whether to join other processes; auto: if a cluster or the environment names any.",
)
_START_TIMEOUT = flags.DEFINE_integer(
    "start_timeout_s", 300, "Longest wait for the other processes.", lower_bound=1
)
_HEARTBEAT_TIMEOUT = flags.DEFINE_integer(
    "heartbeat_timeout_s", 100, "Silence after which a process is dead.", lower_bound=1
)


def run(
    main: Callable,
    *,
    needs_workdir: bool = True,
    joins: bool = True,
    is_whole: bool = True,
) -> None:
    """Calls `main(config, workdir)` with the ConfigDict of the command line.

    What a UserError tells and what the flag library refuses ends the program with one
    sentence and the exit code of `sparx_jax.errors`.

    Args:
      main: the program.
      needs_workdir: whether --workdir must be given.
      joins: whether it is one of the processes of a job that may have several.
      is_whole: whether the settings are those of a run, and to be checked as such.
    """

    def guarded(argv):
        del argv
        if not flags.FLAGS["verbosity"].present:
            absl_logging.set_verbosity(absl_logging.ERROR)
            # A full disk is told once, not by Orbax and asyncio for each array too.
            own = lambda record: "/orbax/" not in record.pathname  # noqa: E731
            absl_logging.get_absl_logger().addFilter(own)
            logging.getLogger("asyncio").setLevel(logging.CRITICAL)
        if not jax.config.jax_compilation_cache_dir:
            cache = Path.home() / ".cache/sparx_jax/xla"
            jax.config.update("jax_compilation_cache_dir", str(cache))
        try:
            processes.start(
                _DISTRIBUTED.value if joins else "off",
                start_timeout_s=_START_TIMEOUT.value,
                heartbeat_timeout_s=_HEARTBEAT_TIMEOUT.value,
            )
            # As in --workdir=~/run, where no shell does it.
            workdir = _WORKDIR.value and os.path.expanduser(_WORKDIR.value)
            main(_CONFIG.value, workdir)
        except UserError as error:
            _fail(error)
        except Exception as error:
            if isinstance(error, OSError) and error.errno in _STORAGE_ERRNOS:
                _fail(StorageError(f"{error}: make room, then start again."))
            if not jax.distributed.is_initialized():
                raise
            traceback.print_exc()
            if lost := processes.lost_peer(error):
                _fail(lost)
            processes.end(1)

    app.run(guarded, flags_parser=partial(_parse, needs_workdir, is_whole))


def job_flags() -> list[str]:
    """What the command line says of joining other processes, for another program."""
    holders = _DISTRIBUTED, _START_TIMEOUT, _HEARTBEAT_TIMEOUT
    return [f"--{flag.name}={flag.value}" for flag in holders if flag.present]


def load_config(words: Sequence[str]) -> ConfigDict:
    """The settings that train.py takes from its flags `words`, --config=... first.

    Raises UserError on a bad file, setting or value.
    """
    argv, values = ["train.py", *words], flags.FlagValues()
    options = dict(lock_config=True, flag_values=values, sys_argv=argv)
    config_flags.DEFINE_config_file("config", None, **options)
    with _one_sentence(argv):
        values(argv)
        _check(values, is_whole=True)
    return values.config


def _parse(needs_workdir, is_whole, argv):
    argv = _last_of_each(argv)
    try:
        with _one_sentence(argv):
            rest = flags.FLAGS(argv)
            if flags.FLAGS["help"].value or flags.FLAGS["helpfull"].value:
                return rest
            if len(rest) > 1:
                raise UserError(
                    f"unexpected argument {rest[1]!r}: give values with an equals "
                    "sign, as in --config.use_ema=False."
                )
            needed = {"config": _CONFIG}
            if needs_workdir:
                needed["workdir"] = _WORKDIR
            for name, flag in needed.items():
                if not flag.present:
                    raise UserError(f"--{name} is missing: give --{name}=...")
                if flag.value == "":
                    raise UserError(f"--{name}= is empty: give it a path.")
            _check(flags.FLAGS, is_whole)  # before any device is touched
            return rest
    except UserError as error:
        _fail(error)


def _last_of_each(words):
    """Of a setting given twice the last counts; tuples would be joined."""
    key = lambda word: word.partition("=")[0]  # noqa: E731
    last = {key(word): i for i, word in enumerate(words)}
    return [
        word
        for i, word in enumerate(words)
        if last[key(word)] == i or not re.match(r"--config\..*=", word)
    ]


@contextmanager
def _one_sentence(argv):
    try:
        yield
    except (flags.Error, OSError) as error:
        text = str(error).strip()
        if "get_config() takes 0 positional arguments" in text:
            text = (
                "get_config() of the config file takes no argument: leave out the "
                "colon and what follows it, or --sweep variant=..."
            )
        elif "Traceback" in text:  # of get_config; its last line says what was wrong
            text = f"bad configuration: {text.splitlines()[-1]}"
        raise UserError(text) from error
    except UserError:
        raise
    except Exception as error:  # of the config file, or how ml_collections rejects
        message = _unknown_setting(argv) or f"bad configuration: {_told(error, argv)}"
        raise UserError(message) from error


def _told(error, argv):
    """The error, and where it was raised: in the config file, if there at all."""
    fields = r"Other fields present:.*?(?=Did you mean|$)"  # some 6,000 characters
    text = f"{type(error).__name__}: {re.sub(fields, '', str(error), flags=re.S)}"
    frames = traceback.extract_tb(error.__traceback__)
    files = [word.removeprefix("--config=").partition(":")[0] for word in argv]
    here = [frame for frame in frames if frame.filename in files]
    place = here[-1] if here else frames[-1]  # or in our own code, which is a bug
    return f"{text} ({place.filename}, line {place.lineno})"


def _unknown_setting(argv):
    for word in argv:
        path, node = word.removeprefix("--config.").partition("=")[0], default_config()
        for key in path.split(".") if word.startswith("--config.") else ():
            if not isinstance(node, ConfigDict) or key not in node:
                there = ", ".join(node) if isinstance(node, ConfigDict) else "none"
                return f"unknown setting config.{path}; the settings there: {there}."
            node = node[key]
    return None


def _check(values, is_whole):
    """Of parsed flags; the flag library takes "(2,x)" for a tuple of one string."""
    config = values["config"].value
    # What a file that cannot be loaded left behind raises why, at keys().
    if config is None or set(config.keys()) != set(default_config()):
        raise UserError(
            "get_config() of the config file must return default_config(), with values "
            "changed."
        )
    for key, value in config_flags.get_override_values(values["config"]).items():
        if isinstance(value, ConfigDict):
            raise UserError(
                f"--config.{key}=... would replace the whole group: set its parts, "
                f"--config.{key}.NAME=VALUE."
            )
        if isinstance(value, tuple) and any(isinstance(v, str) for v in value):
            raise UserError(
                f"--config.{key}={''.join(map(str, value))} is not a tuple of numbers: "
                "write it as '(2,2,7,2)'."
            )
    if is_whole:
        from_config_dict(config)


def _fail(error: UserError) -> NoReturn:
    message = " ".join(str(error).split())
    label = "" if isinstance(error, Preempted) else "error: "
    with suppress(OSError):  # the log may be on the disk that is full
        print(f"{label}{message}", file=sys.stderr, flush=True)
    processes.end(error.exit_code)
