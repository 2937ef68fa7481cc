"""The similarity that images are compared by: whitened features, fitted once an epoch, and the graph behind J.

    y = unit((x - mean) W),   W W^T = (S + tr(S) / D I)^-1,
    S = sum_ij w_ij (x_i - x_j)(x_i - x_j)^T / sum_ij w_ij,   w_ij = (degree_i degree_j)^-1/2

over the 2 N surest pseudo pairs (i, j), those of highest J. S is the covariance of the differences within an identity:
learned whitening (Radenovic, Tolias and Chum, TPAMI 2018) and the half of KISSME that reads similar pairs (Koestinger
et al., CVPR 2012), here with pseudo pairs that are found in the loop. The mean eigenvalue on the diagonal is the
shrinkage that D = 2,048 needs; degrees weigh down images that appear in many pairs, as wrong pairs do. Pairs are found
in features whitened as in the epoch before; at first in two rounds, the first of them without whitening. Not in the
paper.

Shapes: N images, D feature size, P pairs.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mprd.config.schema import NeighborsConfig
from mprd.neighbors.graph import SimilarityGraph, find_graph
from mprd.neighbors.graph_index import find_graph_by_index
from mprd.neighbors.reciprocal import K1, K2, measure_similarities

FIRST_ROUNDS = 2
"""Times that pairs are found and features whitened where no earlier whitening finds the pairs."""
PAIRS_PER_IMAGE = 2
DAMPING = 1.0
"""Multiple of the mean eigenvalue that is added to the diagonal."""
MIN_JUDGED = 20
"""Pairs that touch labeled images from which their precision is taken."""
LIST_PER_SIZE = 1.7
"""Length of the lists behind J, as a multiple of the size of an identity: 30 for Market-1501's 17, as in the field."""
MIN_K1 = K2
"""Least length of these lists, that of the lists J is averaged over."""
GRAPH_WIDTH = 32
"""Width of the graph, and the largest length of these lists."""
DIFFERENCES_AT_ONCE = 2**24
"""Feature entries of pair differences held at a time."""


@dataclass(frozen=True, eq=False)
class Whitening:
    """The affine map y = unit((x - mean) W)."""

    mean: Tensor
    """`[D]`."""
    matrix: Tensor
    """W, `[D, D]`."""

    def __call__(self, features: Tensor) -> Tensor:
        """Whiten features `[n, D]`; return unit rows."""
        return F.normalize((features - self.mean) @ self.matrix)


@torch.no_grad()
def fit_whitening(features: Tensor, first: Tensor, second: Tensor) -> Whitening | None:
    """Fit the whitening of features `[N, D]` by the differences of the pairs (first, second), int64 `[P]` each.

    None where there are no pairs or no differences, as in a network that has collapsed.
    """
    num_images, num_features = features.shape
    degrees = torch.bincount(torch.cat([first, second]), minlength=num_images).clamp(min=1).to(features.dtype)
    weights = (degrees[first] * degrees[second]).rsqrt()
    within = features.new_zeros(num_features, num_features)
    size = max(1, DIFFERENCES_AT_ONCE // num_features)
    for i, j, weight in zip(first.split(size), second.split(size), weights.split(size), strict=True):
        differences = (features[i] - features[j]) * weight.sqrt()[:, None]
        within.addmm_(differences.T, differences)
    if within.trace() == 0:
        return None
    within /= weights.sum()
    within.diagonal().add_(DAMPING * within.trace() / num_features)
    # any root will do, for rotations change no cosine: with S = L L^T, W = L^-T
    root = torch.linalg.cholesky(within)
    matrix = torch.linalg.solve_triangular(
        root, torch.eye(num_features, dtype=root.dtype, device=root.device), upper=False
    )
    return Whitening(features.mean(0), matrix.T.contiguous())


@dataclass(frozen=True, eq=False)
class Similarity:
    """The map from unit features of the network to the features that are compared, and the length of lists behind J."""

    whitening: Whitening | None = None
    k1: int = K1
    """Length of the lists behind J."""
    report: dict[str, float | None] = field(default_factory=dict)
    """Figures of the surest pairs of the last round, by the column of metrics.jsonl."""

    def __call__(self, features: Tensor) -> Tensor:
        """Map features `[n, D]`."""
        return features if self.whitening is None else self.whitening(features)

    def state_dict(self) -> dict[str, Any]:
        """Return the parts as dicts of tensors and numbers."""
        whitening = None if self.whitening is None else dict(vars(self.whitening))
        return {"whitening": whitening, "k1": self.k1, "report": dict(self.report)}

    @classmethod
    def from_state_dict(cls, state: dict[str, Any], device: torch.device | str = "cpu") -> Similarity:
        """Restore the parts on a device."""
        saved = state["whitening"]
        whitening = None if saved is None else Whitening(**{name: part.to(device) for name, part in saved.items()})
        return cls(whitening, state["k1"], dict(state["report"]))


@dataclass(frozen=True, eq=False)
class KnownIds:
    """What is known of the images' identities without the labels of a test: those of the labeled images."""

    pids: Tensor
    """int64 `[N]`, -1 where unknown."""
    is_whole: bool
    """Whether the labeled images are all images of their identities, so that any other image is of another one."""

    @classmethod
    def of(cls, ids: Tensor, pids: Tensor, *, num_images: int, is_whole: bool) -> KnownIds:
        """Take the labeled images `ids` `[Z]` of the identities `pids` `[Z]`."""
        known = torch.full((num_images,), -1, device=ids.device)
        known[ids] = pids.unique(return_inverse=True)[1]
        return cls(known, is_whole)

    @property
    def k1(self) -> int:
        """The length of the lists behind J: 1.7 times an identity's mean number of images; 20 where that is unknown."""
        pids = self.pids[self.pids >= 0]
        if not self.is_whole or len(pids) == 0:
            return K1
        return min(GRAPH_WIDTH, max(MIN_K1, round(LIST_PER_SIZE * len(pids) / len(pids.unique()))))

    def precision(self, first: Tensor, second: Tensor) -> float | None:
        """Return the share of true ones among the pairs `[P]` of which that is known; None where these are few."""
        is_known, is_other_known = self.pids[first] >= 0, self.pids[second] >= 0
        is_judged = is_known | is_other_known if self.is_whole else is_known & is_other_known
        if int(is_judged.sum()) < MIN_JUDGED:
            return None
        return float((self.pids[first] == self.pids[second])[is_judged].double().mean())


@torch.no_grad()
def fit_similarity(
    features: Tensor,
    camids: Tensor | None,
    config: NeighborsConfig,
    *,
    known: KnownIds | None = None,
    last: Whitening | None = None,
) -> Similarity:
    """Fit the whitening, where the settings have it, to unit features `[N, D]` of all images under the cameras `[N]`.

    Args:
        known: tells the length of the lists behind J, and judges the surest pairs for the report.
        last: the whitening of the epoch before, in whose features the pairs are found.
    """
    similarity = Similarity(k1=K1 if known is None else known.k1)
    if not config.whitening:
        return similarity
    whitening = last
    for _ in range(FIRST_ROUNDS if last is None else 1):
        compared = features if whitening is None else whitening(features)
        table = measure_similarities(find_similarity_graph(compared, camids, config), k1=similarity.k1)
        surest = table.surest(PAIRS_PER_IMAGE * len(features))
        first, second = (ids[surest] for ids in table.pairs)
        report = {
            "surest_similarity": float(table.values[surest].double().mean()) if len(surest) else 0.0,
            "surest_precision": None if known is None else known.precision(first, second),
        }
        whitening = fit_whitening(features, first, second)
    return replace(similarity, whitening=whitening, report=report)


def find_similarity_graph(features: Tensor, camids: Tensor | None, config: NeighborsConfig) -> SimilarityGraph:
    """Search the graph of all images that J is taken from: exactly, or by the settings' index."""
    find = find_graph_by_index if config.search == "ivf" else find_graph
    return find(features, camids, width=GRAPH_WIDTH)
