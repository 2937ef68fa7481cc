"""Eq. 1 by hand."""

from __future__ import annotations

import pytest
import torch

from mprd.memory import FeatureMemory


def test_an_update_averages_and_normalizes() -> None:
    memory = FeatureMemory(torch.tensor([[1.0, 0.0], [0.0, 2.0], [3.0, 4.0]]))
    assert memory.features.tolist() == [[1, 0], [0, 1], pytest.approx([0.6, 0.8])]
    memory.update(torch.tensor([1]), torch.tensor([[1.0, 0.0]]), gamma=0.75)
    # 0.75 (1, 0) + 0.25 (0, 1) = (0.75, 0.25), of length 0.790569
    assert memory.features[1].tolist() == pytest.approx([0.948683, 0.316228], abs=1e-6)
    assert memory.features[0].tolist() == [1, 0]


def test_gamma_one_replaces_a_row() -> None:
    memory = FeatureMemory(torch.eye(3))
    memory.update(torch.tensor([2, 0]), torch.tensor([[0.6, 0.8, 0.0], [0.0, 0.0, 1.0]]), gamma=1.0)
    assert memory.features.tolist() == [[0, 0, 1], [0, 1, 0], pytest.approx([0.6, 0.8, 0])]


def test_an_update_keeps_no_graph() -> None:
    memory = FeatureMemory(torch.eye(2))
    memory.update(torch.tensor([0]), torch.ones(1, 2, requires_grad=True), gamma=0.5)
    assert not memory.features.requires_grad


def test_the_initial_features_are_copied_and_must_be_floating_point() -> None:
    start = torch.eye(2)
    FeatureMemory(start).update(torch.tensor([0]), torch.tensor([[0.0, 1.0]]), gamma=1.0)
    assert start.tolist() == [[1, 0], [0, 1]]
    with pytest.raises(ValueError, match="floating point"):
        FeatureMemory(torch.eye(2, dtype=torch.int64))
