"""The exceptions for mistakes that a person can mend."""


class UserError(Exception):
    """Bad input, told in one sentence: what was wrong, the value, the remedy.

    The command-line programs print the sentence without a traceback and exit with
    `exit_code`.
    """

    exit_code = 78
    """`EX_CONFIG`: restarting will not help."""


class BadDataError(UserError):
    """More of the data set cannot be read than the configuration allows."""

    exit_code = 65
    """`EX_DATAERR`."""
