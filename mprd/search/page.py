"""What a search found as one HTML page, pictures inside, that needs no network."""

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
from mprd.search.results import Answer, Search, count_first_right, short_names

if TYPE_CHECKING:
    from PIL.Image import Image

PAGE_BYTES = 4_600_000
"""What a page should weigh at most, as long as its pictures can still be made out."""
HIT_BYTES = 450
"""About what a result takes beside its picture."""
SIZES = ((192, 80), (160, 80), (128, 78), (128, 65), (96, 60), (80, 50))
"""Height in pixels and JPEG quality, from the best to what is just enough."""
ANSWERS_A_PAGE = 10


class Thumbnails(NamedTuple):
    """Pictures by path, as data URIs; a file that cannot be read has none."""

    images: dict[str, str]
    ratio: float
    """Their usual width over height."""


def render_search(found: Search) -> str:
    """Write the page."""
    uses = Counter(answer.query.path for answer in found.answers)
    uses.update(hit.path for answer in found.answers for hit in answer.hits)
    thumbnails = make_thumbnails(uses)
    num_right, num_judged = count_first_right(found.answers)
    cameras = sorted({hit.camid for a in found.answers for hit in a.hits if hit.camid is not None})
    return render_page(
        "search.html",
        found=found,
        thumbnails=thumbnails.images,
        ratio=round(thumbnails.ratio, 2),
        names=short_names(list(uses)),
        cameras=cameras,
        verdict=verdict,
        num_right=num_right,
        num_judged=num_judged,
        page_size=ANSWERS_A_PAGE,
        made=describe_run(),
    )


def verdict(answer: Answer) -> str:
    """Say how an answer begins: `right`, `late` (right further on), `wrong`, or `unknown`."""
    if not answer.can_be_judged:
        return "unknown"
    if answer.first_right is None:
        return "wrong"
    return "right" if answer.first_right == 1 else "late"


def make_thumbnails(uses: Mapping[str, int]) -> Thumbnails:
    """Shrink pictures until a page that shows each so many times weighs what it should."""
    pictures = {path: small for path in uses if (small := shrink(path, SIZES[0][0])) is not None}
    images: dict[str, str] = {}
    for height, quality in SIZES:
        images = {path: data_uri(picture, height, quality) for path, picture in pictures.items()}
        if sum((len(images.get(path, "")) + HIT_BYTES) * count for path, count in uses.items()) <= PAGE_BYTES:
            break
    ratios = [picture.width / picture.height for picture in pictures.values()]
    return Thumbnails(images, min(2.0, max(0.4, statistics.median(ratios))) if ratios else 0.5)


def shrink(path: str, height: int) -> Image | None:
    """Read a picture, at most so high and twice as wide; None where only its features are left."""
    try:
        picture = read_image(Path(path))
    except UserError:
        return None
    picture.thumbnail((2 * height, height))
    return picture


def data_uri(picture: Image, height: int, quality: int) -> str:
    """Write a picture as a JPEG of at most so many pixels of height in a data URI."""
    small = picture.copy()
    small.thumbnail((2 * height, height))
    file = io.BytesIO()
    small.save(file, "JPEG", quality=quality, optimize=True)
    return "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode()
