"""Find the nearest images of a folder for each query image: `python examples/search_gallery.py RUN FOLDER QUERY...`.

All images take the statistics of all training images; `model.extract(paths, cameras=[...])` takes each camera's own.
"""

from __future__ import annotations

import sys
from pathlib import Path

from mprd import load_model
from mprd.search import Gallery


def main(run: str, folder: str, *queries: str, top: int = 5) -> None:
    """Print the nearest images of each query with their distances."""
    model = load_model(run)
    paths = sorted(str(path) for path in Path(folder).rglob("*.jpg"))
    gallery = Gallery.from_features(model.extract(paths), paths=paths)
    gallery.save(Path(run) / "gallery.parquet")  # `Gallery.open` reads it next time, in place of extracting again

    rows, distances = gallery.search(model.extract(queries), top=top)
    for query, nearest, far in zip(queries, rows, distances, strict=True):
        print(query)
        for row, distance in zip(nearest, far, strict=True):
            print(f"  {distance:.3f}  {paths[row]}")


if __name__ == "__main__":
    main(*sys.argv[1:])
