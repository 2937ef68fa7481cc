"""Cluster-Contrast (Dai et al., ACCV 2022), a baseline: DBSCAN's clusters as classes, and a memory of centroids.

It uses no part of MPRD; it runs in the same loop so that both can be compared.
Shapes: N images, C clusters, B batch, D feature size.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from mprd.neighbors.jaccard import jaccard_blocks
from mprd.neighbors.re_ranking import distance_weights, find_nearest
from mprd.pairs import rules

logger = logging.getLogger("mprd")

OUTLIER = -1
MIN_SAMPLES = 4
"""Neighbors that make an image the core of a DBSCAN cluster; this and the next are the values of Cluster-Contrast."""
K1, K2 = 30, 6
"""Length of the lists behind the Jaccard distance, with the image itself as SpCL's search returns them (Zhong et al.
have one image more), and of those it is averaged over."""
NUM_INSTANCES = 4
"""Images of a cluster in a batch of 32; theirs is 16 of 256."""
TEMPERATURE = 0.05
"""Of InfoNCE."""
OLD_WEIGHT = 0.1
"""Weight of the old centroid when an image moves it."""


def find_clusters(features: Tensor, compared: Tensor, *, eps: float) -> ClusterMemory | None:
    """Cluster the images as Cluster-Contrast does before each epoch; None, with a warning, for fewer than two clusters.

    Args:
        features: `[N, D]`, unit length, of which centroids are the means.
        compared: `[N, D]`, unit length, of which distances are taken.
    """
    labels = cluster_images(compared, eps=eps)
    if int(labels.max()) < 1:
        logger.warning("clusters.eps = %g finds no two clusters; this epoch trains as single does", eps)
        return None
    return ClusterMemory.from_features(features, labels)


def cluster_images(features: Tensor, *, eps: float) -> Tensor:
    """Cluster unit features `[N, D]` by DBSCAN on k-reciprocal Jaccard distances; return labels int64 `[N]`.

    Clusters are counted from 0, outliers are -1. Distances from `eps` on are never stored.
    """
    # scikit-learn takes a second to import
    from scipy.sparse import csr_array
    from sklearn.cluster import DBSCAN

    num_images = len(features)
    lists, _ = find_nearest(features, K1)
    weights = distance_weights(features, lists, k1=K1, k2=K2)
    blocks = jaccard_blocks(weights, least=1 - eps)
    first, second, jaccard = (np.concatenate(parts) for parts in zip(*blocks, strict=True))
    own = np.arange(num_images)
    # a sparse matrix drops explicit zeros
    distances = np.concatenate([np.tile(1 - jaccard, 2), np.zeros(num_images)]).clip(min=1e-9)
    ends = (np.concatenate([first, second, own]), np.concatenate([second, first, own]))
    graph = csr_array((distances, ends), shape=(num_images, num_images))
    found = DBSCAN(eps=eps, min_samples=MIN_SAMPLES, metric="precomputed").fit_predict(graph)
    return torch.from_numpy(found.astype(np.int64)).to(features.device)


def same_cluster(labels: Tensor, ids: Tensor) -> Tensor:
    """Mark the images of each image's cluster, boolean `[B, N]`; of an outlier's only itself."""
    own = labels[ids][:, None]
    return ((own == labels) & (own != OUTLIER)) | rules.own_index(ids, len(labels))


def balanced_batches(
    labels: Tensor,
    camids: Tensor | None,
    *,
    batch_size: int,
    generator: torch.Generator,
) -> list[list[int]]:
    """Draw an epoch of batches, each of a quarter of `batch_size` clusters and four images of each.

    Clusters come in random order, in rounds, until as many images are drawn as are in clusters. Outliers are left
    out. A group is a random image of the cluster and others under other cameras, then under its own. Unlike in
    Cluster-Contrast's code no image is repeated to fill a group: the memory takes an image once a batch.
    """
    images, sizes = labels.cpu().argsort(stable=True), torch.bincount(labels.cpu() + 1)
    # the first are outliers
    members = images.split(sizes.tolist())[1:]
    cameras = torch.zeros_like(labels).cpu() if camids is None else camids.cpu()
    num_clusters = min(len(members), max(1, batch_size // NUM_INSTANCES))
    batches, order = [], list[int]()
    for _ in range(max(1, sum(map(len, members)) // (num_clusters * NUM_INSTANCES))):
        if len(order) < num_clusters:
            order = torch.randperm(len(members), generator=generator).tolist()
        chosen, order = order[:num_clusters], order[num_clusters:]
        groups = (draw_group(members[cluster], cameras, generator) for cluster in chosen)
        batches.append([image for group in groups for image in group])
    return batches


def draw_group(images: Tensor, cameras: Tensor, generator: torch.Generator) -> list[int]:
    """Draw at most four of the images `[m]`: one at random, then of other cameras than its, then of its own."""
    images = images[torch.randperm(len(images), generator=generator)]
    is_near = cameras[images] == cameras[images[0]]
    is_near[0] = False
    return images[is_near.byte().argsort(stable=True)[:NUM_INSTANCES]].tolist()


@dataclass
class ClusterMemory:
    """The centroids of the clusters, and the cluster of each image."""

    centroids: Tensor
    """`[C, D]`, unit length."""
    labels: Tensor
    """int64 `[N]`, -1 for outliers."""

    @classmethod
    def from_features(cls, features: Tensor, labels: Tensor) -> ClusterMemory:
        """Start with the mean feature of each cluster."""
        is_in = labels != OUTLIER
        sums = features.new_zeros(int(labels.max()) + 1, features.shape[1])
        return cls(F.normalize(sums.index_add_(0, labels[is_in], features[is_in])), labels)

    def loss(self, features: Tensor, ids: Tensor, *, temperature: float = TEMPERATURE) -> Tensor:
        """Return InfoNCE of features `[B, D]` of the images `ids` against all centroids, averaged."""
        return F.cross_entropy(features @ self.centroids.T / temperature, self.labels[ids])

    def state_dict(self) -> dict[str, Tensor]:
        return {"centroids": self.centroids, "labels": self.labels}

    @torch.no_grad()
    def update(self, features: Tensor, ids: Tensor, *, old_weight: float = OLD_WEIGHT) -> None:
        """Move each image's centroid towards its feature, image after image, in place."""
        for feature, label in zip(features.detach(), self.labels[ids].tolist(), strict=True):
            moved = old_weight * self.centroids[label] + (1 - old_weight) * feature
            self.centroids[label] = F.normalize(moved, dim=0)
