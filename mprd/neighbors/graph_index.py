"""The similarity graph through a faiss index: candidates from an index of each camera's images, the rest exact.

Shapes: N images, K list width, D feature size, M main dimensions, W candidates of an image, G cameras.
"""

from __future__ import annotations

import logging

import torch
from torch import Tensor

from mprd.neighbors.approximate import Index, build_index
from mprd.neighbors.exact import DENSITY_K, Density, Metric, density_counts, group_images
from mprd.neighbors.graph import ENTRIES_AT_ONCE, SimilarityGraph

logger = logging.getLogger("mprd")

MAIN_DIMENSIONS = 128
"""Dimensions that indexes search in; cosines of what they find are of all."""
BASIS_ROWS = 20_000
"""Most images that the main dimensions are measured on."""
LEAST_PROBES = 16
"""Least number of cells of an inverted file that an image is compared with."""
SEARCH_ROWS = 2**14
"""Rows searched at a time."""


@torch.no_grad()
def find_graph_by_index(
    features: Tensor, camids: Tensor | None, *, width: int, density_k: int | None = None, kind: Index
) -> SimilarityGraph:
    """Search the graph of all images by c approximately; arguments as of `find_graph`.

    An image's candidates are its nearest in each camera, from which densities and c are taken. Raises UserError without
    faiss.
    """
    metric: Metric = "csls" if camids is None else "camera"
    group_ids = group_images(len(features), metric, camids, features.device)
    ks = density_counts(group_ids, density_k or DENSITY_K["camera"])
    reduced = project(features)
    found, densities = [], []
    for group, k in enumerate(ks):
        members = (group_ids == group).nonzero().squeeze(1)
        ids = search_members(reduced, members, kind, count=max(k, width if len(ks) == 1 else width // 2))
        cosines = cosines_of(features, ids)
        cosines, order = cosines.sort(dim=1, descending=True, stable=True)
        found.append((ids.gather(1, order), cosines))
        best, is_found = cosines[:, :k], cosines[:, :k] > -torch.inf
        densities.append(best.where(is_found, 0).sum(1) / is_found.sum(1).clamp(min=1))
    density = Density(torch.stack(densities, dim=1), group_ids, ks)
    ids, cosines = (torch.cat(parts, dim=1) for parts in zip(*found, strict=True))
    ids, scores = rank_candidates(ids, cosines, density, width=min(width, len(features) - 1, ids.shape[1]))
    return SimilarityGraph(features, density, ids, scores)


def project(features: Tensor) -> Tensor:
    """Project features `[N, D]` to their main dimensions `[N, M]`, which keep as much of their products as possible."""
    if features.shape[1] <= MAIN_DIMENSIONS:
        return features
    rows = torch.arange(min(BASIS_ROWS, len(features)), device=features.device)
    sample = features[rows * len(features) // len(rows)]
    # eigenvectors in ascending order
    return features @ torch.linalg.eigh(sample.T @ sample).eigenvectors[:, -MAIN_DIMENSIONS:]


def search_members(reduced: Tensor, members: Tensor, kind: Index, *, count: int) -> Tensor:
    """Return about `count` nearest members of a camera for all images, int64 `[N, count + 1]`, padded with -1."""
    num_images, count = len(reduced), min(count + 1, len(members))
    if count == 0:
        return torch.zeros(num_images, 0, dtype=torch.int64, device=reduced.device)
    rows = reduced.float().numpy(force=True)
    index = build_index(rows[members.numpy(force=True)], kind, width=count, least_probes=LEAST_PROBES)
    parts = [index.search(rows[start : start + SEARCH_ROWS], count)[1] for start in range(0, num_images, SEARCH_ROWS)]
    places = torch.cat([torch.from_numpy(part) for part in parts]).to(reduced.device)
    ids = members[places.clamp(min=0)].masked_fill(places < 0, -1)
    # an image is not its own neighbor
    return ids.masked_fill(ids == torch.arange(num_images, device=ids.device)[:, None], -1)


def cosines_of(features: Tensor, ids: Tensor) -> Tensor:
    """Return the cosines of images and candidates `[N, W]`; -inf for none, id -1."""
    size = max(1, ENTRIES_AT_ONCE // (features.shape[1] * max(1, ids.shape[1])))
    everyone = torch.arange(len(ids), device=ids.device)
    parts = [
        torch.bmm(features[near.clamp(min=0)], features[rows][:, :, None]).squeeze(2)
        for rows, near in zip(everyone.split(size), ids.split(size), strict=True)
    ]
    return torch.cat(parts).masked_fill(ids < 0, -torch.inf)


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
        parts.append((near.gather(1, order).masked_fill(scores == -torch.inf, -1), scores))
    first, second = (torch.cat(part) for part in zip(*parts, strict=True))
    return first, second
