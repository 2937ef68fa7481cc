"""The GCN's training pairs against the rules of Sec. 4.2, pair by pair."""

from __future__ import annotations

import pytest
import torch

from mprd.engine import gcn_sampling
from mprd.engine.gcn_sampling import (
    PairSources,
    StepDraws,
    choose,
    draw_epoch,
    hard_negative_pairs,
    perturbed_pairs,
    pseudo_positives,
    random_meta_pairs,
    random_negatives,
)
from mprd.pairs.positives import MetaSet, PositiveTable

NUM_IMAGES = 24
PIDS = torch.arange(NUM_IMAGES) // 4


def draw(num_anchors: int, seed: int = 0) -> StepDraws:
    return StepDraws([torch.Generator().manual_seed(seed)], [num_anchors])


def table(rows: dict[int, list[int]]) -> PositiveTable:
    positives = PositiveTable(NUM_IMAGES)
    for row, ids in rows.items():
        positives.set_rows(torch.tensor([row]), torch.tensor([ids]))
    return positives


def neighbors() -> torch.Tensor:
    """Let image i have the neighbors i+1, i+2 and i+3, around the circle."""
    return (torch.arange(NUM_IMAGES)[:, None] + torch.tensor([1, 2, 3])) % NUM_IMAGES


def test_choosing_takes_so_many_valid_columns_and_every_one_in_turn() -> None:
    is_valid = torch.tensor([[True, False, True, True], [False, False, False, False], [True, True, False, False]])
    counts = torch.tensor([2, 3, 5])
    seen = torch.zeros_like(is_valid)
    for seed in range(30):
        chosen = choose(is_valid, counts, draw(3, seed))
        assert chosen.sum(1).tolist() == [2, 0, 2]
        assert not (chosen & ~is_valid).any()
        seen |= chosen
    assert (seen == is_valid).all()


def test_an_image_and_its_perturbed_copy_are_positive() -> None:
    found = perturbed_pairs(torch.tensor([3, 5, 8]), torch.tensor([24, -1, 25]))
    assert found.pairs.tolist() == [[3, 24], [8, 25]]
    assert found.is_positive.all()
    assert found.anchors.tolist() == [0, 2]


def test_pseudo_positives_share_a_drawn_first_and_lie_in_its_neighborhood() -> None:
    positives = table({0: [0, 1, 2, 9], 5: [5]})
    firsts = set()
    for seed in range(40):
        found = pseudo_positives(torch.tensor([5, 0]), positives, neighbors(), draws=draw(2, seed))
        assert found.anchors.tolist() == [1] * len(found)
        # by hand: of {0, 1, 2, 9}, NN(0) holds 1 and 2, NN(1) holds 2, NN(2) and NN(9) hold none
        first = {tuple(pair) for pair in found.pairs.tolist()}
        assert first in ({(0, 1), (0, 2)}, {(1, 2)}, set())
        firsts.add(tuple(sorted(first)))
    assert len(firsts) == 3


def test_random_negatives_never_come_from_the_positives() -> None:
    positives = table({0: list(range(12))})
    for seed in range(30):
        found = random_negatives(torch.tensor([0, 1]), positives, num_images=NUM_IMAGES, draws=draw(2, seed))
        assert all(j >= 12 for i, j in found.pairs.tolist() if i == 0)
        assert all(i != j for i, j in found.pairs.tolist())
        assert not found.is_positive.any()


def test_hard_negatives_are_as_many_as_the_positives_and_of_the_r_nearest() -> None:
    angles = torch.linspace(0, 1, NUM_IMAGES)
    memory = torch.stack([angles.cos(), angles.sin()], dim=1)
    positives = table({0: [0, 1, 2]})
    seen = set()
    for seed in range(40):
        found = hard_negative_pairs(torch.tensor([0]), positives, memory, r=5, draws=draw(1, seed))
        assert len(found) == 3
        seen |= {j for _, j in found.pairs.tolist()}
    # nearest to image 0 outside P_0, in the order of the angle
    assert seen == {3, 4, 5, 6, 7}


def test_random_meta_pairs_follow_the_labels() -> None:
    meta_ids = torch.tensor([0, 1, 2, 3, 8, 9, 10, 11])
    for seed in range(20):
        drawn, images = torch.tensor([0, 5, 5]), torch.tensor([1, 20, 8])
        found = random_meta_pairs(meta_ids, PIDS[meta_ids], drawn, images, draws=draw(3, seed))
        pairs, labels = found.pairs, found.is_positive
        assert (labels == (PIDS[pairs[:, 0]] == PIDS[pairs[:, 1]])).all()
        # one positive and one labeled negative each; an x_j of z's own identity makes no pair
        assert labels.sum() == 3
        assert sorted(found.anchors[~labels].tolist()) == [0, 1, 1, 2]
        assert (pairs[:, 0] == meta_ids[drawn][found.anchors]).all()


def sources(**changes: object) -> PairSources:
    meta_ids = torch.tensor([0, 1, 2, 3])
    angles = torch.linspace(0, 1, NUM_IMAGES)
    values: dict = {
        "positives": PositiveTable(NUM_IMAGES),
        "memory": torch.stack([angles.cos(), angles.sin()], dim=1),
        "neighbor_ids": neighbors(),
        "perturbed": NUM_IMAGES + torch.arange(NUM_IMAGES),
        "meta": MetaSet(meta_ids, PIDS[meta_ids]),
        "use": "both",
        "is_first": True,
        "r": 4,
    }
    return PairSources(**(values | changes))


def test_an_epoch_takes_every_image_once_as_an_anchor() -> None:
    pool = draw_epoch(sources(use="unlabelled"), batch_size=16, seed=0, epoch=0)
    assert [step.num_anchors for step in pool] == [8, 8, 8]
    firsts = torch.cat([step.unlabelled.pairs[step.unlabelled.is_positive][:, 0] for step in pool])
    assert sorted(firsts.tolist()) == list(range(NUM_IMAGES))
    assert all(len(step.meta) == 0 for step in pool)


@pytest.mark.parametrize("is_first", [True, False])
def test_drawing_many_steps_at_once_changes_no_pair(is_first: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    positives = table({0: [0, 1, 2, 9], 5: [5, 6, 8], 20: [20, 21]})
    source = sources(positives=positives, is_first=is_first)
    pools = []
    for cells in (1, 400, 2**20):
        monkeypatch.setitem(gcn_sampling.CELLS_AT_ONCE, "cpu", cells)
        pools.append(draw_epoch(source, batch_size=10, seed=3, epoch=1))
    for steps in zip(*pools, strict=True):
        assert len({step.num_anchors for step in steps}) == 1
        for side in ("unlabelled", "meta"):
            alone, *others = (getattr(step, side) for step in steps)
            assert len(alone) > 0
            for other in others:
                assert torch.equal(alone.pairs, other.pairs)
                assert torch.equal(alone.is_positive, other.is_positive)
                assert torch.equal(alone.anchors, other.anchors)


def test_the_pool_is_the_same_for_the_same_seed_and_another_for_another() -> None:
    def pairs(seed: int, epoch: int) -> list:
        pool = draw_epoch(sources(), batch_size=16, seed=seed, epoch=epoch)
        return [step.pairs.tolist() for step in pool]

    assert pairs(0, 3) == pairs(0, 3)
    assert pairs(0, 3) != pairs(0, 4)
    assert pairs(0, 3) != pairs(1, 3)


@pytest.mark.parametrize(("use", "has_unlabelled", "has_meta"), [("both", 1, 1), ("meta", 0, 1), ("unlabelled", 1, 0)])
def test_the_sources_decide_whose_pairs_are_drawn(use: str, has_unlabelled: int, has_meta: int) -> None:
    step = draw_epoch(sources(use=use), batch_size=16, seed=0, epoch=0)[0]
    assert (len(step.unlabelled) > 0, len(step.meta) > 0) == (bool(has_unlabelled), bool(has_meta))
    unlabelled, meta = step.losses(torch.zeros(len(step)))
    assert (float(unlabelled) > 0, float(meta) > 0) == (bool(has_unlabelled), bool(has_meta))


def test_only_labelled_identities_reach_the_meta_pairs() -> None:
    pool = draw_epoch(sources(use="meta"), batch_size=16, seed=0, epoch=0)
    for step in pool:
        assert set(step.meta.pairs[step.meta.is_positive].flatten().tolist()) <= {0, 1, 2, 3}
        assert set(step.meta.pairs[:, 0].tolist()) <= {0, 1, 2, 3}
