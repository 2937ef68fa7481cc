"""Hold evaluation from features against a bare matrix product plus one argsort of the same matrix, NumPy's on a CPU.

At the size of Market-1501; features are drawn around 750 identities. Bar: 1 s on a GPU.
Run: python benchmarks/evaluation.py [--quick]
"""

from __future__ import annotations

import argparse
import resource

import numpy as np
import torch
from common import interleaved_medians, report
from torch import Tensor
from torch.nn.functional import normalize

from mprd.metrics import RankMetrics, rank_features

NUM_IDS, NUM_CAMERAS, NUM_FEATURES = 750, 6, 2048
# Noise over signal: a mAP near 0.65, as of a half-trained network
NOISE = 3.4


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a third of the queries, three runs")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    num_queries, num_gallery = (1123 if options.quick else 3368), 15913
    generator = torch.Generator().manual_seed(0)
    centers = torch.randn(NUM_IDS, NUM_FEATURES, generator=generator)
    queries, q_pids, q_camids = draw(centers, num_queries, generator=generator)
    gallery, g_pids, g_camids = draw(centers, num_gallery, generator=generator)
    queries, gallery = queries.to(options.device), gallery.to(options.device)

    def evaluate() -> RankMetrics:
        return rank_features(queries, gallery, q_pids, g_pids, q_camids, g_camids)

    def multiply_and_sort() -> object:
        similarities = queries @ gallery.T
        return similarities.argsort(dim=1) if similarities.is_cuda else np.argsort(similarities.numpy(), axis=1)

    result = evaluate()
    print(f"{num_queries} x {num_gallery}: mAP {result.mAP:.4f}, rank-1 {result.cmc[0]:.4f}, mINP {result.mINP:.4f}")
    seconds, bare_seconds = interleaved_medians(evaluate, multiply_and_sort, runs=3 if options.quick else 5)
    report(
        ratio=seconds / bare_seconds,
        ratio_is="evaluation over product and argsort",
        ran_on=options.device,
        seconds=seconds,
        bare_seconds=bare_seconds,
        num_queries=num_queries,
        num_gallery=num_gallery,
        num_features=NUM_FEATURES,
        peak_mb=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
    )


def draw(centers: Tensor, num_images: int, *, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Draw unit features around the identities' centers, with pids and camids."""
    pids = torch.randint(len(centers), (num_images,), generator=generator)
    camids = torch.randint(NUM_CAMERAS, (num_images,), generator=generator)
    noise = torch.randn(num_images, centers.shape[1], generator=generator)
    return normalize(centers[pids] + NOISE * noise), pids, camids


if __name__ == "__main__":
    main()
