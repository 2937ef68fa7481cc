"""CMC, mAP and mINP against published evaluators (oracle files), literal values, and a slow loop."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from mprd.errors import UserError
from mprd.metrics import rank_features, rank_metrics

ORACLE = Path(__file__).parent / "oracle"
CASES = sorted(path.name for path in ORACLE.glob("[0-9]*.npz"))
DEVICES = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]


def slow_metrics(distances, q_pids, g_pids, q_camids, g_camids):
    """Return per valid query (AP, trapezoid AP, INP, rank of the first match) by walking the ranking."""
    scores = []
    for row, pid, camid in zip(distances, q_pids, q_camids, strict=True):
        ranking = sorted(range(len(g_pids)), key=lambda g: (row[g], g))
        kept = [g for g in ranking if g_pids[g] != -1 and not (g_pids[g] == pid and g_camids[g] == camid)]
        ranks = [rank for rank, g in enumerate(kept, start=1) if g_pids[g] == pid]
        if not ranks:
            continue
        after = [n / rank for n, rank in enumerate(ranks, start=1)]
        before = [1.0 if rank == 1 else (n - 1) / (rank - 1) for n, rank in enumerate(ranks, start=1)]
        trapezoid = sum((a + b) / 2 for a, b in zip(after, before, strict=True)) / len(ranks)
        scores.append((sum(after) / len(ranks), trapezoid, len(ranks) / ranks[-1], ranks[0]))
    return np.array(scores)


def assert_like_the_slow_loop(result, arrays, *, max_rank=50):
    scores = slow_metrics(*arrays)
    num_ranks = min(max_rank, sum(pid != -1 for pid in arrays[2]))
    assert result.num_valid_queries == len(scores)
    np.testing.assert_allclose(result.average_precisions, scores[:, 0], rtol=0, atol=1e-12)
    np.testing.assert_allclose(result.inverse_penalties, scores[:, 2], rtol=0, atol=1e-12)
    np.testing.assert_allclose(
        [result.mAP, result.mAP_trapezoid, result.mINP], scores[:, :3].mean(0), rtol=0, atol=1e-12
    )
    expected_cmc = [np.mean(scores[:, 3] <= rank) for rank in range(1, num_ranks + 1)]
    np.testing.assert_allclose(result.cmc, expected_cmc, rtol=0, atol=1e-12)


def draw_ids(num_queries, num_gallery, *, num_ids=6, seed=0):
    """Draw q_pids, g_pids (with -1 and 0), q_camids and g_camids."""
    generator = np.random.default_rng(seed)
    q_pids, g_pids = generator.integers(0, num_ids, num_queries), generator.integers(-1, num_ids, num_gallery)
    return q_pids, g_pids, generator.integers(0, 3, num_queries), generator.integers(0, 3, num_gallery)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("case", CASES)
def test_metrics_match_the_published_evaluators(case, device):
    data = np.load(ORACLE / case)
    ids = [data[name] for name in ("q_pids", "g_pids", "q_camids", "g_camids")]
    result = rank_metrics(torch.from_numpy(data["distmat"]).to(device), *ids, max_rank=int(data["max_rank"]))
    assert result.num_valid_queries == data["num_valid_q"]
    assert result.cmc.shape == data["cmc"].shape
    np.testing.assert_allclose(result.cmc, data["cmc"], rtol=0, atol=1e-6)
    np.testing.assert_allclose(result.average_precisions, data["all_AP"], rtol=0, atol=1e-6)
    np.testing.assert_allclose(result.inverse_penalties, data["all_INP"], rtol=0, atol=1e-6)
    np.testing.assert_allclose(
        [result.mAP, result.mAP_trapezoid, result.mINP],
        [data["mAP"], data["mlcreid_trapezoid_mAP"], data["mINP"]],
        rtol=0,
        atol=1e-6,
    )


def test_junk_left_in_the_gallery_is_dropped():
    data = np.load(ORACLE / "05_junk_and_pid0.npz")
    result = rank_metrics(
        data["raw_distmat"], data["q_pids"], data["raw_g_pids"], data["q_camids"], data["raw_g_camids"]
    )
    np.testing.assert_allclose(result.cmc, data["cmc"], rtol=0, atol=1e-6)
    assert result.mAP == pytest.approx(float(data["mAP"]), abs=1e-6)


def test_matches_at_ranks_two_and_five_give_the_scores_computed_by_hand():
    distances = np.array([[0.5, 0.4, 0.3, 0.2, 0.1]])
    result = rank_metrics(distances, [7], [7, 3, 4, 7, 5], [0], [1, 0, 0, 2, 1])
    assert result.mAP == pytest.approx((1 / 2 + 2 / 5) / 2, abs=1e-12)
    assert result.mAP_trapezoid == pytest.approx(((1 / 2 + 0 / 1) / 2 + (2 / 5 + 1 / 4) / 2) / 2, abs=1e-12)
    assert result.mINP == pytest.approx(2 / 5, abs=1e-12)
    assert result.cmc.tolist() == [0, 1, 1, 1, 1]


def test_an_image_of_the_same_id_and_camera_neither_counts_nor_takes_a_rank():
    distances = np.array([[0.1, 0.2, 0.3]])
    result = rank_metrics(distances, [7], [7, 7, 3], [0], [0, 1, 0])
    assert (result.mAP, result.mAP_trapezoid, result.mINP, result.cmc[0]) == (1, 1, 1, 1)


def test_equal_distances_rank_by_gallery_index():
    assert rank_metrics(np.array([[0.5, 0.5, 0.9]]), [7], [3, 7, 3], [0], [1, 1, 1]).mAP == 0.5
    assert rank_metrics(np.array([[0.5, 0.5, 0.9]]), [7], [7, 3, 3], [0], [1, 1, 1]).mAP == 1.0
    # without the removed image at index 0 the order is 7, 3, 7: precision 1 at rank 1, 2/3 at rank 3
    result = rank_metrics(np.array([[0.5, 0.5, 0.5, 0.5]]), [7], [7, 7, 3, 7], [0], [0, 1, 1, 1])
    assert result.mAP == pytest.approx((1 + 2 / 3) / 2, abs=1e-12)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("num_levels", [1, 4, 1000])
def test_distances_with_many_ties_score_like_the_slow_loop(num_levels, device):
    ids = draw_ids(40, 150, seed=num_levels)
    distances = torch.from_numpy(np.random.default_rng(1).integers(0, num_levels, (40, 150)) / num_levels)
    result = rank_metrics(distances.to(device), *ids, max_rank=20)
    assert_like_the_slow_loop(result, (distances.tolist(), *ids), max_rank=20)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.int32, torch.uint8])
def test_every_number_type_of_the_distances_is_ranked_exactly(dtype):
    ids = draw_ids(10, 60)
    distances = (torch.rand(10, 60, generator=torch.Generator().manual_seed(0)) * 200).to(dtype)
    assert_like_the_slow_loop(rank_metrics(distances, *ids), (distances.tolist(), *ids))


def test_a_close_float64_pair_is_not_rounded_into_a_tie():
    distances = np.array([[1.0 + 1e-12, 1.0]])
    assert rank_metrics(distances, [7], [3, 7], [0], [1, 1]).mAP == 1.0


def test_read_only_and_strided_distances_are_ranked_and_not_changed():
    ids = draw_ids(10, 60)
    distances = np.random.default_rng(2).random((60, 20)).T[::2]
    distances.flags.writeable = False
    before = distances.tolist()
    assert_like_the_slow_loop(rank_metrics(distances, *ids), (before, *ids))
    assert distances.tolist() == before


def test_a_query_without_a_match_does_not_count():
    result = rank_metrics(np.array([[0.1, 0.2], [0.2, 0.1], [0.1, 0.2]]), [1, 2, 9], [1, 2], [0, 0, 0], [1, 1])
    assert (result.num_valid_queries, result.mAP) == (2, 1.0)


def test_the_distractor_identity_zero_takes_a_rank():
    assert rank_metrics(np.array([[0.1, 0.2]]), [7], [0, 7], [0], [1, 1]).mAP == 0.5


def test_one_query_and_one_gallery_image_make_a_perfect_score():
    result = rank_metrics(torch.tensor([[0.3]]), [1], [1], [0], [1])
    assert (result.mAP, result.mINP, result.cmc.tolist()) == (1.0, 1.0, [1.0])
    # the CMC is no longer than the gallery without junk
    assert len(rank_metrics(np.ones((1, 3)), [1], [1, 2, -1], [0], [1, 1, 1], max_rank=50).cmc) == 2


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((np.ones((1, 2)), [1], [1, 2], [0], [0, 0]), "no query has a match"),
        ((np.ones((1, 2)), [3], [1, 2], [0], [1, 1]), "no query has a match"),
        ((np.ones((0, 2)), [], [1, 2], [], [0, 0]), "query must hold an image"),
        ((np.ones((1, 0)), [1], [], [0], []), "gallery must hold an image"),
        ((np.ones((1, 1)), [1], [-1], [0], [1]), "gallery must hold an image"),
        ((np.ones((2, 1)), [1], [1, 2], [0], [1, 1]), "queries x gallery"),
        ((np.ones(2), [1], [1, 2], [0], [1, 1]), "two dimensions"),
        ((np.ones((1, 2)), [1], [1, 2], [0], [1]), "every pid needs a camid"),
        ((np.ones((1, 2)), [1.5], [1, 2], [0], [1, 1]), "q_pids must be a list of whole numbers"),
        ((np.ones((1, 2)), [1], [1, 2], ["c1"], [1, 1]), "q_camids must be a list of whole numbers"),
        ((np.ones((1, 2)), [1], [[1], [2]], [0], [1, 1]), "g_pids must be a list of whole numbers"),
        ((np.array([[0.5, np.nan]]), [1], [1, 2], [0], [1, 1]), "finite"),
        ((np.array([[0.5, np.inf]]), [1], [1, 2], [0], [1, 1]), "finite"),
        ((np.array([[-np.inf, 0.5]]), [1], [1, 2], [0], [1, 1]), "finite"),
    ],
)
def test_unusable_input_is_refused_with_the_reason(arguments, words):
    with pytest.raises(UserError, match=words):
        rank_metrics(*arguments)


def test_a_max_rank_below_one_is_refused():
    with pytest.raises(UserError, match="max_rank must be at least 1, but got 0"):
        rank_metrics(np.ones((1, 1)), [1], [1], [0], [1], max_rank=0)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("memory_mb", [1, 512])
def test_features_rank_by_cosine_in_any_memory(memory_mb, device):
    ids = draw_ids(25, 3000, num_ids=40)
    features = np.random.default_rng(3).normal(size=(3025, 5))
    features /= np.linalg.norm(features, axis=1, keepdims=True)
    queries, gallery = features[:25], features[25:]
    q_tensor, g_tensor = (torch.from_numpy(x).to(device) for x in (queries, gallery))
    result = rank_features(q_tensor, g_tensor, *ids, memory_mb=memory_mb)
    assert_like_the_slow_loop(result, ((-queries @ gallery.T).tolist(), *ids))


def test_features_that_do_not_fit_are_refused():
    ids = ([1], [1, 2], [0], [1, 1])
    with pytest.raises(UserError, match="one feature size, but got 3 and 4"):
        rank_features(np.ones((1, 3)), np.ones((2, 4)), *ids)
    with pytest.raises(UserError, match="a pid for every feature"):
        rank_features(np.ones((2, 3)), np.ones((2, 3)), *ids)
    with pytest.raises(UserError, match="q_features must be finite"):
        rank_features(np.full((1, 3), np.nan), np.ones((2, 3)), *ids)
