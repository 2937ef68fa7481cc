"""Held against the field's published evaluators (oracle files), literal answers, and loops written from definitions."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from mprd.errors import UserError
from mprd.metrics import expand_queries, rank_features, rank_metrics, re_rank

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
    """Draw q_pids, g_pids (with -1 and 0), q_camids, g_camids."""
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
    # Kept order is 7, 3, 7 once the removed image at index 0 is gone: precision 1 at rank 1, 2/3 at rank 3
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


def test_read_only_and_strided_distances_are_ranked_and_left_alone():
    ids = draw_ids(10, 60)
    distances = np.random.default_rng(2).random((60, 20)).T[::2]
    distances.flags.writeable = False
    before = distances.tolist()
    assert_like_the_slow_loop(rank_metrics(distances, *ids), (before, *ids))
    assert distances.tolist() == before


def test_a_query_without_a_match_does_not_count():
    result = rank_metrics(np.array([[0.1, 0.2], [0.2, 0.1], [0.1, 0.2]]), [1, 2, 9], [1, 2], [0, 0, 0], [1, 1])
    assert (result.num_valid_queries, result.mAP) == (2, 1.0)


def test_the_distractor_identity_zero_can_stand_before_a_match():
    assert rank_metrics(np.array([[0.1, 0.2]]), [7], [0, 7], [0], [1, 1]).mAP == 0.5


def test_one_query_and_one_gallery_image_make_a_perfect_score():
    result = rank_metrics(torch.tensor([[0.3]]), [1], [1], [0], [1])
    assert (result.mAP, result.mINP, result.cmc.tolist()) == (1.0, 1.0, [1.0])


def test_the_cmc_is_no_longer_than_the_gallery():
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
def test_features_rank_by_cosine_whatever_the_memory(memory_mb, device):
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


def slow_re_rank(q_features, g_features, *, k1, k2, lambda_value):
    """Re-rank with dictionaries, from the equations of Zhong et al., Sec. 3, with squared Euclidean distances."""
    features = np.concatenate([q_features, g_features]).astype(float)
    images = range(len(features))
    distances = np.array([[((a - b) ** 2).sum() for b in features] for a in features])
    distances /= distances.max(1, keepdims=True)
    nearest = [sorted(images, key=lambda j, i=i: (j != i, distances[i, j])) for i in images]

    def reciprocal(i, k):
        return {j for j in nearest[i][: k + 1] if i in nearest[j][: k + 1]}

    encodings = []
    for i in images:
        members = reciprocal(i, k1)
        halves = [reciprocal(j, int(np.around(k1 / 2))) for j in members]
        expanded = members.union(*(half for half in halves if len(half & members) > 2 / 3 * len(half)))
        total = sum(np.exp(-distances[i, j]) for j in expanded)
        encodings.append({j: np.exp(-distances[i, j]) / total for j in expanded})
    means = []
    for i in images:
        group = [encodings[j] for j in nearest[i][:k2]]
        means.append({j: sum(e.get(j, 0) for e in group) / len(group) for e in group for j in e})
    result = np.empty((len(q_features), len(g_features)))
    for q in range(len(q_features)):
        for g in range(len(g_features)):
            ours, theirs = means[q], means[len(q_features) + g]
            minima, maxima = (
                sum(pick(ours.get(j, 0), theirs.get(j, 0)) for j in ours.keys() | theirs.keys()) for pick in (min, max)
            )
            d = distances[q, len(q_features) + g]
            result[q, g] = (1 - lambda_value) * (1 - minima / maxima) + lambda_value * d
    return result


def clustered_features(num_queries, num_gallery, *, num_features=6, seed=0):
    generator = np.random.default_rng(seed)
    num_images = num_queries + num_gallery
    centers = generator.normal(size=(max(1, num_images // 8), num_features))
    features = centers[generator.integers(0, len(centers), num_images)]
    features = features + 0.6 * generator.normal(size=(num_images, num_features))
    return features[:num_queries], features[num_queries:]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_re_ranked_distances_match_the_published_code(dtype, device):
    data = np.load(ORACLE / "extra_rerank_0.npz")
    features = [torch.from_numpy(data[name]).to(device, dtype) for name in ("q_feat", "g_feat")]
    settings = {"k1": int(data["k1"]), "k2": int(data["k2"]), "lambda_value": float(data["lambda_value"])}
    distances = re_rank(*features, **settings)
    assert distances.dtype == torch.float32
    np.testing.assert_allclose(distances.cpu().numpy(), data["final_dist"], rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("num_queries", "num_gallery", "k1", "k2"),
    [(12, 40, 20, 6), (12, 40, 7, 1), (12, 40, 5, 9), (12, 40, 1, 1), (1, 30, 20, 6), (6, 1, 3, 2), (5, 8, 99, 99)],
)
def test_re_ranking_is_what_the_slow_loop_says(num_queries, num_gallery, k1, k2):
    features = clustered_features(num_queries, num_gallery, seed=k1)
    expected = slow_re_rank(*features, k1=k1, k2=k2, lambda_value=0.3)
    np.testing.assert_allclose(re_rank(*features, k1=k1, k2=k2), expected, rtol=0, atol=1e-6)


def test_re_ranking_in_little_memory_gives_the_same_distances():
    features = clustered_features(20, 60)
    expected = slow_re_rank(*features, k1=20, k2=6, lambda_value=0.3)
    np.testing.assert_allclose(re_rank(*features, memory_mb=0), expected, rtol=0, atol=1e-6)


def test_lambda_one_leaves_the_squared_distance_over_its_largest():
    distances = re_rank(np.array([[0.0, 0.0]]), np.array([[1.0, 0.0], [0.0, 2.0]]), k1=1, k2=1, lambda_value=1)
    np.testing.assert_allclose(distances, [[0.25, 1.0]], rtol=0, atol=1e-7)


def test_images_that_share_no_neighbor_are_at_jaccard_distance_one():
    queries, gallery = np.array([[0.0, 0.0]]), np.array([[0.1, 0.0], [9.0, 9.0], [9.1, 9.0]])
    distances = re_rank(queries, gallery, k1=1, k2=1, lambda_value=0)
    # The query and its copy weigh 1 and exp(-d) over their sum, each in the other's favor
    assert distances[0, 1:].tolist() == [1.0, 1.0]
    assert distances[0, 0] == pytest.approx(0.0, abs=1e-3)


def test_equal_features_re_rank_to_finite_distances():
    assert np.isfinite(re_rank(np.ones((2, 3)), np.ones((5, 3)))).all()


def test_numpy_features_give_numpy_distances_and_tensors_tensors():
    queries, gallery = (x.astype(np.float32) for x in clustered_features(3, 9))
    assert isinstance(re_rank(queries, gallery), np.ndarray)
    assert isinstance(re_rank(torch.from_numpy(queries), torch.from_numpy(gallery)), torch.Tensor)
    assert isinstance(expand_queries(queries, gallery, k=2, alpha=1)[1], np.ndarray)


@pytest.mark.parametrize("settings", [{"k1": 0}, {"k2": 0}, {"lambda_value": 1.1}, {"lambda_value": -0.1}])
def test_re_ranking_settings_out_of_range_are_refused(settings):
    with pytest.raises(UserError, match="k1 and k2 must be at least 1"):
        re_rank(np.ones((1, 2)), np.ones((2, 2)), **settings)


def test_features_that_cannot_be_re_ranked_are_refused():
    with pytest.raises(UserError, match="q_features must not be empty"):
        re_rank(np.ones((0, 2)), np.ones((2, 2)))
    with pytest.raises(UserError, match="g_features must be finite"):
        re_rank(np.ones((1, 2)), np.array([[1.0, np.inf]]))
    with pytest.raises(UserError, match="q_features must have two dimensions"):
        re_rank(np.ones(2), np.ones((2, 2)))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("memory_mb", [0, 512])
def test_expanded_queries_match_the_published_code(memory_mb, device):
    data = np.load(ORACLE / "extra_aqe_0.npz")
    features = [torch.from_numpy(data[name]).to(device) for name in ("q_feat", "g_feat")]
    outputs = expand_queries(*features, k=int(data["qe_k"]), alpha=float(data["alpha"]), memory_mb=memory_mb)
    for output, expected in zip(outputs, (data["q_out"], data["g_out"]), strict=True):
        unit, expected_unit = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (output.cpu().numpy(), expected))
        np.testing.assert_allclose(unit, expected_unit, rtol=0, atol=1e-6)


def test_the_two_nearest_are_averaged_by_their_cosines_squared():
    queries, gallery = np.array([[2.0, 0.0]]), np.array([[3.0, 4.0], [0.0, 1.0]])
    q_out, g_out = expand_queries(queries, gallery, k=2, alpha=2)
    # cosines: query to first .6, first to second .8, query to second 0
    np.testing.assert_allclose(q_out, [[(2 + 0.36 * 3) / 2, 0.36 * 4 / 2]], rtol=0, atol=1e-12)
    np.testing.assert_allclose(g_out, [[3 / 2, (4 + 0.64) / 2], [0.64 * 3 / 2, (1 + 0.64 * 4) / 2]], rtol=0, atol=1e-12)


def test_k_one_leaves_the_features_and_a_large_k_with_alpha_zero_averages_all():
    features = clustered_features(3, 9)
    np.testing.assert_allclose(expand_queries(*features, k=1, alpha=3)[0], features[0], rtol=0, atol=1e-12)
    mean = np.concatenate(features).mean(0)
    np.testing.assert_allclose(expand_queries(*features, k=99, alpha=0)[1], np.tile(mean, (9, 1)), rtol=0, atol=1e-12)


def test_a_negative_cosine_under_a_fractional_power_weighs_nothing():
    q_out, _ = expand_queries(np.array([[1.0]]), np.array([[-1.0]]), k=2, alpha=0.5)
    assert q_out.tolist() == [[0.5]]


def test_expansion_settings_out_of_range_are_refused():
    with pytest.raises(UserError, match="k must be at least 1"):
        expand_queries(np.ones((1, 2)), np.ones((2, 2)), k=0, alpha=1)
    with pytest.raises(UserError, match="alpha at least 0"):
        expand_queries(np.ones((1, 2)), np.ones((2, 2)), k=1, alpha=-1)
