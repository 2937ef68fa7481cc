"""Label quality against counts made by hand."""

from __future__ import annotations

import pytest
import torch

from mprd.diagnostics import auc, mean_random_cosine, pair_quality, reciprocity
from mprd.pairs import PositiveTable


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


def test_auc_counts_ties_half() -> None:
    scores = torch.tensor([0.1, 0.4, 0.4, 0.8])
    is_true = torch.tensor([False, False, True, True])
    # of 4 pairs of true and false: 0.4>0.1, 0.4=0.4, 0.8>0.1, 0.8>0.4
    assert auc(scores, is_true) == pytest.approx(3.5 / 4)
    assert auc(scores, torch.zeros(4, dtype=torch.bool)) is None
    assert auc(torch.zeros(0), torch.zeros(0, dtype=torch.bool)) is None


def test_mutual_cross_camera_neighbours_count_by_hand() -> None:
    angles = torch.deg2rad(torch.tensor([0.0, 2.0, 40.0, 0.9, 50.0]))
    features = torch.stack([angles.cos(), angles.sin()], dim=1)
    camids = torch.tensor([0, 0, 0, 1, 1])
    # nearest in the other camera: 0->3, 1->3, 2->4, 3->0, 4->2: all mutual but 1->3
    score = reciprocity(features, camids)
    assert score == pytest.approx(4 / 5)
    assert reciprocity(features[:2], None) == 1.0
    # as one camera: 0-3 and 2-4 are mutual, 1->3 is not
    assert reciprocity(features, None, block_rows=2) == pytest.approx(4 / 5)


def test_collapsed_features_have_a_random_cosine_of_one() -> None:
    draw = torch.Generator().manual_seed(0)
    same = torch.nn.functional.normalize(torch.ones(50, 8), dim=1)
    assert mean_random_cosine(same, generator=draw) == pytest.approx(1.0, abs=1e-6)
    assert abs(mean_random_cosine(torch.eye(50), generator=draw)) < 1e-6
