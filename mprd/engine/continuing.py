"""Go on from a checkpoint: whether its rows are the present training images, and rows that follow their names."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mprd.data.same_images import ImageRecord, find_changes
from mprd.engine.stats import EpochStats
from mprd.errors import UserError
from mprd.neighbors.exact import PADDING

logger = logging.getLogger("mprd")


def follow_images(
    saved: dict[str, Any], images: ImageRecord, *, path: Path, on_changed: str
) -> tuple[dict[str, Any], Tensor]:
    """Return a checkpoint whose rows are the present images, and the ids of images that it has no features of.

    Raises UserError with what has changed, unless `on_changed` is `continue`.
    """
    nothing = torch.zeros(0, dtype=torch.long)
    if "images" not in saved:
        # one of no training is refused for what it lacks
        if "memory" in saved:
            logger.warning("%s: made by an earlier version, so that only the number of images can be compared", path)
        return saved, nothing
    changes = find_changes(ImageRecord.from_state_dict(saved["images"]), images)
    if not changes:
        return saved, nothing
    if on_changed == "stop":
        raise UserError(
            f"{path}: the training images have changed: {changes}; to go on with those of now, --resume RUN --set "
            "data.on_changed=continue"
        )
    logger.warning("%s: the training images have changed: %s; the epoch starts again", path, changes)
    rows = torch.from_numpy(changes.rows)
    return move_rows(saved, rows), (rows < 0).nonzero().squeeze(1)


def move_rows(saved: dict[str, Any], rows: Tensor) -> dict[str, Any]:
    """Return a checkpoint at the start of its epoch, with the memory and P of other images.

    Args:
        rows: for each image its row in the checkpoint, int64 `[N]`, or -1; without one P_i is {i}.
    """
    known, ids = (rows >= 0).nonzero().squeeze(1), torch.arange(len(rows))
    memory, positives = saved["memory"], saved["positives"]
    features = memory.new_zeros(len(rows), memory.shape[1])
    features[known] = memory[rows[known]]
    table = move_table(positives, rows)
    lonely = (table == PADDING).all(1)
    table[lonely, 0] = ids[lonely]
    refused = move_table(saved.get("refused", positives[:, :0]), rows)
    kept = {name: value for name, value in saved.items() if name != "meta"}
    # what an epoch derives from its images is made again
    derived = {"list_features": None, "similarity": None, "clusters": None, "stats": EpochStats().state_dict()}
    return {**kept, **derived, "memory": features, "positives": table, "refused": refused, "phase": "gcn", "step": 0}


def move_table(table: Tensor, rows: Tensor) -> Tensor:
    """Return a table of image ids `[N, W]`, padded with -1, for other images; those that are gone are padding."""
    known = (rows >= 0).nonzero().squeeze(1)
    # one more for the padding, which stays padding
    moved = torch.full((len(table) + 1,), PADDING)
    moved[rows[known]] = known
    found = torch.full((len(rows), table.shape[1]), PADDING)
    found[known] = moved[table[rows[known]]]
    return found
