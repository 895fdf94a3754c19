"""The one exception for mistakes that a person can mend."""


class UserError(Exception):
    """Bad input, told in one sentence: what was wrong, the value, the remedy.

    The command-line programs print the sentence without a traceback and exit with 78
    (`EX_CONFIG`).
    """
