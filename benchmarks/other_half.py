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

TRAIN, QUERY, GALLERY = "bounding_box_train", "query", "bounding_box_test"


def person_and_camera(file: Path) -> tuple[str, str]:
    """Read identity and camera off a name `0001_c1s1_000151_00.jpg`."""
    pid, camera = file.name.split("_")[:2]
    return pid, camera.split("s")[0]


def choose_queries(files: list[Path]) -> set[Path]:
    """Choose the queries among the new test images."""
    counts = Counter(map(person_and_camera, files))
    firsts = {key: file for file in reversed(files) for key in [person_and_camera(file)]}
    if max(counts.values()) > 1:
        return {file for key, file in firsts.items() if counts[key] > 1}
    first_camera = min(camera for _, camera in counts)
    return {file for (_, camera), file in firsts.items() if camera == first_camera}


def link(files: Iterable[Path], folder: Path) -> None:
    """Link files into a new folder."""
    folder.mkdir(parents=True)
    for file in files:
        (folder / file.name).symlink_to(file.resolve())


def images(folder: Path) -> list[Path]:
    """List the images of a folder by name, junk and distractors without an identity left out."""
    return [file for file in sorted(folder.glob("*.jpg")) if not file.name.startswith(("-1", "0000"))]


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
    test = images(args.root / TRAIN)
    queries = choose_queries(test)
    link([*images(args.root / QUERY), *images(args.root / GALLERY)], args.out / TRAIN)
    link(queries, args.out / QUERY)
    link((file for file in test if file not in queries), args.out / GALLERY)
    sizes = ", ".join(f"{len(images(args.out / name))} in {name}" for name in (TRAIN, QUERY, GALLERY))
    print(f"{args.out}: {sizes}")


if __name__ == "__main__":
    main()
