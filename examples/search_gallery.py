"""Find the nearest images of a folder for each query image: `python examples/search_gallery.py RUN FOLDER QUERY...`.

Cameras are numbers in file names, `0002_c3_...jpg`: each image is normalized with the statistics of its own camera.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from pathlib import Path

from mprd import load_model
from mprd.search import Gallery


def read_cameras(paths: Sequence[str]) -> list[int | None]:
    """Return the camera in each file name, None without one."""
    return [int(found[1]) if (found := re.search(r"_c(\d+)", Path(path).name)) else None for path in paths]


def main(run: str, folder: str, *queries: str, top: int = 5) -> None:
    """Print the nearest images of each query with their distances."""
    model = load_model(run)
    paths = sorted(str(path) for path in Path(folder).rglob("*.jpg"))
    gallery = Gallery.from_features(model.extract(paths, cameras=read_cameras(paths)), paths=paths)
    gallery.save(Path(run) / "gallery.parquet")  # `Gallery.open` reads it next time, in place of extracting again

    rows, distances = gallery.search(model.extract(queries, cameras=read_cameras(queries)), top=top)
    for query, nearest, far in zip(queries, rows, distances, strict=True):
        print(query)
        for row, distance in zip(nearest, far, strict=True):
            print(f"  {distance:.3f}  {paths[row]}")


if __name__ == "__main__":
    main(*sys.argv[1:])
