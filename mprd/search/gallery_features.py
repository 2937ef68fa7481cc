"""Open the features of a gallery: a feature file, or a folder whose features are cached."""

from __future__ import annotations

import glob
import hashlib
import logging
import re
from collections.abc import Sequence
from pathlib import Path

from mprd.data.decode import VERSION
from mprd.data.same_images import digest_files
from mprd.errors import UserError
from mprd.extract.inputs import ImageList, find_images
from mprd.extract.stream import ExtractOptions, extract_to_file, stream_parts, whitened_name
from mprd.model import Model
from mprd.runs.console import ImageLine
from mprd.search.gallery import Gallery, IndexKind
from mprd.text import new_console

logger = logging.getLogger("mprd")


def open_gallery(
    model: Model,
    gallery: Path,
    run: Path,
    *,
    best: bool,
    patterns: Sequence[re.Pattern[str]],
    features_dir: Path,
    index: IndexKind,
    whiten: bool,
) -> Gallery:
    """Open a feature file, or that of a folder, which is extracted unless it is cached.

    Args:
        whiten: features will be whitened, or are.

    Raises UserError for features of another size than those of the model, and where there is no whitening.
    """
    names = [model.name, whitened_name(model)] if whiten else [model.name]
    file = gallery
    if gallery.is_dir():
        images = find_images(str(gallery))
        file = features_dir / cache_name(model, gallery, images, run=run, best=best, patterns=patterns)
        if not file.is_file():
            extract_gallery(model, images, file, run, best=best, patterns=patterns)
    opened = Gallery.open(file, index=index)
    if opened.features.shape[1] != model.num_features:
        raise UserError(
            f"{file}: features of {opened.features.shape[1]} numbers, but the network of {run} makes "
            f"{model.num_features}; extract them with this run"
        )
    if opened.run not in names:
        logger.warning("%s: features of run %s, but the queries' are of %s", file, opened.run, model.name)
    elif opened.weights not in ("", model.fingerprint):
        logger.warning(
            "%s: features of other weights or statistics than the queries' (%s was trained on, or --best or "
            "--other-cameras differ); extract them again",
            file,
            model.name,
        )
    return opened


def cache_name(
    model: Model, gallery: Path, images: ImageList, *, run: Path, best: bool, patterns: Sequence[re.Pattern[str]]
) -> str:
    """Return a file name of the folder, a hash of what is asked, and one of weights and the images' sizes and times.

    The first two are the same after a change of the folder or the network, whose file then replaces the former.
    """
    digest = digest_files(images.paths, model.fingerprint, VERSION)
    folder = gallery.resolve()
    asked = [folder, run.resolve(), best, model.camera_numbers, *(pattern.pattern for pattern in patterns)]
    asked_hash = hashlib.sha256("\n".join(map(str, asked)).encode(errors="surrogateescape")).hexdigest()[:6]
    return f"{folder.name}-{asked_hash}-{digest[:10]}.parquet"


def extract_gallery(
    model: Model, images: ImageList, file: Path, run: Path, *, best: bool, patterns: Sequence[re.Pattern[str]]
) -> None:
    """Extract a folder's features into the cache, and remove what an earlier state of it or of the run left there."""
    stale = list(file.parent.glob(f"{glob.escape(file.stem.rpartition('-')[0])}-*.parquet*"))
    why = "the folder or the network has changed; " if stale else ""
    logger.info("%sextracting %d images of the gallery into %s", why, len(images.paths), file)
    config = model.config
    options = ExtractOptions(
        run.resolve(),
        best,
        str(model.device),
        config.eval.batch_size,
        skip_bad=True,
        decoders=config.data.num_workers,
    )
    with ImageLine(new_console(stderr=True), len(images.paths)) as line:
        extract_to_file(
            model,
            options,
            images,
            file,
            dtype="float32",
            patterns=patterns,
            stream=stream_parts,
            on_images=line.advance,
        )
    for path in stale:
        path.unlink(missing_ok=True)
