"""Eq. 2, Eq. 3, Eq. 6 and MMCL against slow loops written from the paper and published code (oracle files)."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from mprd.losses import binomial_deviance, hard_negatives, mmcl, pair_bce

ORACLE = Path(__file__).parent / "oracle"


def zeta(x: float) -> float:
    return math.log(1 + math.exp(x))


def slow_binomial_deviance(s: list[list[float]], p: list[list[bool]], num_hard: int) -> float:
    """Eq. 2 with the values of Sec. 5.2; `num_hard` negatives per row."""
    total = 0.0
    for row, is_positive in zip(s, p, strict=True):
        positives = [x for x, y in zip(row, is_positive, strict=True) if y]
        negatives = sorted((x for x, y in zip(row, is_positive, strict=True) if not y), reverse=True)[:num_hard]
        total += 5 / len(positives) * sum(zeta(4 * (0.2 - x)) for x in positives)
        total += sum(zeta(4 * (x - 0.2)) for x in negatives) / len(negatives)
    return total / len(s)


def random_rows(seed: int, num_rows: int, num_images: int) -> tuple[torch.Tensor, torch.Tensor]:
    draw = torch.Generator().manual_seed(seed)
    similarities = 2 * torch.rand(num_rows, num_images, generator=draw, dtype=torch.float64) - 1
    positives = torch.rand(num_rows, num_images, generator=draw) < 0.2
    positives[:, 0] = True
    return similarities, positives


def test_binomial_deviance_equals_the_loop() -> None:
    similarities, positives = random_rows(0, 6, 40)
    expected = slow_binomial_deviance(similarities.tolist(), positives.tolist(), 3)
    assert binomial_deviance(similarities, positives, r=3).item() == pytest.approx(expected, abs=1e-12)


def test_binomial_deviance_of_one_pair_by_hand() -> None:
    similarities = torch.tensor([[0.2, 0.2]], dtype=torch.float64)
    positives = torch.tensor([[True, False]])
    # both margins are met exactly: 5 log 2 + log 2
    assert binomial_deviance(similarities, positives, r=1).item() == pytest.approx(6 * math.log(2), abs=1e-12)


def test_binomial_deviance_has_the_gradient_of_finite_differences() -> None:
    similarities, positives = random_rows(1, 3, 12)
    similarities.requires_grad_(True)
    assert torch.autograd.gradcheck(lambda s: binomial_deviance(s, positives, r=4), (similarities,))


def test_a_row_without_negatives_has_only_the_positive_term() -> None:
    similarities = torch.tensor([[0.2, 0.2]], dtype=torch.float64)
    loss = binomial_deviance(similarities, torch.ones(1, 2, dtype=torch.bool), r=0.5)
    assert loss.item() == pytest.approx(5 * math.log(2), abs=1e-12)


@pytest.mark.parametrize(
    ("num_images", "num_positives", "r", "expected"),
    [(200, 1, 0.01, 1), (301, 1, 0.01, 3), (101, 1, 0.3, 30), (50, 10, 7, 7), (10, 8, 7, 2), (20, 1, 0.01, 1)],
)
def test_r_is_a_share_below_one_and_otherwise_a_number(
    num_images: int, num_positives: int, r: float, expected: int
) -> None:
    similarities = torch.rand(1, num_images, generator=torch.Generator().manual_seed(2))
    positives = torch.arange(num_images)[None] < num_positives
    ids, counts = hard_negatives(similarities, positives, r=r)
    chosen = ids[counts].tolist()
    negatives = sorted(range(num_positives, num_images), key=lambda j: -similarities[0, j].item())
    assert chosen == negatives[:expected]


def test_mmcl_matches_the_published_code() -> None:
    case = np.load(ORACLE / "extra_mplp_mmcl_0.npz")
    targets = torch.from_numpy(case["targets"])
    single = torch.zeros(case["logits"].shape, dtype=torch.bool)
    single[torch.arange(len(targets)), targets] = True
    for positives, name in ((torch.from_numpy(case["multilabel"]) > 0, "multi"), (single, "single")):
        logits = torch.from_numpy(case["logits"]).requires_grad_(True)
        loss = mmcl(logits, positives, delta=float(case["delta"]), r=float(case["r"]))
        loss.backward()
        assert loss.item() == pytest.approx(float(case[f"loss_{name}"]), abs=1e-6)
        assert logits.grad is not None
        np.testing.assert_allclose(logits.grad.numpy(), case[f"grad_{name}"], atol=1e-6)


def test_pair_bce_takes_each_anchors_means_first() -> None:
    logits = torch.tensor([0.5, -1.0, 2.0, 0.0, 1.5], dtype=torch.float64)
    is_positive = torch.tensor([True, True, False, True, False])
    anchors = torch.tensor([0, 0, 0, 2, 2])
    g = [1 / (1 + math.exp(-x)) for x in logits.tolist()]
    first = -(math.log(g[0]) + math.log(g[1])) / 2 - math.log(1 - g[2])
    third = -math.log(g[3]) - math.log(1 - g[4])
    loss = pair_bce(logits, is_positive, anchors, num_anchors=3)
    # the second anchor has no pair; it still counts in n'
    assert loss.item() == pytest.approx((first + 0 + third) / 3, abs=1e-12)


def test_pair_bce_of_no_pairs_is_zero_and_of_many_has_the_right_gradient() -> None:
    empty = torch.zeros(0, dtype=torch.float64)
    assert pair_bce(empty, empty.bool(), empty.long(), num_anchors=4).item() == 0
    logits = torch.tensor([0.3, -0.7, 3.0], dtype=torch.float64, requires_grad=True)
    labels, anchors = torch.tensor([True, False, False]), torch.tensor([0, 0, 1])
    assert torch.autograd.gradcheck(lambda x: pair_bce(x, labels, anchors, num_anchors=2), (logits,))
