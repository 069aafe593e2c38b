"""The one exception that means: the input is wrong, not the program."""


class UserError(Exception):
    """A wrong input, told in one sentence: which file, line or flag, what was found, what was expected, what to do.

    Entry points print it as ``error: <sentence>`` and exit with code 2; no traceback is shown.
    """
