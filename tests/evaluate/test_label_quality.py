"""Label quality against counts made by hand."""

from __future__ import annotations

import pytest
import torch

from mprd.evaluate.label_quality import (
    auc,
    labelled_quality,
    mean_random_cosine,
    neighborhood_agreement,
    pair_quality,
    silhouette,
)
from mprd.pairs.rules import MetaSet, PositiveTable


def test_precision_and_recall_leave_self_pairs_out() -> None:
    positives = PositiveTable(5)
    positives.set_rows(torch.tensor([0, 1, 4]), torch.tensor([[0, 1, 3], [1, 2, -1], [4, -1, -1]]))
    pids = torch.tensor([7, 7, 7, 8, 8])
    camids = torch.tensor([0, 0, 1, 0, 1])
    quality = pair_quality(positives, pids, camids)
    # accepted: 0-1 right, 0-3 wrong, 1-2 right across cameras; true ordered pairs: 6 + 2, of them 4 + 2 across
    assert quality["pair_precision"] == pytest.approx(2 / 3)
    assert quality["pair_recall"] == pytest.approx(2 / 8)
    assert quality["pair_precision_cross"] == pytest.approx(1 / 1)
    assert quality["pair_recall_cross"] == pytest.approx(1 / 6)


def test_precision_of_no_pairs_is_none() -> None:
    quality = pair_quality(PositiveTable(3), torch.tensor([1, 1, 2]), None)
    assert quality == {"pair_precision": None, "pair_recall": 0.0}


def test_labelled_images_tell_how_right_their_own_positives_are() -> None:
    positives = PositiveTable(6)
    # 4 and 2 are one person, 1 and 5 another, nobody knows who 0 and 3 are
    positives.set_rows(torch.tensor([4, 1, 0]), torch.tensor([[4, 2, 3, -1], [1, 4, 0, -1], [0, 1, 2, 3]]))
    meta = MetaSet(torch.tensor([1, 2, 4, 5]), torch.tensor([70, 9, 9, 70]))
    found = labelled_quality(positives, meta)
    # 4's 2 is right, its 3 is not; neither of 1's is; 2 and 5 have none
    assert found == {"labelled_precision": pytest.approx(1 / 4), "labelled_recall": pytest.approx(1 / 4)}
    assert labelled_quality(PositiveTable(6), meta) == {"labelled_precision": None, "labelled_recall": 0.0}


def test_auc_counts_ties_half() -> None:
    scores = torch.tensor([0.1, 0.4, 0.4, 0.8])
    is_true = torch.tensor([False, False, True, True])
    # of 4 pairs of true and false: 0.4>0.1, 0.4=0.4, 0.8>0.1, 0.8>0.4
    assert auc(scores, is_true) == pytest.approx(3.5 / 4)
    assert auc(scores, torch.zeros(4, dtype=torch.bool)) is None
    assert auc(torch.zeros(0), torch.zeros(0, dtype=torch.bool)) is None


def circle(*degrees: float) -> torch.Tensor:
    angles = torch.deg2rad(torch.tensor(degrees))
    return torch.stack([angles.cos(), angles.sin()], dim=1)


def test_neighborhoods_that_agree_across_cameras_score_one() -> None:
    # two groups of three, each seen by three cameras; with k = 2 a group is its own neighborhood
    features, camids = circle(0, 1, 2, 90, 91, 92), torch.tensor([0, 1, 2, 0, 1, 2])
    assert neighborhood_agreement(features, camids, k=2) == pytest.approx(1.0)


def test_neighborhoods_overlap_as_counted_by_hand() -> None:
    features, camids = circle(0, 1, 3, 6, 10), torch.tensor([0, 0, 0, 0, 1])
    # nearest other, k = 1: {0,1} {1,0} {2,1} {3,2} {4,3}; all of camera 0 have 4 as their only partner,
    # and 4 has 3 and 2: overlaps 0, 0, 0, 1/3 and 1/3, 0
    assert neighborhood_agreement(features, camids, k=1) == pytest.approx((1 / 3 + 1 / 3) / 6)
    assert neighborhood_agreement(features, camids, k=1, block_rows=2) == pytest.approx((1 / 3 + 1 / 3) / 6)


def test_without_cameras_the_partners_are_the_nearest_images() -> None:
    features = circle(0, 1, 3)
    # k = 1: {0,1} {1,0} {2,1}; 0-1: 1, 0-2: 1/3, 1-0: 1, 1-2: 1/3, 2-1: 1/3, 2-0: 1/3
    expected = (1 + 1 / 3 + 1 + 1 / 3 + 1 / 3 + 1 / 3) / 6
    assert neighborhood_agreement(features, None, k=1) == pytest.approx(expected)
    assert neighborhood_agreement(features, torch.zeros(3).long(), k=1) == pytest.approx(expected)


def test_two_images_agree_wholly() -> None:
    assert neighborhood_agreement(circle(0, 50), torch.tensor([0, 1])) == 1.0


def test_collapsed_features_have_a_random_cosine_of_one() -> None:
    draw = torch.Generator().manual_seed(0)
    same = torch.nn.functional.normalize(torch.ones(50, 8), dim=1)
    assert mean_random_cosine(same, generator=draw) == pytest.approx(1.0, abs=1e-6)
    assert abs(mean_random_cosine(torch.eye(50), generator=draw)) < 1e-6


def positives_of(*rows: tuple[int, ...]) -> PositiveTable:
    table = PositiveTable(len(rows))
    for row, ids in enumerate(rows):
        table.set_rows(torch.tensor([row]), torch.tensor([ids]))
    return table


def test_the_silhouette_of_one_group_among_loners_is_that_of_scikit_learn() -> None:
    from sklearn.metrics import silhouette_score

    # every loner is a cluster of its own, so that the nearest cluster is the nearest image outside
    features = torch.nn.functional.normalize(torch.randn(12, 4, generator=torch.Generator().manual_seed(0)), dim=1)
    group = (1, 4, 7, 9)
    positives = positives_of(*[group if image in group else (image,) for image in range(12)])
    labels = [0 if image in group else 1 + image for image in range(12)]
    # which counts them as 0
    expected = silhouette_score(features.numpy(), labels, metric="cosine") - 8 / 12
    for block_rows in (5, 100):
        assert silhouette(features, positives, block_rows=block_rows) == pytest.approx(expected, abs=1e-6)


def test_the_silhouette_falls_with_strangers_in_p_and_with_mates_left_out() -> None:
    features = circle(0, 10, 20, 180, 190, 200)
    right = silhouette(features, positives_of((0, 1, 2), (0, 1, 2), (0, 1, 2), (3, 4, 5), (3, 4, 5), (3, 4, 5)))
    strangers = silhouette(features, positives_of((0, 1, 2, 3), (0, 1, 2), (0, 1, 2), (3, 4, 5), (3, 4, 5), (3, 4, 5)))
    left_out = silhouette(features, positives_of((0, 1), (0, 1), (0, 1, 2), (3, 4, 5), (3, 4, 5), (3, 4, 5)))
    assert 0.9 < right < 1
    assert strangers < right - 0.05
    assert left_out < right - 0.05


def test_the_silhouette_without_a_positive_or_anybody_outside_is_as_told() -> None:
    features = circle(0, 10, 180)
    assert silhouette(features, PositiveTable(3)) == -1
    assert silhouette(features, positives_of((0, 1, 2), (0, 1, 2), (0, 1, 2))) == 0
    assert silhouette(circle(0, 0, 0), positives_of((0, 1), (0, 1), (2,))) == pytest.approx(-1 / 3)
