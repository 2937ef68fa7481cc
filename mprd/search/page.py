"""Render the result of a search as one HTML page with the images inside, which loads nothing from elsewhere."""

from __future__ import annotations

import base64
import io
import statistics
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from mprd.data.decode import read_image
from mprd.errors import UserError
from mprd.runs.folder import describe_run
from mprd.runs.html import render_page
from mprd.search.results import Answer, SearchResult, count_first_right, relative_names

if TYPE_CHECKING:
    from PIL.Image import Image

PAGE_BYTES = 4_600_000
"""Size that a page should not exceed; it does where even the smallest thumbnails take more."""
HIT_BYTES = 450
"""Approximate size of a hit without its image."""
SIZES = ((192, 80), (160, 80), (128, 78), (128, 65), (96, 60), (80, 50))
"""Heights in pixels and JPEG qualities, best first; in the last a person can just be made out."""
ANSWERS_PER_PAGE = 10


class Thumbnails(NamedTuple):
    """Scaled-down images."""

    images: dict[str, str]
    """Data URIs by path, without files that cannot be read."""
    ratio: float
    """Median width over height, within [0.4, 2]."""


def render_search(result: SearchResult) -> str:
    """Return the page as HTML."""
    uses = Counter(answer.query.path for answer in result.answers)
    uses.update(hit.path for answer in result.answers for hit in answer.hits)
    thumbnails = make_thumbnails(uses)
    num_right, num_judged = count_first_right(result.answers)
    cameras = sorted({hit.camid for a in result.answers for hit in a.hits if hit.camid is not None})
    return render_page(
        "search.html",
        found=result,
        thumbnails=thumbnails.images,
        ratio=round(thumbnails.ratio, 2),
        names=relative_names(list(uses)),
        cameras=cameras,
        verdict=verdict,
        num_right=num_right,
        num_judged=num_judged,
        page_size=ANSWERS_PER_PAGE,
        made=describe_run(),
    )


def verdict(answer: Answer) -> str:
    """Return `right` if the first hit is right, `late` if a later one is, `wrong` if none is, `unknown` without ids."""
    if not answer.can_be_judged:
        return "unknown"
    if answer.first_right is None:
        return "wrong"
    return "right" if answer.first_right == 1 else "late"


def make_thumbnails(uses: Mapping[str, int]) -> Thumbnails:
    """Scale images down until the page fits into PAGE_BYTES.

    Args:
        uses: how many times the page shows each path.
    """
    originals = {path: small for path in uses if (small := read_scaled(path, SIZES[0][0])) is not None}
    images: dict[str, str] = {}
    for height, quality in SIZES:
        images = {path: data_uri(image, height, quality) for path, image in originals.items()}
        if sum((len(images.get(path, "")) + HIT_BYTES) * count for path, count in uses.items()) <= PAGE_BYTES:
            break
    ratios = [image.width / image.height for image in originals.values()]
    return Thumbnails(images, min(2.0, max(0.4, statistics.median(ratios))) if ratios else 0.5)


def read_scaled(path: str, height: int) -> Image | None:
    """Read an image scaled to at most `height` pixels and twice that width; None if the file cannot be read."""
    try:
        image = read_image(Path(path))
    except UserError:
        return None
    image.thumbnail((2 * height, height))
    return image


def data_uri(image: Image, height: int, quality: int) -> str:
    """Encode an image, scaled to at most `height` pixels, as a JPEG in a data URI."""
    small = image.copy()
    small.thumbnail((2 * height, height))
    file = io.BytesIO()
    small.save(file, "JPEG", quality=quality, optimize=True)
    return "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode()
