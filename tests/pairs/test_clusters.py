"""Cluster-Contrast: clusters of images, balanced batches, and the memory of centroids."""

from __future__ import annotations

import logging
import math

import pytest
import torch
from torch.nn.functional import normalize

from mprd.pairs import clusters
from mprd.pairs.clusters import ClusterMemory, balanced_batches, cluster_images, find_clusters, same_cluster
from tests.graphs import groups, unit_rows


def test_groups_are_found_and_loners_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clusters, "K1", 8)
    monkeypatch.setattr(clusters, "K2", 3)
    labels = cluster_images(groups(3, 8, loners=2), eps=0.5)
    assert labels.tolist() == [0] * 8 + [1] * 8 + [2] * 8 + [-1, -1]


def test_exact_copies_are_neighbors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clusters, "K1", 4)
    monkeypatch.setattr(clusters, "K2", 2)
    labels = cluster_images(torch.eye(2).repeat_interleave(5, 0), eps=0.5)
    assert labels.tolist() == [0] * 5 + [1] * 5


def test_clusters_are_of_the_compared_features_and_centroids_of_those_of_the_network(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(clusters, "K1", 8)
    monkeypatch.setattr(clusters, "K2", 3)
    features = unit_rows(24, 4, dtype=torch.float32)
    found = find_clusters(features, groups(3, 8), eps=0.4)
    assert found is not None
    assert found.labels.tolist() == [0] * 8 + [1] * 8 + [2] * 8
    torch.testing.assert_close(found.centroids[0], normalize(features[:8].sum(0), dim=0))


def test_members_are_those_of_the_cluster_and_an_outlier_is_alone() -> None:
    labels = torch.tensor([0, -1, 0, 1, 1, 0, -1])
    marks = same_cluster(labels, torch.tensor([2, 1, 4]))
    assert [row.nonzero().flatten().tolist() for row in marks] == [[0, 2, 5], [1], [3, 4]]
    # a worker may have no image of the last chunk
    assert same_cluster(labels, torch.zeros(0, dtype=torch.int64)).shape == (0, 7)


def test_batches_hold_as_many_images_of_each_of_some_clusters() -> None:
    labels = torch.tensor([0] * 5 + [1] * 4 + [-1] * 3 + [2] * 6 + [3] * 4)

    def draw() -> list[list[int]]:
        return balanced_batches(labels, None, batch_size=8, generator=torch.Generator().manual_seed(0))

    assert len(draw()) == 19 // 8
    for batch in draw():
        found = labels[batch]
        assert found.unique().numel() == 2
        assert (found != -1).all()
        assert len(set(batch)) == 8
        assert found.bincount(minlength=4).max() == 4
    assert draw() == draw()


def test_a_group_takes_other_cameras_first_and_no_image_twice() -> None:
    labels = torch.tensor([0] * 8 + [1] * 3)
    # cluster 0 has five images under camera 0 and three under others, cluster 1 one camera
    camids = torch.tensor([0, 0, 0, 0, 0, 1, 1, 2, 3, 3, 3])
    for seed in range(20):
        draw = torch.Generator().manual_seed(seed)
        (batch,) = balanced_batches(labels, camids, batch_size=8, generator=draw)
        assert len(batch) == len(set(batch)) == 7
        group = [image for image in batch if labels[image] == 0]
        num_near = sum(int(camids[image] == camids[group[0]]) for image in group[1:])
        # as few of the first one's camera as the others leave
        assert num_near == max(0, 3 - int((camids[:8] != camids[group[0]]).sum()))
        assert sorted(image for image in batch if labels[image] == 1) == [8, 9, 10]


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
        assert find_clusters(torch.eye(12), torch.eye(12), eps=0.6) is None
    assert "clusters.eps = 0.6 finds no two clusters" in caplog.text
