"""The one exception that a user's input can cause."""


class InputError(ValueError):
    """Bad input from the user: one line that names the value and the fix.

    The command line prints it and exits with status 2; nothing was computed or written before.
    """
