"""Hold one query through the index against the exact search of the same gallery: random 2,048-d features in float16.

Bars at `--rows 1000000` on two cores: exact under a second, the index under 50 ms with a recall@10 of 0.95. Random
unit features have no structure that an index could use. Two kinds of queries: independent ones, whose nearest are
hardly nearer than the rest, and gallery images with as much noise as image (cosine 0.71 to it).
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable
from statistics import median

import numpy as np
import torch
from common import report
from torch import Tensor
from torch.nn.functional import normalize

from mprd.search.gallery import Gallery, recall

NUM_FEATURES, TOP, BLOCK_ROWS = 2048, 10, 10_000
TIMED_QUERIES = 8


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="20,000 rows")
    parser.add_argument("--rows", type=int, default=200_000, help="images of the gallery; the bars are for 1000000")
    parser.add_argument("--threads", type=int, default=min(2, os.cpu_count() or 1))
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    generator = torch.Generator().manual_seed(0)
    num_images = 20_000 if options.quick else options.rows
    gallery = Gallery.from_features(draw(num_images, generator))
    num_queries = 50 if options.quick else 100
    kinds = {
        "independent": unit(num_queries, generator).numpy(),
        "noisy copies": copies(gallery, num_queries, generator),
    }
    exact = {name: gallery.search(queries, top=TOP).rows for name, queries in kinds.items()}
    queries = kinds["independent"][:TIMED_QUERIES]
    exact_seconds = sorted_seconds(Turns(gallery, queries), runs=TIMED_QUERIES)
    started = time.perf_counter()
    gallery.build_index()
    build_seconds = time.perf_counter() - started
    index_seconds = sorted_seconds(Turns(gallery, queries), runs=5 * TIMED_QUERIES)
    recalls = {name: recall(gallery.search(kinds[name], top=TOP).rows, exact[name]) for name in kinds}
    exact_ms, index_ms = ([1000 * seconds for seconds in times] for times in (exact_seconds, index_seconds))
    print(
        f"{num_images} images: exact {median(exact_ms):.0f} ms, index {median(index_ms):.1f} ms a query (fastest "
        f"{exact_ms[0]:.0f} and {index_ms[0]:.1f}); "
        + ", ".join(f"recall@{TOP} {value:.3f} ({name}, {num_queries} queries)" for name, value in recalls.items())
    )
    report(
        ratio=median(index_seconds) / median(exact_seconds),
        ratio_is="a query through the index over an exact one; bars at a million: 1 s exact, 0.05 s, recall@10 0.95",
        exact_seconds=median(exact_seconds),
        exact_seconds_fastest=exact_seconds[0],
        index_seconds=median(index_seconds),
        index_seconds_fastest=index_seconds[0],
        # others at work slow a query of two threads more than its share
        load_average=os.getloadavg()[0],
        recall_at_10=recalls,
        build_seconds=build_seconds,
        num_images=num_images,
        num_features=NUM_FEATURES,
    )


class Turns:
    """Search one query after the other, so that no query's candidates stay in the cache."""

    def __init__(self, gallery: Gallery, queries: np.ndarray) -> None:
        self.gallery, self.queries, self.turn = gallery, queries, 0

    def __call__(self) -> None:
        row = self.turn % len(self.queries)
        self.gallery.search(self.queries[row : row + 1], top=TOP)
        self.turn += 1


def sorted_seconds(function: Callable[[], object], *, runs: int) -> list[float]:
    """Return the wall times of calls in seconds, the shortest first; one call goes untimed."""
    function()
    times = []
    for _ in range(runs):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return sorted(times)


def draw(num_images: int, generator: torch.Generator) -> np.ndarray:
    """Draw unit features, float16 [N, D]."""
    features = np.empty((num_images, NUM_FEATURES), np.float16)
    for start in range(0, num_images, BLOCK_ROWS):
        block = unit(min(BLOCK_ROWS, num_images - start), generator)
        features[start : start + len(block)] = block.half().numpy()
    return features


def copies(gallery: Gallery, num_queries: int, generator: torch.Generator) -> np.ndarray:
    """Choose gallery images, and add noise of the same length."""
    rows = torch.randint(len(gallery), (num_queries,), generator=generator)
    return normalize(torch.from_numpy(gallery.features[rows.numpy()]).float() + unit(num_queries, generator)).numpy()


def unit(num_rows: int, generator: torch.Generator) -> Tensor:
    """Draw unit rows."""
    return normalize(torch.randn(num_rows, NUM_FEATURES, generator=generator), dim=1)


if __name__ == "__main__":
    main()
