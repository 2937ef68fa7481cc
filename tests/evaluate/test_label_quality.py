"""Label quality equals counts by hand."""

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
from mprd.pairs.positives import MetaSet, PositiveTable


def test_precision_and_recall_leave_self_pairs_out() -> None:
    positives = PositiveTable(5)
    positives.set_rows(torch.tensor([0, 1, 4]), torch.tensor([[0, 1, 3], [1, 2, -1], [4, -1, -1]]))
    pids = torch.tensor([7, 7, 7, 8, 8])
    camids = torch.tensor([0, 0, 1, 0, 1])
    quality = pair_quality(positives, pids, camids)
    # accepted: 0-1 right, 0-3 wrong, 1-2 right across cameras; true ordered pairs: 6 + 2, of them 4 + 2 across
    assert quality == pytest.approx(
        {"pair_precision": 2 / 3, "pair_recall": 2 / 8, "pair_precision_cross": 1 / 1, "pair_recall_cross": 1 / 6}
    )
    assert pair_quality(PositiveTable(5), pids, None) == {"pair_precision": None, "pair_recall": 0.0}


def test_precision_and_recall_of_labeled_images() -> None:
    positives = PositiveTable(6)
    # 2 and 4 are one identity, 1 and 5 another; 0 and 3 are unlabeled
    positives.set_rows(torch.tensor([4, 1, 0]), torch.tensor([[4, 2, 3, -1], [1, 4, 0, -1], [0, 1, 2, 3]]))
    meta = MetaSet(torch.tensor([1, 2, 4, 5]), torch.tensor([70, 9, 9, 70]))
    found = labelled_quality(positives, meta)
    # accepted: 4-2 right, 4-3 wrong, 1-4 and 1-0 wrong; true ordered pairs: 4
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


@pytest.mark.parametrize(
    ("degrees", "camids", "k", "overlaps"),
    [
        # two groups of three cameras; with k = 2 a group is its own neighborhood
        ((0, 1, 2, 90, 91, 92), [0, 1, 2, 0, 1, 2], 2, [1.0]),
        # NN_1 {0,1} {1,0} {2,1} {3,2} {4,3}; the only partner of 0 to 3 is 4, and those of 4 are 3 and 2
        ((0, 1, 3, 6, 10), [0, 0, 0, 0, 1], 1, [0, 0, 0, 1 / 3, 1 / 3, 0]),
        # NN_1 {0,1} {1,0} {2,1}; 0-1, 0-2, 1-0, 1-2, 2-1, 2-0
        ((0, 1, 3), [0, 0, 0], 1, [1, 1 / 3, 1, 1 / 3, 1 / 3, 1 / 3]),
        ((0, 1, 3), None, 1, [1, 1 / 3, 1, 1 / 3, 1 / 3, 1 / 3]),
        ((0, 50), [0, 1], 8, [1.0]),
    ],
)
def test_the_label_free_score_is_the_mean_overlap_with_the_nearest_of_other_cameras(
    degrees: tuple[float, ...], camids: list[int] | None, k: int, overlaps: list[float]
) -> None:
    for block_rows in (2, 1024):
        cameras = None if camids is None else torch.tensor(camids)
        score = neighborhood_agreement(circle(*degrees), cameras, k=k, block_rows=block_rows)
        assert score == pytest.approx(sum(overlaps) / len(overlaps))


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


def test_the_silhouette_follows_its_definition() -> None:
    draw = torch.Generator().manual_seed(0)
    features = torch.nn.functional.normalize(torch.randn(12, 4, generator=draw), dim=1)
    rows = [{image, *torch.randint(12, (3,), generator=draw).tolist()} for image in range(12)]
    rows[5] = {5}
    widths = []
    for image, row in enumerate(rows):
        distances = [1 - float(features[image] @ feature) for feature in features]
        inside = [distances[other] for other in row - {image}]
        nearest = min(distances[other] for other in range(12) if other not in row)
        a = sum(inside) / len(inside) if inside else None
        widths.append(-1 if a is None else (nearest - a) / max(nearest, a))
    for block_rows in (5, 100):
        found = silhouette(features, positives_of(*map(tuple, rows)), block_rows=block_rows)
        assert found == pytest.approx(sum(widths) / 12, abs=1e-6)


def test_the_silhouette_falls_with_false_positives_and_with_missed_ones() -> None:
    features = circle(0, 10, 20, 180, 190, 200)
    right = silhouette(features, positives_of((0, 1, 2), (0, 1, 2), (0, 1, 2), (3, 4, 5), (3, 4, 5), (3, 4, 5)))
    false_positive = silhouette(
        features, positives_of((0, 1, 2, 3), (0, 1, 2), (0, 1, 2), (3, 4, 5), (3, 4, 5), (3, 4, 5))
    )
    missed = silhouette(features, positives_of((0, 1), (0, 1), (0, 1, 2), (3, 4, 5), (3, 4, 5), (3, 4, 5)))
    assert 0.9 < right < 1
    assert false_positive < right - 0.05
    assert missed < right - 0.05


def test_the_silhouette_without_positives_or_images_outside() -> None:
    features = circle(0, 10, 180)
    assert silhouette(features, PositiveTable(3)) == -1
    assert silhouette(features, positives_of((0, 1, 2), (0, 1, 2), (0, 1, 2))) == 0
    assert silhouette(circle(0, 0, 0), positives_of((0, 1), (0, 1), (2,))) == pytest.approx(-1 / 3)
