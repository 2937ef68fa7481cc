"""Compare the exact neighbor search with the blocked matrix product of the same features.

The memory has Market-1501's size, in clusters of one identity each. Limit: ratio 1.25, and no N x N matrix in memory.
"""

from __future__ import annotations

import argparse
import resource

import torch
from common import interleaved_medians, report
from torch import Tensor
from torch.nn.functional import normalize

from mprd.neighbors.exact import NeighborTable, find_neighbors, rows_at_once

NUM_FEATURES, IMAGES_PER_ID = 2048, 17
K, SIMILARITY, K_MAX = 8, 0.6, 64
# relative to the centers; gives cosines of about 0.64 within an identity, so that k_i exceeds k in most lists
NOISE = 0.75


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a third of the images, three runs")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    features = draw(4312 if options.quick else 12936).to(options.device)
    block_rows = rows_at_once(len(features), features.device)

    def search() -> NeighborTable:
        return find_neighbors(features, k=K, similarity=SIMILARITY, k_max=K_MAX)

    before = peak_mb()
    table = search()
    after = peak_mb()
    lengths = (table.ids >= 0).sum(1).float()
    print(
        f"{len(features)} images: lists of {lengths.min():.0f} to {lengths.max():.0f}, {lengths.mean():.1f} on average"
    )
    runs = 3 if options.quick else 5
    seconds, bare_seconds = interleaved_medians(search, lambda: multiply(features, block_rows), runs=runs)
    report(
        ratio=seconds / bare_seconds,
        ratio_is="search over bare blocked product; limit: 1.25",
        seconds=seconds,
        bare_seconds=bare_seconds,
        ran_on=options.device,
        num_images=len(features),
        num_features=NUM_FEATURES,
        block_rows=block_rows,
        peak_mb_before=before,
        peak_mb_after=after,
        full_matrix_mb=len(features) ** 2 * 4 // 2**20,
    )


def multiply(features: Tensor, block_rows: int) -> None:
    """Multiply the features with themselves in blocks, into one buffer."""
    buffer = features.new_empty((block_rows, len(features)))
    for rows in features.split(block_rows):
        torch.mm(rows, features.T, out=buffer[: len(rows)])


def draw(num_images: int) -> Tensor:
    """Draw unit features [N, D] around a center for each identity."""
    generator = torch.Generator().manual_seed(0)
    centers = torch.randn(num_images // IMAGES_PER_ID + 1, NUM_FEATURES, generator=generator)
    pids = torch.randint(len(centers), (num_images,), generator=generator)
    return normalize(centers[pids] + NOISE * torch.randn(num_images, NUM_FEATURES, generator=generator), dim=1)


def peak_mb() -> int:
    """Return the peak main memory of this process so far, in MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024


if __name__ == "__main__":
    main()
