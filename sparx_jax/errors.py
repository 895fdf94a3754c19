"""What ends a program with one sentence, and the exit code that launchers act on."""


class UserError(Exception):
    """Bad input, told in one sentence: what was wrong, the value, the remedy.

    The command-line programs print the sentence without a traceback and exit with
    `exit_code`; the codes are those of sysexits.h where it has one.
    """

    exit_code = 78
    """EX_CONFIG: restarting will not help."""


class DamagedError(UserError):
    """A checkpoint cannot be read, or is not what was saved."""

    exit_code = 66
    """EX_NOINPUT."""


class BadDataError(UserError):
    """More of the data set cannot be read than the configuration allows."""

    exit_code = 65
    """EX_DATAERR."""


class TooManyUnreadableError(BadDataError):
    """So many examples that all processes stop, after the same step."""


class NonFiniteLossError(UserError):
    """Too many steps in a row had a loss or gradient that is not finite."""

    exit_code = 70
    """EX_SOFTWARE."""


class StorageError(UserError):
    """The work folder could not be written."""

    exit_code = 74
    """EX_IOERR."""


class BusyError(UserError):
    """Another process trains in the work folder."""

    exit_code = 75
    """EX_TEMPFAIL."""


class Preempted(UserError):  # noqa: N818  (nothing went wrong)
    """The run was asked to stop, and has saved its state: start it again."""

    exit_code = 17


class PeerLostError(UserError):
    """Another process of the job died or did not come: start all of them again."""

    exit_code = 134
    """That of SIGABRT, with which JAX itself ends a process that lost its peers."""
