"""Evaluate the network of a run."""

from __future__ import annotations

import logging
from pathlib import Path

from mprd.data.recognition import elsewhere
from mprd.errors import UserError
from mprd.evaluate.evaluation import evaluate
from mprd.model import load_model
from mprd.runs.dataset import open_dataset
from mprd.runs.folder import RunFolder
from mprd.runtime.device import set_threads

logger = logging.getLogger("mprd")


def evaluate_run(
    folder: RunFolder,
    *,
    data: Path | None,
    best: bool,
    reranks: bool = False,
    whitens: bool = False,
    same_cameras: bool = False,
    name_pattern: str | None = None,
    device: str = "auto",
) -> dict[str, float]:
    """Return the evaluation of a run's network under the column names of metrics.jsonl.

    Args:
        data: another data set, recognized as `mprd doctor` does; query and gallery suffice.
        reranks: evaluate also with k-reciprocal re-ranking.
        whitens: evaluate also features whitened as the training images were.
        same_cameras: its cameras are those trained on, by their names.
        name_pattern: the `data.name_pattern` of `data`, in place of the run's or the recognized one.

    Raises UserError if the run, its checkpoint, or query and gallery, or the whitening asked for, are missing.
    """
    if data is None and (same_cameras or name_pattern is not None):
        raise UserError("--same-cameras and --name-pattern are about other data, and need --data")
    config = folder.read_config()
    set_threads(config.train.threads)
    if data is not None:
        config = config.model_copy(update={"data": elsewhere(config.data, data, name_pattern=name_pattern)})
    dataset = open_dataset(config, needs_train=False)
    if not dataset.can_evaluate:
        raise UserError(f"{dataset.root}: has no query and gallery with identities and cameras in names to evaluate "
                        "on; --data is another data set, --name-pattern says where its names hold them")  # fmt: skip
    is_elsewhere = data is not None and not same_cameras
    model = load_model(folder.path, best=best, device=device, other_cameras=is_elsewhere)
    if is_elsewhere and model.backbone.num_cameras:
        logger.info(
            "%s: cameras take the statistics of all training images; mprd adapt gives them their own", dataset.root
        )
    camera_rows = model.camera_rows([*map(model.camera_number, dataset.camera_names)])
    unknown = [name for name, row in zip(dataset.camera_names, camera_rows, strict=True) if row < 0]
    if same_cameras and unknown:
        logger.warning(
            "%s: cameras that were not trained on take the statistics of all: %s", dataset.root, ", ".join(unknown)
        )
    evaluation = evaluate(
        model.backbone,
        dataset,
        config,
        device=model.device,
        reranks=reranks,
        whitening=model.need_whitening() if whitens else None,
        camera_rows=camera_rows,
    )
    return evaluation.row()
