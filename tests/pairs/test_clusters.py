"""Cluster-Contrast: clusters of images, balanced batches, and the memory of centroids."""

from __future__ import annotations

import logging
import math
from functools import partial

import numpy as np
import pytest
import torch
from torch.nn.functional import normalize

from mprd.config.schema import Config
from mprd.neighbors import reciprocal
from mprd.neighbors.jaccard import jaccard_distances
from mprd.pairs import clusters
from mprd.pairs import rules as pairs
from mprd.pairs.clusters import ClusterMemory, balanced_batches, cluster_images, cluster_members, find_clusters
from mprd.pairs.rules import PADDING


def groups(num_groups: int, size: int, *, spread: float = 0.05, loners: int = 0) -> torch.Tensor:
    """Draw unit rows around orthogonal centers, and some that lie alone."""
    draw = torch.Generator().manual_seed(0)
    centers = torch.eye(num_groups + loners)
    rows = centers[:num_groups].repeat_interleave(size, 0)
    rows = rows + spread * torch.randn(rows.shape, generator=draw)
    return normalize(torch.cat([rows, centers[num_groups:]]), dim=1)


def slow_jaccard(features: np.ndarray, k1: int, k2: int) -> np.ndarray:
    """Write SpCL's Jaccard distance out with sets and loops."""
    num = len(features)
    distances = 2 - 2 * features @ features.T
    order = [sorted(range(num), key=lambda j, i=i: (j != i, distances[i, j])) for i in range(num)]

    def mutual(i: int, k: int) -> set[int]:
        return {j for j in order[i][: k + 1] if i in order[j][: k + 1]}

    weights = np.zeros((num, num))
    for i in range(num):
        near = mutual(i, k1)
        wide = set(near)
        for j in near:
            half = mutual(j, round(k1 / 2))
            if len(half & near) > 2 / 3 * len(half):
                wide |= half
        for j in wide:
            weights[i, j] = math.exp(-distances[i, j])
        weights[i] /= weights[i].sum()
    weights = np.stack([weights[order[i][:k2]].mean(0) for i in range(num)])
    result = np.zeros((num, num))
    for i in range(num):
        for j in range(num):
            shared = np.minimum(weights[i], weights[j]).sum()
            result[i, j] = 1 - shared / (2 - shared)
    return result


def test_jaccard_distances_equal_sets_and_loops() -> None:
    features = normalize(torch.randn(23, 6, generator=torch.Generator().manual_seed(3)).double(), dim=1)
    found = torch.cat([block for _, block in jaccard_distances(features, k1=6, k2=3)])
    np.testing.assert_allclose(found, slow_jaccard(features.numpy(), 6, 3), atol=1e-9)


@pytest.mark.parametrize("above", [0.0, 0.2, 0.5])
def test_reciprocal_takes_what_loops_say_is_above_the_threshold(above: float) -> None:
    features = groups(3, 5, loners=4, spread=0.4)
    distances = slow_jaccard(features.numpy(), 6, 3)
    found = pairs.reciprocal(features, above=above, k1=6, k2=3)
    for i, ids in enumerate(found.tolist()):
        assert ids[0] >= 0
        near = {j for j in range(len(features)) if 1 - distances[i, j] > above}
        assert set(ids) - {PADDING} == near | {i}
    counts = (found != PADDING).sum(1)
    assert counts.min() < counts.max()


def test_a_table_holds_the_similarities_that_loops_say(monkeypatch: pytest.MonkeyPatch) -> None:
    # a block a row, so that there are many
    monkeypatch.setattr(reciprocal, "jaccard_distances", partial(jaccard_distances, memory_mb=0))
    features = groups(3, 5, loners=4, spread=0.4)
    expected = 1 - slow_jaccard(features.numpy(), 6, 3)
    everyone = torch.arange(len(features))
    found = reciprocal.measure_similarities(features, k1=6, k2=3)
    np.testing.assert_allclose(found.between(everyone[:, None], everyone), expected, atol=1e-6)
    assert 0 < (expected == 0).sum() == len(features) ** 2 - len(found.keys)


def test_a_copy_is_to_others_what_its_image_is() -> None:
    features = groups(3, 5, loners=4, spread=0.4)
    table = reciprocal.measure_similarities(features, k1=6, k2=3)
    with_copies = table.with_copies(torch.tensor([4, 1]))
    first, second = torch.tensor([19, 0, 20, 19]), torch.tensor([0, 20, 1, 20])
    assert len(features) == 19
    assert torch.equal(with_copies.between(first, second), table.between(*torch.tensor([[4, 0, 1, 4], [0, 1, 1, 1]])))
    nobody = torch.zeros(0, 2).long()
    assert reciprocal.SimilarityTable.empty().between(nobody, nobody[:, :1]).shape == (0, 2)


def test_jaccard_distances_do_not_depend_on_the_blocks() -> None:
    features = groups(4, 6, spread=0.4)
    whole = torch.cat([block for _, block in jaccard_distances(features, k1=5, k2=2)])
    parts = list(jaccard_distances(features, k1=5, k2=2, memory_mb=0))
    assert len(parts) == len(features)
    torch.testing.assert_close(torch.cat([block for _, block in parts]), whole)


def test_groups_are_found_and_loners_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clusters, "K1", 7)
    monkeypatch.setattr(clusters, "K2", 3)
    labels = cluster_images(groups(3, 8, loners=2), eps=0.5)
    assert labels.tolist() == [0] * 8 + [1] * 8 + [2] * 8 + [-1, -1]


def test_exact_copies_are_neighbors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clusters, "K1", 4)
    monkeypatch.setattr(clusters, "K2", 2)
    labels = cluster_images(torch.eye(2).repeat_interleave(5, 0), eps=0.5)
    assert labels.tolist() == [0] * 5 + [1] * 5


def test_members_are_those_of_the_cluster_and_an_outlier_is_alone() -> None:
    labels = torch.tensor([0, -1, 0, 1, 1, 0, -1])
    rows = cluster_members(labels, torch.tensor([2, 1, 4])).tolist()
    assert [{i for i in row if i != -1} for row in rows] == [{0, 2, 5}, {1}, {3, 4}]


def test_batches_hold_as_many_images_of_each_of_some_clusters() -> None:
    labels = torch.tensor([0] * 5 + [1] * 4 + [-1] * 3 + [2] * 6 + [3] * 4)
    batches = balanced_batches(labels, batch_size=8, num_instances=4, generator=torch.Generator().manual_seed(0))
    assert len(batches) == 19 // 8
    for batch in batches:
        found = labels[batch]
        assert found.unique().numel() == 2
        assert (found != -1).all()
        assert len(set(batch)) == 8
        assert found.bincount(minlength=4).max() == 4
    again = balanced_batches(labels, batch_size=8, num_instances=4, generator=torch.Generator().manual_seed(0))
    assert batches == again


def test_a_cluster_that_is_too_small_gives_its_images_again() -> None:
    labels = torch.tensor([0, 0, 1, 1, 1])
    (batch,) = balanced_batches(labels, batch_size=8, num_instances=4, generator=torch.Generator().manual_seed(0))
    assert sorted(batch)[:4] == [0, 0, 1, 1]
    assert {2, 3, 4} <= set(batch)


def test_centroids_are_means_and_move_image_by_image() -> None:
    features = normalize(torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 1.0], [1.0, 1.0]]), dim=1)
    memory = ClusterMemory.from_features(features, torch.tensor([0, 0, 1, -1]))
    half = 2**-0.5
    torch.testing.assert_close(memory.centroids, torch.tensor([[half, half], [0.0, 1.0]]))
    first, second = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])
    memory.update(torch.stack([first, second]), torch.tensor([0, 1]), old_weight=0.25)
    moved = normalize(0.25 * torch.tensor([half, half]) + 0.75 * first, dim=0)
    moved = normalize(0.25 * moved + 0.75 * second, dim=0)
    torch.testing.assert_close(memory.centroids[0], moved)
    assert memory.centroids[1].tolist() == [0.0, 1.0]


def test_the_loss_is_infonce_against_the_centroids() -> None:
    memory = ClusterMemory(torch.eye(3), torch.tensor([0, 2, 1]))
    features = normalize(torch.tensor([[3.0, 1.0, 0.0], [0.0, 1.0, 2.0]]), dim=1).requires_grad_()
    loss = memory.loss(features, torch.tensor([0, 1]), temperature=0.5)
    rows = []
    for row, label in zip(features.detach().tolist(), (0, 2), strict=True):
        powers = [math.exp(x / 0.5) for x in row]
        rows.append(-math.log(powers[label] / sum(powers)))
    assert loss.item() == pytest.approx(sum(rows) / 2, rel=1e-5)
    loss.backward()
    assert features.grad is not None
    assert features.grad.abs().sum() > 0


def test_features_without_two_clusters_are_told(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="mprd"):
        assert find_clusters(torch.eye(12), Config(), camids=None) is None
    assert "clusters.eps = 0.6 finds no two clusters" in caplog.text
