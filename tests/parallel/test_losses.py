from __future__ import annotations

import os
from pathlib import Path

import pytest

from mprd.errors import UserError

pytest.importorskip("ray")
from mprd.parallel.losses import Losses, explain_loss


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (
            "The actor died.\n\tip: 10.0.0.1\nWorker exit detail: killed due to the node running low on memory.",
            "machine 10.0.0.1 ran out of memory: run fewer processes there, or smaller sizes",
        ),
        ("The actor died because its node has died. Node Id: ab", "its machine went away"),
        ("MachineTaken: machine 10.0.0.1 will be taken", "machine 10.0.0.1 will be taken"),
        ("(1) The process is killed by SIGKILL by OOM killer", "its process on its machine was killed, perhaps as"),
        ("It failed:\n  File x\n  ValueError: no crop\n", "RuntimeError: ValueError: no crop"),
        ("", "RuntimeError: no message"),
    ],
)
def test_a_loss_is_explained_in_one_line(error: str, line: str) -> None:
    assert explain_loss(RuntimeError(error)).startswith(line)


def test_losses_count_since_the_last_checkpoint_and_end_with_how_to_go_on(tmp_path: Path) -> None:
    checkpoint = tmp_path / "last.pt"
    losses = Losses(2, checkpoint)
    assert "(1 of 2 times)" in losses.add("x", go_on="again")
    for saved_at in (1, 2, 3):
        checkpoint.touch()
        os.utime(checkpoint, (saved_at, saved_at))
        assert losses.add("x", go_on="again") == "lost (x); going on from the last checkpoint (1 of 2 times)"
    assert "(2 of 2 times)" in losses.add("x", go_on="again")
    with pytest.raises(UserError, match=r"^lost 3 times without a new checkpoint \(train.max_restarts\).*: y; again$"):
        losses.add("y", go_on="again")
