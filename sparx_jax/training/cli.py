"""What train.py, eval.py and sweeps share: flags, one-sentence errors, exit codes."""

import sys
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

import jax
from absl import app, flags, logging
from ml_collections import ConfigDict, config_flags

from sparx_jax.errors import UserError
from sparx_jax.training.config import default_config, from_config_dict

_CONFIG = config_flags.DEFINE_config_file(
    "config", None, "Config file, such as configs/digits.py.", lock_config=True
)
_WORKDIR = flags.DEFINE_string(
    "workdir", None, "Folder of the run: checkpoints, metrics.jsonl, report.png."
)


def run(main: Callable) -> None:
    """Calls `main(config, workdir)` with the ConfigDict of the command line.

    Bad input, known by UserError or by the flag library, ends the program with one
    sentence and the exit code of the error.
    """

    def guarded(argv):
        del argv
        if not flags.FLAGS["verbosity"].present:
            logging.set_verbosity(logging.ERROR)  # Orbax tells of every file
        if not jax.config.jax_compilation_cache_dir:
            cache = Path.home() / ".cache/sparx_jax/xla"
            jax.config.update("jax_compilation_cache_dir", str(cache))
        try:
            main(_CONFIG.value, _WORKDIR.value)
        except UserError as error:
            _fail(error)

    app.run(guarded, flags_parser=_parse)


def load_config(words: Sequence[str]) -> ConfigDict:
    """The settings that train.py takes from its flags `words`, --config=... first.

    Raises UserError on a bad file, setting or value.
    """
    argv, values = ["train.py", *words], flags.FlagValues()
    options = dict(lock_config=True, flag_values=values, sys_argv=argv)
    config_flags.DEFINE_config_file("config", None, **options)
    with _one_sentence(argv):
        values(argv)
        _check(values)
    return values.config


def _parse(argv):
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
            for name, flag in (("config", _CONFIG), ("workdir", _WORKDIR)):
                if not flag.present:
                    raise UserError(f"--{name} is missing: give --{name}=...")
            _check(flags.FLAGS)  # before any device is touched
            return rest
    except UserError as error:
        _fail(error)


@contextmanager
def _one_sentence(argv):
    try:
        yield
    except (flags.Error, OSError) as error:
        raise UserError(str(error)) from error
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        # How ml_collections rejects a key or a value, here or in the config file.
        message = _unknown_setting(argv) or f"bad configuration: {error}"
        raise UserError(message) from error


def _unknown_setting(argv):
    for word in argv:
        path, node = word.removeprefix("--config.").partition("=")[0], default_config()
        for key in path.split(".") if word.startswith("--config.") else ():
            if not isinstance(node, ConfigDict) or key not in node:
                there = ", ".join(node) if isinstance(node, ConfigDict) else "none"
                return f"unknown setting config.{path}; the settings there: {there}."
            node = node[key]
    return None


def _check(values):
    """Of parsed flags; the flag library takes "(2,x)" for a tuple of one string."""
    for key, value in config_flags.get_override_values(values["config"]).items():
        if isinstance(value, tuple) and any(isinstance(v, str) for v in value):
            raise UserError(
                f"--config.{key}={''.join(map(str, value))} is not a tuple of numbers: "
                "write it as (2,2,7,2)."
            )
    from_config_dict(values["config"].value)


def _fail(error) -> NoReturn:
    message = " ".join(str(error).split())
    print(f"error: {message}", file=sys.stderr, flush=True)
    sys.exit(error.exit_code)
