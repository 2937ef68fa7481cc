"""Candidate pairs and pairs of P, counted by hand."""

from __future__ import annotations

import numpy as np
import torch

from mprd.report.pairs import CandidateScores, camera_counts, contained


def test_pairs_are_counted_by_the_cameras_of_their_images() -> None:
    # images 0 1 2 show identity 7 under cameras 0 0 2, image 3 identity 8 under camera 2
    pids, camids = np.array([7, 7, 7, 8]), np.array([0, 0, 2, 2])
    names = ("hall", "lobby", "gate")
    counted = camera_counts(np.array([0, 0, 2]), np.array([2, 3, 3]), pids=pids, camids=camids, names=names)
    assert counted.cameras == ["hall", "gate"]
    assert counted.num_pairs.tolist() == [[0, 2], [0, 1]]
    assert counted.num_true.tolist() == [[0, 1], [0, 0]]
    assert counted.num_same.tolist() == [[2, 2], [2, 0]]
    assert counted.precision[0, 1] == 0.5
    assert np.isnan(counted.precision[0, 0])
    assert counted.recall.tolist()[0] == [0.0, 0.5]


def test_the_precision_of_the_positives_is_that_of_the_accepted_candidates() -> None:
    scores = {"g_ij": np.array([0.9, 0.6, 0.5, 0.1]), "cosine": np.zeros(4)}
    is_true, is_positive = np.array([True, False, True, False]), np.array([True, True, False, False])
    candidates = CandidateScores(scores, is_true, 0.5, is_positive)
    assert (candidates.precision, candidates.positive_precision, candidates.auc("g_ij")) == (0.5, 0.5, 0.75)
    assert candidates.positive_share == 0.5
    assert CandidateScores(scores, None, 0.5, is_positive).positive_precision is None
    assert CandidateScores(scores, is_true, 0.5, np.zeros(4, bool)).positive_precision is None
    assert CandidateScores(scores, is_true, None, None).positive_share is None


def test_candidates_in_p_are_found_in_any_order_and_padding_is_not() -> None:
    candidates, positives = torch.tensor([[4, 2, 7], [3, -1, -1]]), torch.tensor([[7, 0, 4], [-1, 1, -1]])
    assert contained(candidates, positives).tolist() == [[True, False, True], [False, False, False]]
