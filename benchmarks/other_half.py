"""Exchange the halves of a data set in the Market layout: train on the test identities, and test on the training ones.

Measures settings that were chosen on one half on unseen data:

    python benchmarks/other_half.py ROOT OUT
    python -m mprd.train --preset recommended --data OUT

Images are linked, not copied. A query is the first image of each identity under a camera that holds a second one; if no
identity has two images under a camera, all images of the first camera are queries.
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from mprd.data.layouts import MARKET_NAME, Crop, read_names
from mprd.data.scan import scan
from mprd.errors import UserError

TRAIN, QUERY, GALLERY = "bounding_box_train", "query", "bounding_box_test"


def read_crops(folder: Path) -> list[Crop]:
    """Return the crops of a folder without junk and distractors, which have no identity."""
    crops = read_names(folder, scan(folder).names, folder, MARKET_NAME)
    return [crop for crop in crops if int(crop.pid or 0) > 0]


def choose_queries(crops: list[Crop]) -> set[Crop]:
    """Select the queries among the new test images."""
    counts = Counter((crop.pid, crop.camid) for crop in crops)
    firsts = {(crop.pid, crop.camid): crop for crop in reversed(crops)}
    if max(counts.values()) > 1:
        return {crop for key, crop in firsts.items() if counts[key] > 1}
    first_camera = min(int(crop.camid or 0) for crop in crops)
    return {crop for crop in crops if int(crop.camid or 0) == first_camera}


def link(crops: Iterable[Crop], folder: Path) -> None:
    """Symlink crops into a new folder."""
    folder.mkdir(parents=True)
    for crop in crops:
        (folder / crop.path.name).symlink_to(crop.path.resolve())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("root", type=Path)
    parser.add_argument("out", type=Path, help="a new folder")
    args = parser.parse_args()
    for name in (TRAIN, QUERY, GALLERY):
        if not (args.root / name).is_dir():
            parser.error(f"{args.root}: has no folder {name}")
    if args.out.exists():
        parser.error(f"{args.out}: already exists")
    try:
        test, *train = (read_crops(args.root / name) for name in (TRAIN, QUERY, GALLERY))
    except UserError as error:
        parser.error(str(error))
    queries = choose_queries(test)
    gallery = [crop for crop in test if crop not in queries]
    parts = {TRAIN: [crop for split in train for crop in split], QUERY: queries, GALLERY: gallery}
    for name, crops in parts.items():
        link(crops, args.out / name)
    print(f"{args.out}: " + ", ".join(f"{len(crops)} in {name}" for name, crops in parts.items()))


if __name__ == "__main__":
    main()
