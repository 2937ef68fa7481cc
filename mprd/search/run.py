"""Search a folder of images or a feature file with the network of a run."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from mprd.data.same_images import look_at
from mprd.errors import UserError
from mprd.extract.inputs import find_images, ids_from_name, name_patterns
from mprd.model import load_model
from mprd.runs.folder import RunFolder
from mprd.runtime.device import set_threads
from mprd.search.gallery import check_index_kind
from mprd.search.gallery_features import open_gallery
from mprd.search.results import (
    Answer,
    QueryImage,
    SearchResult,
    answer_queries,
    check_cameras,
    whiten_gallery,
)
from mprd.storage.copies import local_only

logger = logging.getLogger("mprd")


@dataclass(frozen=True)
class SearchOptions:
    """The options of `mprd search`."""

    top: int = 10
    cameras: str = "all"
    rerank: bool = False
    whiten: bool = False
    index: str = "exact"
    features_dir: Path | None = None
    """Where a folder's features are cached; `features` in the run folder by default."""
    best: bool = False
    device: str = "auto"
    name_pattern: str | None = None
    other_cameras: bool = False

    def describe_distance(self) -> str:
        distance = "k-reciprocal re-ranked, in [0, 1]" if self.rerank else "1 - cosine, in [0, 2]"
        return distance + (", of whitened features" if self.whiten else "")


def search_run(run: Path, gallery: Path, queries: Sequence[str], options: SearchOptions) -> SearchResult:
    """Extract the queries and, unless cached, the gallery; rank the gallery for each query.

    Raises UserError for unknown or contradictory options, and for images that are missing.
    """
    cameras, kind = check_cameras(options.cameras), check_index_kind(options.index)
    for option in ("rerank", "whiten"):
        if getattr(options, option) and kind != "exact":
            raise UserError(f"--{option} needs the whole gallery, but an index ranks part of it: give one of the two")
    config = RunFolder(run).read_config()
    patterns = name_patterns(config.data, options.name_pattern)
    lists = [find_images(source) for source in queries]
    set_threads(config.train.threads)
    model = load_model(run, best=options.best, device=options.device, other_cameras=options.other_cameras)
    features_dir = options.features_dir or local_only(run) / "features"
    opened = open_gallery(
        model,
        gallery,
        run,
        best=options.best,
        patterns=patterns,
        features_dir=features_dir,
        index=kind,
        whiten=options.whiten,
    )
    files = [(path, name) for images in lists for path, name in zip(*images, strict=True)]
    images = [QueryImage(path, *ids_from_name(name, patterns, model.camera_number)) for path, name in files]
    if gallery.is_file():
        model.tell_cameras([image.camid for image in images])
    features = model.extract([path for path, _ in files], cameras=[image.camid for image in images])
    if options.whiten:
        opened, features = whiten_gallery(opened, features, model)
    answers = answer_queries(opened, images, features, top=options.top, cameras=cameras, rerank=options.rerank)
    if gallery.is_file():
        warn_of_newer_images(answers, gallery)
    names = dict(zip(model.camera_numbers, model.camera_names, strict=True))
    distance = options.describe_distance()
    return SearchResult(model.name, str(gallery), len(opened), kind, cameras, distance, answers, names)


def warn_of_newer_images(answers: Sequence[Answer], file: Path) -> None:
    """Warn of images among the hits that were changed, or replaced by others, after their features were written."""
    _, extracted = look_at(file, "times")
    paths = {hit.path: None for answer in answers for hit in answer.hits}
    newer = [path for path in paths if look_at(path, "times")[1] > extracted]
    if newer:
        logger.warning(
            "%s: %d of the %d images found are newer than these features (first: %s); extract them again",
            file, len(newer), len(paths), newer[0],
        )  # fmt: skip
