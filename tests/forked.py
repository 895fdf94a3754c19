"""Runs commands one after the other, each in a fork: JAX is imported once for all.

Reads [[program, words], ...] as JSON and writes [[exit code, stderr], ...].
"""

import json
import os
import runpy
import sys
import tempfile
import warnings

import sklearn.datasets  # noqa: F401  (what the digits are read with)

import sparx_jax.training.cli
import sparx_jax.training.evaluate
import sparx_jax.training.loop  # noqa: F401

warnings.filterwarnings("ignore", "os.fork", RuntimeWarning)  # no device is in use yet


def outcome(program, words):
    """The exit code, and what was written to stderr."""
    with tempfile.TemporaryFile() as stderr:
        if (child := os.fork()) == 0:
            os.dup2(stderr.fileno(), 1)
            os.dup2(stderr.fileno(), 2)
            sys.argv, code = [program, *words], 0
            try:
                runpy.run_path(program, run_name="__main__")
            except SystemExit as error:
                code = error.code or 0
            sys.stderr.flush()
            os._exit(code)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        stderr.seek(0)
        return code, stderr.read().decode()


if __name__ == "__main__":
    print(json.dumps([outcome(*command) for command in json.load(sys.stdin)]))
