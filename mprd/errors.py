"""Errors caused by user input: the commands print one line, no traceback, and exit with code 2."""

STOPPED = 130
"""The exit code of a stop: 128 and the number of SIGINT, as shells have it."""


class UserError(Exception):
    """A message of one line that names the file, field or flag, what was expected and what was found."""


class Interrupted(Exception):
    """A graceful shutdown on a signal, after the state has been saved."""


class NonFiniteLoss(UserError):
    """A NaN or infinite loss, raised before the optimizer step."""
