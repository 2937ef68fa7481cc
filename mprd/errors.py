"""The errors that are the person's to mend: one line, no traceback, exit code 2."""


class UserError(Exception):
    """Say in one line what was wanted, what came, and which file, field or flag it is about."""


class Interrupted(Exception):
    """Stop between two steps because a signal asked for it; the state has been saved."""


class NonFiniteLoss(UserError):
    """Stop before the step that a NaN or an infinite loss would have taken."""
