"""P_i by every labeller, against slow loops and the oracle."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from mprd.losses import binomial_deviance, hard_negatives
from mprd.neighbors.exact import PADDING
from mprd.pairs.positives import MetaSet, PositiveLimit, PositiveTable, split_by_limit
from mprd.pairs.rules import accept, knn, mask_to_ids, mplp, own_index, relabel, ss, supervised

ORACLE = Path(__file__).parents[1] / "oracle"

# five points on a circle, at 0, 10, 20, 90 and 100 degrees
ANGLES = torch.deg2rad(torch.tensor([0.0, 10.0, 20.0, 90.0, 100.0]))
CIRCLE = torch.stack([ANGLES.cos(), ANGLES.sin()], dim=1)


def sets(mask: torch.Tensor) -> list[set[int]]:
    return [set(row.nonzero().squeeze(1).tolist()) for row in mask]


def test_a_pair_is_positive_only_above_mu_and_i_always_is() -> None:
    rows = torch.tensor([4, 7])
    candidates = torch.tensor([[1, 2, 3], [5, 6, -1]])
    likelihoods = torch.tensor([[0.5, 0.51, 0.9], [0.1, 0.2, 0.99]])
    assert accept(rows, candidates, likelihoods, mu=0.5).tolist() == [[4, -1, 2, 3], [7, -1, -1, -1]]


def likeliest(i: int, ids: list[int], scores: list[float], limit: PositiveLimit) -> set[int]:
    """Keep the best of an image's positives one at a time, as long as there is room under its camera or the others."""
    camids, room = limit.camids.tolist(), {True: limit.same, False: limit.other}
    kept = {i}
    for _, j in sorted((-score, j) for j, score in zip(ids, scores, strict=True) if j not in (i, PADDING)):
        is_near = camids[j] == camids[i]
        if room[is_near] > 0:
            room[is_near] -= 1
            kept.add(j)
    return kept


@pytest.mark.parametrize(("same", "other"), [(0, 1), (2, 3), (1, 0), (99, 99)])
def test_a_limit_keeps_the_likeliest_under_the_own_camera_and_under_others(same: int, other: int) -> None:
    draw = torch.Generator().manual_seed(same)
    limit = PositiveLimit(torch.randint(3, (40,), generator=draw), same, other)
    rows = torch.tensor([5, 0, 39, 5])
    scores = torch.rand(4, 40, generator=draw)
    accepted = mask_to_ids((scores > 0.4) | own_index(rows, 40))
    found, refused = split_by_limit(rows, accepted, scores.gather(1, accepted.clamp(min=0)), limit)
    assert refused is not None
    kept = limit.keep(rows, *padded_at_random(rows, scores, draw))
    for b, i in enumerate(rows.tolist()):
        above = [j for j in range(40) if scores[b, j] > 0.4]
        expected = likeliest(i, above, scores[b, above].tolist(), limit)
        assert set(found[b].tolist()) - {PADDING} == expected
        assert set(refused[b].tolist()) - {PADDING} == {*above} - expected
        everyone = likeliest(i, list(range(40)), scores[b].tolist(), limit)
        assert set(kept[b].tolist()) - {PADDING} == everyone


def padded_at_random(rows: torch.Tensor, scores: torch.Tensor, draw: torch.Generator) -> tuple[torch.Tensor, ...]:
    """List all images in random order with padding between them, whose scores would win."""
    order = torch.rand(len(rows), 50, generator=draw).argsort(1)
    ids = torch.where(order < 40, order, PADDING)
    return ids, scores.gather(1, ids.clamp(min=0)).masked_fill(ids == PADDING, 9)


def test_what_the_limit_refuses_is_no_negative() -> None:
    table = PositiveTable(5)
    table.set_rows(torch.tensor([0, 2]), torch.tensor([[0, 1], [2, -1]]), torch.tensor([[3, 4], [-1, 1]]))
    doubtful = table.doubtful(torch.tensor([0, 1, 2]))
    assert doubtful is not None
    assert sets(doubtful) == [{3, 4}, set(), {1}]
    similarities = torch.tensor([[0.9, 0.8, 0.1, 0.7, 0.6]])
    ids, counts = hard_negatives(similarities, table.mask(torch.tensor([0])), doubtful[:1], r=3)
    assert ids[counts].tolist() == [2]
    loss = binomial_deviance(similarities, table.mask(torch.tensor([0])), doubtful[:1], r=3)
    kept = torch.tensor([0, 1, 2])
    torch.testing.assert_close(
        loss, binomial_deviance(similarities[:, kept], table.mask(torch.tensor([0]))[:, kept], r=3)
    )
    # labels without a limit refuse nothing
    table.set_rows(torch.tensor([0]), torch.tensor([[0]]))
    doubtful = table.doubtful(torch.tensor([0]))
    assert doubtful is not None
    assert not doubtful.any()
    assert PositiveTable(5).doubtful(torch.tensor([0])) is None


def test_labelled_images_say_how_many_positives_there_are_at_most() -> None:
    camids = torch.tensor([0, 0, 1, 2, 0, 1, 2, 2])
    # identity 7: cameras 0, 0, 1, 2; identity 3: cameras 1, 2
    meta = MetaSet(torch.tensor([0, 1, 2, 3, 5, 6]), torch.tensor([7, 7, 7, 7, 3, 3]))
    limit = PositiveLimit.of_labelled(meta, camids, 8)
    # 1, 1, 0, 0 and 0, 0 under their own camera, 2, 2, 3, 3 and 1, 1 under others
    assert (limit.same, limit.other) == (2 * 1 - 0, 2 * 3 - 1)
    limit = PositiveLimit.of_labelled(meta, None, 8)
    assert (limit.same, limit.other) == (2 * 3 - 1, 0)
    assert limit.camids.tolist() == [0] * 8


def test_identities_that_are_alike_are_the_limit() -> None:
    # two identities, each with one image under each of two cameras
    meta = MetaSet(torch.tensor([0, 1, 2, 3]), torch.tensor([7, 7, 3, 3]))
    limit = PositiveLimit.of_labelled(meta, torch.tensor([0, 1, 0, 1]), 4)
    assert (limit.same, limit.other) == (0, 1)


def test_the_table_starts_with_the_image_itself_and_grows_when_it_must() -> None:
    table = PositiveTable(4)
    assert sets(table.mask(torch.arange(4))) == [{0}, {1}, {2}, {3}]
    table.set_rows(torch.tensor([1, 3]), torch.tensor([[1, 0, -1], [3, -1, 2]]))
    assert sets(table.mask(torch.tensor([3, 1, 0]))) == [{3, 2}, {1, 0}, {0}]
    assert table.counts().tolist() == [1, 2, 1, 2]
    table.set_rows(torch.tensor([1]), torch.tensor([[1]]))
    assert table.counts().tolist() == [1, 1, 1, 2]


def test_a_mask_and_its_ids_say_the_same() -> None:
    mask = torch.tensor([[True, False, True], [False, False, True], [False, False, False]])
    assert mask_to_ids(mask).tolist() == [[0, 2], [2, -1], [-1, -1]]
    assert mask_to_ids(torch.zeros(0, 3, dtype=torch.bool)).shape[0] == 0


def test_knn_takes_the_k_nearest_and_the_image_itself() -> None:
    assert sets(knn(CIRCLE, torch.tensor([0, 3]), k=1)) == [{0, 1}, {3, 4}]
    assert sets(knn(CIRCLE, torch.tensor([2]), k=99)) == [{0, 1, 2, 3, 4}]


def test_ss_takes_what_is_above_the_threshold() -> None:
    # cos 10 = .985, cos 20 = .940, cos 70 = .342, cos 80 = .174
    assert sets(ss(CIRCLE, torch.tensor([0, 2]), similarity=0.95)) == [{0, 1}, {1, 2}]
    assert sets(ss(CIRCLE, torch.tensor([2]), similarity=0.3)) == [{0, 1, 2, 3}]
    assert sets(ss(CIRCLE, torch.tensor([3]), similarity=1.0)) == [{3}]


def test_supervised_takes_the_identity_and_single_the_index() -> None:
    pids = torch.tensor([7, 8, 7, 8, 9])
    assert sets(supervised(pids, torch.tensor([0, 1, 4]))) == [{0, 2}, {1, 3}, {4}]
    assert sets(own_index(torch.tensor([4, 0]), 5)) == [{4}, {0}]


def test_relabelling_touches_labelled_images_alone() -> None:
    meta = MetaSet(torch.tensor([0, 2]), torch.tensor([7, 7]))
    mask = torch.ones(3, 5, dtype=torch.bool)
    assert sets(relabel(mask, torch.tensor([0, 1, 2]), meta)) == [{0, 2}, {0, 1, 2, 3, 4}, {0, 2}]


def test_mplp_matches_the_published_code() -> None:
    case = np.load(ORACLE / "extra_mplp_mmcl_0.npz")
    labels = mplp(torch.from_numpy(case["memory"]), torch.from_numpy(case["targets"]), t=float(case["t"]))
    np.testing.assert_array_equal(labels.numpy(), case["multilabel"] > 0)


def slow_mplp(memory: np.ndarray, target: int, t: float) -> set[int]:
    """Walk the candidates one by one, as DESIGN-free prose describes MPLP."""
    cosines = memory @ memory.T
    order = sorted(range(len(memory)), key=lambda j: (-cosines[target, j], j))
    num_similar = sum(cosines[target] > t)
    top = max(num_similar, 10)
    accepted: list[int] = []
    for candidate in order[:top]:
        ranking = sorted(range(len(memory)), key=lambda j: (-cosines[candidate, j], j))
        if ranking.index(order[0]) > top:
            break
        accepted.append(candidate)
    return {target, *accepted[:num_similar]}


@pytest.mark.parametrize(("num_images", "t"), [(60, 0.6), (60, 0.2), (40, 0.0), (5, 0.6)])
def test_mplp_equals_a_walk_through_the_ranking(num_images: int, t: float) -> None:
    rng = np.random.default_rng(num_images)
    centers = rng.normal(size=(6, 8))
    memory = centers[rng.integers(6, size=num_images)] + 0.6 * rng.normal(size=(num_images, 8))
    memory /= np.linalg.norm(memory, axis=1, keepdims=True)
    labels = mplp(torch.from_numpy(memory), torch.arange(num_images), t=t)
    assert sets(labels) == [slow_mplp(memory, i, t) for i in range(num_images)]


def test_mplp_of_no_targets_is_empty() -> None:
    assert mplp(CIRCLE, torch.zeros(0, dtype=torch.long), t=0.6).shape == (0, 5)
