"""Errors caused by user input: the commands print one line, no traceback, and exit with code 2."""

STOPPED = 130
"""The exit code of a stop: 128 and the number of SIGINT, as shells have it."""


class UserError(Exception):
    """A message of one line that names the file, field or flag, what was expected and what was found."""


class Interrupted(Exception):
    """A graceful shutdown on a signal, after the state has been saved."""


class NonFiniteLoss(UserError):
    """A NaN or infinite loss, raised before the optimizer step; says where, and what helps."""

    def __init__(self, name: str, value: float | str, *, epoch: int, step: int) -> None:
        super().__init__(
            f"the {name} loss is {value} in epoch {epoch}, step {step}; stopped before the step, the last checkpoint "
            "is sound. A lower learning rate (train.lr_backbone, train.lr_new, gcn.learning_rate) is the usual cure"
        )
