"""The similarity graph in time that grows little faster than N: images in cells, each searched in the cells around it.

The cells are faiss' k-means on the main dimensions, as in an inverted file; cosines of candidates are of all
dimensions, one product a cell.
Shapes: N images, K list width, D feature size, M main dimensions, C cells, G cameras, B images of a cell, W candidates.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from mprd.neighbors.approximate import import_faiss
from mprd.neighbors.exact import PADDING, check_features
from mprd.neighbors.graph import Density, SimilarityGraph, density_counts, group_images

MAIN_DIMENSIONS = 128
"""Dimensions in which cells are formed."""
BASIS_ROWS = 5_000
"""Most images that the main dimensions are measured on."""
CELL_IMAGES = 64
"""Images of a cell, on average."""
ITERATIONS, IMAGES_PER_CELL = 4, 32
"""Of k-means, and the images per cell that it is trained on."""
CANDIDATES = 16
"""Least number of candidates that an image has under a camera, as a multiple of those that are kept."""
SEARCH_ROWS = 2**14
"""Rows ranked at a time."""


@torch.no_grad()
def find_graph_by_index(features: Tensor, camids: Tensor | None, *, width: int) -> SimilarityGraph:
    """Search the graph of all images by c approximately; arguments as of `find_graph`.

    An image's candidates are those of the cells around its own, in each camera as many cells as it takes; densities and
    c are of them. Raises UserError without faiss.
    """
    check_features(features, "features")
    group_ids = group_images(features, camids)
    ks = density_counts(group_ids)
    least = width if len(ks) == 1 else width // 2
    counts = [min(size, max(k, least)) for k, size in zip(ks, torch.bincount(group_ids).tolist(), strict=True)]
    ids, cosines = search_cells(features, Cells.divide(features, group_ids), counts)
    values = [
        found[:, :k].where(found[:, :k] > -torch.inf, 0).sum(1) / (found[:, :k] > -torch.inf).sum(1).clamp(min=1)
        for k, found in zip(ks, cosines.split(counts, dim=1), strict=True)
    ]
    density = Density(torch.stack(values, dim=1), group_ids, ks)
    ids, scores = rank_candidates(ids, cosines, density, width=min(width, len(features) - 1, ids.shape[1]))
    return SimilarityGraph(features, density, ids, scores, reads_lists=True)


@dataclass(frozen=True, eq=False)
class Cells:
    """The images in cells, and in each cell by camera."""

    centers: Tensor
    """`[C, M]`."""
    images: Tensor
    """int64 `[N]`, in order of cell and camera."""
    sizes: Tensor
    """int64 `[C, G]`, images of a cell under a camera."""

    @classmethod
    def divide(cls, features: Tensor, group_ids: Tensor) -> Cells:
        """Divide images with features `[N, D]` under the cameras `group_ids` `[N]`."""
        faiss = import_faiss()
        reduced = project(features)
        rows, num_cells = reduced.float().numpy(force=True), max(1, len(features) // CELL_IMAGES)
        means = faiss.Kmeans(
            rows.shape[1],
            num_cells,
            niter=ITERATIONS,
            min_points_per_centroid=1,
            max_points_per_centroid=IMAGES_PER_CELL,
        )
        means.train(rows)
        cells = torch.from_numpy(means.index.search(rows, 1)[1].squeeze(1)).to(features.device)
        num_groups = int(group_ids.max()) + 1
        places = cells * num_groups + group_ids
        sizes = torch.bincount(places, minlength=num_cells * num_groups)
        centers = torch.from_numpy(means.centroids).to(features.device)
        return cls(centers, places.argsort(stable=True), sizes.view(num_cells, num_groups))

    def around(self, least: list[int]) -> Iterator[tuple[Tensor, list[Tensor]]]:
        """Yield the images of each cell `[B]`, and candidates for them under each camera.

        Of a camera, the nearest cells are taken until they hold `least` of its images, or all.
        """
        num_groups, device = self.sizes.shape[1], self.images.device
        ends = self.sizes.flatten().cumsum(0)
        starts, groups = ends - self.sizes.flatten(), torch.arange(num_groups, device=device)
        wanted = torch.tensor(least, device=device)
        for cell, center in enumerate(self.centers):
            near = (self.centers - center).square().sum(1).argsort()
            is_taken = self.sizes[near].cumsum(0) - self.sizes[near] < wanted
            places = (near * num_groups + groups[:, None])[is_taken.T]
            lengths = ends[places] - starts[places]
            found = self.images[ranges(starts[places], lengths)]
            widths = (self.sizes[near] * is_taken).sum(0).tolist()
            own = self.images[int(starts[cell * num_groups]) : int(ends[(cell + 1) * num_groups - 1])]
            yield own, list(found.split(widths))


def ranges(starts: Tensor, lengths: Tensor) -> Tensor:
    """Return starts[0], starts[0] + 1, ... of each start, `lengths` numbers each."""
    before = lengths.cumsum(0) - lengths
    return (starts - before).repeat_interleave(lengths) + torch.arange(int(lengths.sum()), device=starts.device)


def project(features: Tensor) -> Tensor:
    """Project features `[N, D]` to their main dimensions `[N, M]`, which keep as much of their products as possible."""
    if features.shape[1] <= MAIN_DIMENSIONS:
        return features
    rows = torch.arange(min(BASIS_ROWS, len(features)), device=features.device)
    sample = features[rows * len(features) // len(rows)]
    # eigenvectors in ascending order
    return features @ torch.linalg.eigh(sample.T @ sample).eigenvectors[:, -MAIN_DIMENSIONS:]


def search_cells(features: Tensor, cells: Cells, counts: list[int]) -> tuple[Tensor, Tensor]:
    """Return of each camera the nearest `counts` candidates of all images, int64 `[N, W]`, and their cosines.

    Those of a camera are in falling order; where there are fewer, -1 and -inf.
    """
    shape = len(features), sum(counts)
    ids = torch.full(shape, PADDING, device=features.device)
    cosines = features.new_full(shape, -torch.inf)
    starts = [sum(counts[:group]) for group in range(len(counts))]
    for own, candidates in cells.around([CANDIDATES * count for count in counts]):
        near = torch.cat(candidates)
        sim_BW = features[own] @ features[near].T
        sim_BW.masked_fill_(own[:, None] == near, -torch.inf)
        parts = zip(sim_BW.split([*map(len, candidates)], dim=1), candidates, counts, starts, strict=True)
        for sim, members, count, start in parts:
            values, order = sim.topk(min(count, len(members)), dim=1)
            columns = slice(start, start + values.shape[1])
            cosines[own, columns] = values
            ids[own, columns] = members[order].masked_fill(values == -torch.inf, PADDING)
    return ids, cosines


def rank_candidates(ids: Tensor, cosines: Tensor, density: Density, *, width: int) -> tuple[Tensor, Tensor]:
    """Return the `width` candidates of highest c, int64 `[N, width]`, and c."""
    parts = []
    for rows, near, cosine in zip(
        torch.arange(len(ids), device=ids.device).split(SEARCH_ROWS),
        ids.split(SEARCH_ROWS),
        cosines.split(SEARCH_ROWS),
        strict=True,
    ):
        others = near.clamp(min=0)
        own = density.values[rows].gather(1, density.group_ids[others])
        scores = 2 * cosine - own - density.values[others, density.group_ids[rows][:, None]]
        scores, order = scores.topk(width, dim=1)
        parts.append((near.gather(1, order).masked_fill(scores == -torch.inf, PADDING), scores))
    first, second = (torch.cat(part) for part in zip(*parts, strict=True))
    return first, second
