"""Exchange the halves of a data set in the Market layout: train on the identities of the test, and test on the others.

Settings that were found with one half have not seen the other, so this says what they are worth elsewhere:

    python benchmarks/other_half.py ROOT OUT
    python -m mprd.train --preset recommended --data OUT

Links to the images are written, no copies. Of the new test images the first of each identity under each camera is a
query where it leaves another one there; where nobody has two images under a camera, those of the first camera are.
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from mprd.data.layouts import MARKET_NAME, Crop, read_folder
from mprd.errors import UserError

TRAIN, QUERY, GALLERY = "bounding_box_train", "query", "bounding_box_test"


def read_people(folder: Path) -> list[Crop]:
    """List the crops of a folder by name, junk and distractors, which show nobody known, left out."""
    return [crop for crop in read_folder(folder, MARKET_NAME) if int(crop.pid or 0) > 0]


def choose_queries(crops: list[Crop]) -> set[Crop]:
    """Choose the queries among the new test images."""
    counts = Counter((crop.pid, crop.camid) for crop in crops)
    firsts = {(crop.pid, crop.camid): crop for crop in reversed(crops)}
    if max(counts.values()) > 1:
        return {crop for key, crop in firsts.items() if counts[key] > 1}
    first_camera = min(int(crop.camid or 0) for crop in crops)
    return {crop for crop in crops if int(crop.camid or 0) == first_camera}


def link(crops: Iterable[Crop], folder: Path) -> None:
    """Link images into a new folder."""
    folder.mkdir(parents=True)
    for crop in crops:
        (folder / crop.path.name).symlink_to(crop.path.resolve())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("root", type=Path)
    parser.add_argument("out", type=Path, help="a folder that is not there yet")
    args = parser.parse_args()
    for name in (TRAIN, QUERY, GALLERY):
        if not (args.root / name).is_dir():
            parser.error(f"{args.root}: has no folder {name}")
    if args.out.exists():
        parser.error(f"{args.out}: is there already")
    try:
        test, *train = (read_people(args.root / name) for name in (TRAIN, QUERY, GALLERY))
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
