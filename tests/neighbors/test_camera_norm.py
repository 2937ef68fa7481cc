"""Features standardized by camera equal a slow loop, and make retrieval, lists and clusters cross cameras."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mprd.config.schema import NeighborsConfig
from mprd.errors import UserError
from mprd.evaluate.evaluation import standardize_sets
from mprd.metrics import rank_features
from mprd.neighbors.camera_norm import CameraStatistics
from mprd.neighbors.lists import FrozenLists
from mprd.pairs import clusters
from mprd.pairs.clusters import find_clusters


def drawn(num_images: int = 60, num_features: int = 6, num_cameras: int = 3) -> tuple[Tensor, Tensor]:
    """Draw unit features, and cameras with unequal numbers of images."""
    draw = torch.Generator().manual_seed(0)
    features = F.normalize(torch.randn(num_images, num_features, generator=draw))
    return features, torch.randint(num_cameras, (num_images,), generator=draw)


def standardize_by_camera(features: Tensor, camids: Tensor | None) -> Tensor:
    """Standardize features by their own camera statistics."""
    statistics = CameraStatistics.measure(features, camids)
    assert camids is not None
    return statistics.standardize(features, camids)


def slow_standardize(features: np.ndarray, camids: np.ndarray) -> np.ndarray:
    """Standardize one number at a time; a camera's statistics weigh n / (n + 30) beside those of all images."""

    def moments(numbers: list[float]) -> tuple[float, float]:
        mean = sum(numbers) / len(numbers)
        return mean, sum((x - mean) ** 2 for x in numbers) / len(numbers)

    rows = np.zeros_like(features)
    for i, camera in enumerate(camids):
        for d in range(features.shape[1]):
            seen = [features[j, d] for j in range(len(features)) if camids[j] == camera]
            own = len(seen) / (len(seen) + 30)
            mean, variance = (
                own * a + (1 - own) * b for a, b in zip(moments(seen), moments(features[:, d]), strict=True)
            )
            rows[i, d] = (features[i, d] - mean) / variance**0.5
        rows[i] /= sum(x * x for x in rows[i]) ** 0.5
    return rows


def biased_people(num_people: int = 600, num_cameras: int = 3, num_features: int = 16) -> tuple[Tensor, Tensor, Tensor]:
    """Draw people seen once under each camera, whose offset is far larger than the differences between people."""
    draw = torch.Generator().manual_seed(1)
    people = torch.randn(num_people, num_features, generator=draw)
    cameras = 4 * torch.randn(num_cameras, num_features, generator=draw)
    noise = 0.1 * torch.randn(num_cameras, num_people, num_features, generator=draw)
    features = people[None] + cameras[:, None] + noise
    camids = torch.arange(num_cameras).repeat_interleave(num_people)
    return F.normalize(features.flatten(0, 1)), torch.arange(num_people).repeat(num_cameras), camids


def share_of_true(lists: FrozenLists, pids: Tensor) -> float:
    return float((pids[lists.ids] == pids[:, None]).float().mean())


def test_it_agrees_with_a_loop() -> None:
    features, camids = drawn()
    expected = torch.tensor(slow_standardize(features.double().numpy(), camids.numpy()))
    torch.testing.assert_close(standardize_by_camera(features, camids).double(), expected, atol=1e-5, rtol=0)


def test_images_from_outside_are_standardized_by_the_statistics_of_those_inside() -> None:
    features, camids = drawn()
    statistics = CameraStatistics.measure(features, camids)
    rows = torch.tensor([3, 7, 3])
    torch.testing.assert_close(
        statistics.standardize(features[rows], camids[rows]), standardize_by_camera(features, camids)[rows]
    )


def test_few_images_leave_a_camera_most_of_the_statistics_of_all() -> None:
    features, _ = drawn(40)
    camids = torch.zeros(40, dtype=torch.long)
    camids[:10] = 2  # and camera 1 has no image at all
    statistics = CameraStatistics.measure(features, camids)
    torch.testing.assert_close(statistics.means[2], 0.25 * features[:10].mean(0) + 0.75 * features.mean(0))
    torch.testing.assert_close(statistics.spreads[1], features.std(0, correction=0))
    # cameras that are not known, and those of no row, take the statistics of all
    rows = statistics.standardize(features[:3], torch.tensor([1, -1, 7]))
    torch.testing.assert_close(rows, F.normalize((features[:3] - features.mean(0)) / features.std(0, correction=0)))


def test_persons_under_a_camera_of_few_images_stay_apart() -> None:
    """With its own mean a camera of two persons loses half of what tells them from all others."""
    features, pids, camids = biased_people(40, 2)
    kept = (camids == 0) | (pids < 2)
    features, pids, camids = features[kept], pids[kept], camids[kept]
    alike = standardize_by_camera(features, camids)[camids == 1]
    assert float((alike[0] * alike[1]).sum()) > -0.5


def test_equal_images_stay_as_they_are() -> None:
    features = F.normalize(torch.ones(20, 5))
    assert torch.equal(standardize_by_camera(features, torch.zeros(20, dtype=torch.long)), F.normalize(features))


def test_without_cameras_it_is_an_error_that_names_the_setting() -> None:
    with pytest.raises(UserError, match=r"^neighbors\.standardise"):
        standardize_by_camera(drawn()[0], None)


def test_retrieval_crosses_cameras_that_hid_the_people() -> None:
    features, pids, camids = biased_people()
    query = camids == 0
    sets = (features[query], features[~query])
    ids = [part.numpy() for part in (pids[query], pids[~query], camids[query], camids[~query])]
    plain = rank_features(*sets, *ids)
    # the gallery has no image of the query's camera
    one_sided = rank_features(*standardize_sets(*sets, *ids[2:]), *ids)
    shared = (features, features, camids.numpy(), camids.numpy())
    both = rank_features(*standardize_sets(*shared), *(part.numpy() for part in (pids, pids, camids, camids)))
    assert plain.mAP < 0.5
    assert one_sided.mAP < 0.5
    assert both.mAP > 0.9


def test_lists_cross_cameras_that_hid_the_people() -> None:
    features, pids, camids = biased_people()
    plain = FrozenLists(features, camids, NeighborsConfig(k=2, similarity=1.0))
    debiased = FrozenLists(features, camids, NeighborsConfig(k=2, similarity=1.0, standardise=True))
    assert share_of_true(plain, pids) == 0.0
    assert share_of_true(debiased, pids) > 0.9
    # the nearest of an image's copy is the image
    assert debiased.search_outside(debiased.features[[5]])[0, 0] == 5


def test_clusters_cross_cameras_that_hid_the_people(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"K1": 4, "K2": 1, "MIN_SAMPLES": 2}.items():
        monkeypatch.setattr(clusters, name, value)
    features, pids, camids = biased_people()
    found = find_clusters(features, standardize_by_camera(features, camids), eps=0.7)
    assert found is not None
    same = (found.labels[:, None] == found.labels[None]) & (found.labels >= 0)[:, None]
    truth = pids[:, None] == pids[None]
    assert float(truth[same].float().mean()) > 0.9
    # centroids average the features as they are, which the network is trained on
    first = found.labels == 0
    torch.testing.assert_close(found.centroids[0], F.normalize(features[first].sum(0), dim=0))
    plain = find_clusters(features, features, eps=0.7)
    assert plain is None or float(truth[(plain.labels[:, None] == plain.labels[None])].float().mean()) < 0.5
