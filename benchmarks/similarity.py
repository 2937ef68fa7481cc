"""Time the similarity (graph, J, whitening in two rounds, and the labels) on drawn features.

    python -m benchmarks.similarity --images 6660 --search exact

Also the peak memory and, under an index, the share of the exact neighbors and of the exact positives that it finds on a
sample. Results: docs/performance.md.
"""

from __future__ import annotations

import argparse
import resource
import time

import torch
from torch import Tensor
from torch.nn.functional import normalize

from benchmarks.common import report
from mprd.config.schema import NeighborsConfig
from mprd.neighbors.graph import find_graph
from mprd.neighbors.lists import FrozenLists
from mprd.neighbors.similarity import GRAPH_WIDTH, fit_similarity

CAMERAS, PER_IDENTITY, MAIN, THRESHOLD = 6, 18, 64, 0.4


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=6660)
    parser.add_argument("--features", type=int, default=1280)
    parser.add_argument("--search", choices=["exact", "ivf"], default="exact")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--compare", action="store_true", help="with the exact search, which takes N^2")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    features, camids = draw(options.images, options.features)
    config = NeighborsConfig(whitening=True, search=options.search)
    started = time.monotonic()
    similarity = fit_similarity(features, camids, config)
    fitted = time.monotonic()
    lists = FrozenLists(features, camids, config, similarity=similarity)
    positives = lists.similarities.above(THRESHOLD)[0]
    ended = time.monotonic()
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    losses = compare(lists, camids) if options.compare else {}
    report(
        ratio=None,
        ratio_is="none: limits are 120 s and 6 GB at 100,000 images on two cores",
        seconds=ended - started,
        fit_seconds=fitted - started,
        label_seconds=ended - fitted,
        peak_gb=memory,
        positives_per_image=float((positives >= 0).sum(1).float().mean()),
        num_images=options.images,
        num_features=options.features,
        search=options.search,
        threads=options.threads,
        **losses,
    )


def draw(num_images: int, num_features: int) -> tuple[Tensor, Tensor]:
    """Draw identities of 18 images under six cameras, in a subspace as features of a network are, with noise in all."""
    generator = torch.Generator().manual_seed(0)
    basis = torch.randn(MAIN, num_features, generator=generator) / num_features**0.5
    identities = torch.randn(-(-num_images // PER_IDENTITY), MAIN, generator=generator)
    inside = identities.repeat_interleave(PER_IDENTITY, 0)[:num_images]
    inside = inside + 0.9 * torch.randn(num_images, MAIN, generator=generator)
    features = inside @ basis
    features += 0.3 * torch.randn(features.shape, generator=generator) * (MAIN / num_features) ** 0.5
    camids = torch.randint(CAMERAS, (num_images,), generator=generator)
    return normalize(features), camids


def compare(lists: FrozenLists, camids: Tensor) -> dict[str, float]:
    """Return the shares of exact neighbors and exact positives that the searched lists and labels hold."""
    exact = find_graph(lists.features, camids, width=GRAPH_WIDTH)
    width = lists.config.k_max
    is_found = (exact.ids[:, :width, None] == lists.graph.ids[:, None, :width]).any(2)
    settings = lists.config.model_copy(update={"search": "exact"})
    truth = FrozenLists(lists.source, camids, settings, similarity=lists.similarity)
    keys, other = (one.similarities.keys[one.similarities.values > THRESHOLD] for one in (truth, lists))
    return {
        "list_recall": float(is_found.float().mean()),
        "positive_recall": float(torch.isin(keys, other).float().mean()),
        "positive_precision": float(torch.isin(other, keys).float().mean()),
    }


if __name__ == "__main__":
    main()
