"""Re-ranking, the distances of DBSCAN and query expansion equal published code (oracle files), values, slow loops."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from mprd.errors import UserError
from mprd.metrics import expand_queries, re_rank
from mprd.neighbors import exact, jaccard
from mprd.neighbors.re_ranking import distance_weights, find_nearest
from tests.graphs import slow_jaccard, squared_distances, unit_rows

ORACLE = Path(__file__).parent.parent / "oracle"
DEVICES = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]


@pytest.fixture(params=["whole", "row by row"])
def _blocks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "row by row":
        monkeypatch.setattr(exact, "SIMILARITIES_MB", 0)
        monkeypatch.setattr(jaccard, "TERMS_AT_ONCE", 1)


def slow_re_rank(q_features, g_features, *, k1, k2, lambda_value):
    """Mix the Jaccard distance with d, the squared distance over the largest of its row, as Zhong et al. in Sec. 3."""
    distances = squared_distances(np.concatenate([q_features, g_features]))
    distances /= distances.max(1, keepdims=True)
    mixed = (1 - lambda_value) * slow_jaccard(distances, k1, k2) + lambda_value * distances
    return mixed[: len(q_features), len(q_features) :]


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
@pytest.mark.usefixtures("_blocks")
def test_re_ranking_equals_the_slow_loop(num_queries, num_gallery, k1, k2):
    features = clustered_features(num_queries, num_gallery, seed=k1)
    distances = re_rank(*features, k1=k1, k2=k2)
    np.testing.assert_allclose(distances, slow_re_rank(*features, k1=k1, k2=k2, lambda_value=0.3), rtol=0, atol=1e-6)


@pytest.mark.usefixtures("_blocks")
def test_jaccard_distances_of_all_images_equal_the_slow_loop():
    features = unit_rows(23)
    # SpCL's lists hold k1 images with the image itself, those of Zhong et al. one more
    weights = distance_weights(features, find_nearest(features, 6)[0], k1=6, k2=3)
    blocks = list(jaccard.jaccard_blocks(weights, least=0))
    found = np.ones((23, 23))
    for first, second, similarities in blocks:
        found[first, second] = found[second, first] = 1 - similarities
    np.fill_diagonal(found, 0)
    expected = slow_jaccard(squared_distances(features.numpy()), 6, 3, length=6)
    np.testing.assert_allclose(found, expected, atol=1e-9)


def test_lambda_one_is_the_squared_distance_over_its_maximum():
    distances = re_rank(np.array([[0.0, 0.0]]), np.array([[1.0, 0.0], [0.0, 2.0]]), k1=1, k2=1, lambda_value=1)
    np.testing.assert_allclose(distances, [[0.25, 1.0]], rtol=0, atol=1e-7)


def test_images_that_share_no_neighbor_are_at_jaccard_distance_one():
    queries, gallery = np.array([[0.0, 0.0]]), np.array([[0.1, 0.0], [9.0, 9.0], [9.1, 9.0]])
    distances = re_rank(queries, gallery, k1=1, k2=1, lambda_value=0)
    # the query and its copy weigh 1 and exp(-d) over their sum, each in favor of the other
    assert distances[0, 1:].tolist() == [1.0, 1.0]
    assert distances[0, 0] == pytest.approx(0.0, abs=1e-3)


def test_equal_features_re_rank_to_finite_distances():
    assert np.isfinite(re_rank(np.ones((2, 3)), np.ones((5, 3)))).all()


def test_numpy_features_give_numpy_distances_and_tensors_tensors():
    queries, gallery = (x.astype(np.float32) for x in clustered_features(3, 9))
    assert isinstance(re_rank(queries, gallery), np.ndarray)
    assert isinstance(re_rank(torch.from_numpy(queries), torch.from_numpy(gallery)), torch.Tensor)
    assert isinstance(expand_queries(queries, gallery, k=2, alpha=1)[1], np.ndarray)


@pytest.mark.parametrize(
    ("queries", "gallery", "settings", "message"),
    [
        (np.ones((1, 2)), np.ones((2, 2)), {"k1": 0}, "k1 and k2 must be at least 1"),
        (np.ones((1, 2)), np.ones((2, 2)), {"k2": 0}, "k1 and k2 must be at least 1"),
        (np.ones((1, 2)), np.ones((2, 2)), {"lambda_value": 1.1}, "k1 and k2 must be at least 1"),
        (np.ones((1, 2)), np.ones((2, 2)), {"lambda_value": -0.1}, "k1 and k2 must be at least 1"),
        (np.ones((0, 2)), np.ones((2, 2)), {}, "q_features must not be empty"),
        (np.ones((1, 2)), np.array([[1.0, np.inf]]), {}, "g_features must be finite"),
        (np.ones(2), np.ones((2, 2)), {}, "q_features must have two dimensions"),
    ],
)
def test_input_that_cannot_be_re_ranked_is_refused(queries, gallery, settings, message):
    with pytest.raises(UserError, match=message):
        re_rank(queries, gallery, **settings)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.usefixtures("_blocks")
def test_expanded_queries_match_the_published_code(device):
    data = np.load(ORACLE / "extra_aqe_0.npz")
    features = [torch.from_numpy(data[name]).to(device) for name in ("q_feat", "g_feat")]
    outputs = expand_queries(*features, k=int(data["qe_k"]), alpha=float(data["alpha"]))
    for output, expected in zip(outputs, (data["q_out"], data["g_out"]), strict=True):
        unit, expected_unit = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (output.cpu().numpy(), expected))
        np.testing.assert_allclose(unit, expected_unit, rtol=0, atol=1e-6)


def test_the_two_nearest_are_averaged_by_squared_cosines():
    queries, gallery = np.array([[2.0, 0.0]]), np.array([[3.0, 4.0], [0.0, 1.0]])
    q_out, g_out = expand_queries(queries, gallery, k=2, alpha=2)
    # cosines: query to first .6, first to second .8, query to second 0
    np.testing.assert_allclose(q_out, [[(2 + 0.36 * 3) / 2, 0.36 * 4 / 2]], rtol=0, atol=1e-12)
    np.testing.assert_allclose(g_out, [[3 / 2, (4 + 0.64) / 2], [0.64 * 3 / 2, (1 + 0.64 * 4) / 2]], rtol=0, atol=1e-12)


def test_k_one_keeps_the_features_and_a_large_k_with_alpha_zero_averages_all():
    features = clustered_features(3, 9)
    np.testing.assert_allclose(expand_queries(*features, k=1, alpha=3)[0], features[0], rtol=0, atol=1e-12)
    mean = np.concatenate(features).mean(0)
    np.testing.assert_allclose(expand_queries(*features, k=99, alpha=0)[1], np.tile(mean, (9, 1)), rtol=0, atol=1e-12)


def test_a_negative_cosine_under_a_fractional_power_has_no_weight():
    q_out, _ = expand_queries(np.array([[1.0]]), np.array([[-1.0]]), k=2, alpha=0.5)
    assert q_out.tolist() == [[0.5]]


def test_expansion_settings_out_of_range_are_refused():
    with pytest.raises(UserError, match="k must be at least 1"):
        expand_queries(np.ones((1, 2)), np.ones((2, 2)), k=0, alpha=1)
    with pytest.raises(UserError, match="alpha at least 0"):
        expand_queries(np.ones((1, 2)), np.ones((2, 2)), k=1, alpha=-1)
