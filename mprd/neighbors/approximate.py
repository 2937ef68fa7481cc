"""NN_k of all images where one exact pass is too much: by shards, merged exactly, or through a faiss index."""

# B rows of a block, N images, D feature size, W width of a row's best
from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from mprd.errors import UserError
from mprd.neighbors.exact import CPU_ROWS, NeighborTable, check_counts, check_features, cut, find_neighbors

logger = logging.getLogger("mprd")

Index = Literal["ivf", "hnsw"]
NeighborSearch = Callable[..., NeighborTable]
"""Whoever searches the lists of all images: called like `find_neighbors`, without rows and queries."""
SAMPLE_ROWS = 256
"""Rows whose lists are searched exactly as well, to measure recall."""
IMAGES_PER_CELL = 39
"""Least images a cell of the inverted file is trained on; faiss warns below."""
CELLS_VISITED = 16
"""One in so many cells is visited for a row."""
HNSW_LINKS = 32


class Best(NamedTuple):
    """Some rows' best images among those of a shard: `values` [B, W], `ids` int64 [B, W], best first."""

    values: Tensor
    ids: Tensor


@torch.no_grad()
def best_in_shard(rows_BD: Tensor, shard: Tensor, *, first_id: int, self_ids: Tensor, width: int) -> Best:
    """Search rows in a shard [S, D] that holds the images from `first_id` on; W is `width`, or S where that is less.

    A row's own image, `self_ids` int64 [B], comes with -inf where it stands in the shard.
    """
    sim_BS = rows_BD @ shard.T
    own = self_ids - first_id
    is_here = (own >= 0) & (own < len(shard))
    sim_BS[is_here.nonzero().squeeze(1), own[is_here]] = -torch.inf
    values, order = sim_BS.topk(min(width, len(shard)), dim=1)
    return Best(values, order + first_id)


def merge_best(parts: Sequence[Best], *, width: int) -> Best:
    """Merge the shards' best into the best of all: the k-th best of all is among the k best of its shard."""
    values, ids = torch.cat([part.values for part in parts], 1), torch.cat([part.ids for part in parts], 1)
    best, order = values.topk(width, dim=1)
    return Best(best, ids.gather(1, order))


def list_width(num_images: int, *, k: int, k_max: int) -> int:
    """Count the best that a row needs: one more than the cap, to see which rows it cuts."""
    check_counts(num_images - 1, k, k_max)
    return min(k_max + 1, num_images - 1)


def to_table(best: Best, *, similarity: float, k: int, k_max: int) -> NeighborTable:
    """Apply the rule k_i = max(k, number of cosines above `similarity`), at most `k_max` (Sec. 5.2)."""
    return cut(best.ids, (best.values > similarity).sum(1), k=k, k_max=k_max)


@torch.no_grad()
def find_by_index(
    features: Tensor,
    *,
    kind: Index,
    k: int,
    similarity: float,
    k_max: int = 64,
    metric: str = "cosine",
    camids: Tensor | None = None,
    block_rows: int = CPU_ROWS,
) -> NeighborTable:
    """List the neighbors of all images as `find_neighbors` does, approximately, and log the recall on a sample.

    `features` [N, D] are unit rows. A row of which the index finds fewer than k images has a shorter list. Needs
    faiss; `camids` are for the other metrics, which an index of cosines cannot serve.
    """
    check_features(features, "features")
    if metric != "cosine":
        raise UserError(f"neighbors.metric: {metric} needs neighbors.search=exact")
    width = list_width(len(features), k=k, k_max=k_max)
    best = without_self(search_index(features, kind, width + 1), width)
    table = to_table(best, similarity=similarity, k=k, k_max=k_max)
    # a part of the index that holds too few images pads with -1 itself
    table = NeighborTable(table.ids, (table.ids >= 0).sum(1), table.is_capped)
    recall = measure_recall(table, features, k=k, similarity=similarity, k_max=k_max, block_rows=block_rows)
    logger.info("neighbors.search = %s: recall %.3f against exact lists of a sample", kind, recall)
    return table


def search_index(features: Tensor, kind: Index, width: int) -> Best:
    """Build an index over all images and search each of them; what is not found has id -1 and value -inf."""
    logging.getLogger("faiss").setLevel(logging.WARNING)
    try:
        import faiss
    except ModuleNotFoundError:
        raise UserError(f"neighbors.search: {kind} needs faiss (pip install faiss-cpu); or use exact") from None
    rows = features.detach().float().cpu().contiguous().numpy()
    num_images, num_features = rows.shape
    index: Any
    if kind == "ivf":
        num_cells = max(1, min(int(4 * num_images**0.5), num_images // IMAGES_PER_CELL))
        index = faiss.IndexIVFFlat(faiss.IndexFlatIP(num_features), num_features, num_cells, faiss.METRIC_INNER_PRODUCT)
        index.train(rows)
        index.nprobe = max(1, -(-num_cells // CELLS_VISITED))
    else:
        index = faiss.IndexHNSWFlat(num_features, HNSW_LINKS, faiss.METRIC_INNER_PRODUCT)
        index.hnsw.efSearch = 2 * width
    index.add(rows)
    values, ids = index.search(rows, width)
    values[ids < 0] = -float("inf")
    return Best(torch.from_numpy(values).to(features.device), torch.from_numpy(ids).to(features.device))


def without_self(best: Best, width: int) -> Best:
    """Take each row's own image out of its best [N, W + 1], in whatever place it stands; keep W."""
    is_self = best.ids == torch.arange(len(best.ids), device=best.ids.device)[:, None]
    # the sort is stable: all others keep their order, and the own image goes to the end
    order = is_self.byte().argsort(dim=1, stable=True)[:, :width]
    return Best(best.values.gather(1, order), best.ids.gather(1, order))


def measure_recall(table: NeighborTable, features: Tensor, **rule: Any) -> float:
    """Return the share of the neighbors of evenly spread rows, searched exactly by this rule, that the table lists."""
    num_rows = min(SAMPLE_ROWS, len(features))
    rows = torch.arange(num_rows, device=features.device) * len(features) // num_rows
    exact = find_neighbors(features, rows=rows, **rule).ids
    is_found = (exact[:, :, None] == table.ids[rows][:, None, :]).any(2) & (exact >= 0)
    return float(is_found.sum() / (exact >= 0).sum())
